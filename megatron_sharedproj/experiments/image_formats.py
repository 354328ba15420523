"""Image data sets in the formats that they are published in.

idx (MNIST, FashionMNIST: http://yann.lecun.com/exdb/mnist), CIFAR's Python and binary versions
(https://www.cs.toronto.edu/~kriz/cifar.html), tables of pixels.

Shape legend: n images, c channels, h height, w width.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Labelled = tuple[Tensor, Tensor]

_IDX_BYTES = 0x08  # the type code of unsigned bytes
_CIFAR = (3, 32, 32)


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked where it is gzip's, whatever its name.

    Raises:
        ValueError: naming a file that is not there, or that is cut off or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); download it again") from None


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An idx file of bytes (gzip or not) as uint8, shaped as its header says.

    Args:
        dimensions: 3 for images [n, h, w], 1 for labels [n].
    Raises:
        ValueError: naming the file, for another magic number or a size that is not the header's.
    """
    content = read_bytes(path)
    head = 4 + 4 * dimensions
    expected = bytes((0, 0, _IDX_BYTES, dimensions))
    if content[:4] != expected:
        raise ValueError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, not {expected.hex()}: "
            f"no idx file of bytes in {dimensions} dimension(s)"
        )
    if len(content) < head:
        raise ValueError(f"{path}: cut off in its header; download it again")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    _check_size(path, len(content) - head, int(np.prod(shape, dtype=object)), f"of shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).copy()).view(shape)


def read_idx_pair(images: Path, labels: Path, classes: int) -> Labelled:
    """uint8 [n, 1, h, w] and int64 [n] of two idx files. Raises ValueError as read_idx does."""
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise ValueError(f"{labels}: {len(numbers)} labels for the {len(pixels)} images of {images.name}")
    return pixels[:, None], check_labels(labels, numbers.long(), classes)


def read_cifar_records(paths: Sequence[Path], classes: int, label_bytes: int) -> Labelled:
    """CIFAR's binary version: records of labels and 3072 pixels. uint8 [n, 3, 32, 32] and int64 [n].

    Args:
        label_bytes: before each image; the last one counts (CIFAR-100 has the coarse label before the fine).
    Raises:
        ValueError: naming the file that holds no whole number of records, or an unknown label.
    """
    parts = []
    for path in paths:
        content, record = read_bytes(path), label_bytes + 3072
        if not content or len(content) % record:
            raise ValueError(
                f"{path}: {len(content)} bytes are not a whole number of records of {record}; cut off, or of "
                "another format"
            )
        records = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(-1, record)
        labels = check_labels(path, records[:, label_bytes - 1].long(), classes)
        parts.append((records[:, label_bytes:].reshape(-1, *_CIFAR), labels))
    return _joined(parts)


def read_cifar_pickles(paths: Sequence[Path], classes: int, label_key: str) -> Labelled:
    """CIFAR's Python version: pickled dictionaries. uint8 [n, 3, 32, 32] and int64 [n].

    Args:
        label_key: "labels" (CIFAR-10) or "fine_labels" (CIFAR-100).
    Raises:
        ValueError: naming the file, for a pickle with anything but data in it, or other data than CIFAR's.
    """
    parts = []
    for path in paths:
        content = load_plain_pickle(path)
        entries = {_text(key): value for key, value in content.items()} if isinstance(content, dict) else {}
        missing = [key for key in ("data", label_key) if key not in entries]
        if missing:
            raise ValueError(f"{path}: no {' and no '.join(missing)} in it; not a CIFAR file of this kind")
        data, labels = entries["data"], entries[label_key]
        if (
            not isinstance(data, np.ndarray)
            or data.dtype != np.uint8
            or data.ndim != 2
            or data.shape[1] != 3072
        ):
            kind = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
            raise ValueError(f"{path}: data are {kind}; expected uint8 (n, 3072)")
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise ValueError(f"{path}: {label_key} are not a list of whole numbers")
        if len(labels) != len(data):
            raise ValueError(f"{path}: {len(labels)} labels for {len(data)} images")
        numbers = check_labels(path, torch.tensor(labels, dtype=torch.long), classes)
        parts.append((torch.from_numpy(data.copy()).view(-1, *_CIFAR), numbers))
    return _joined(parts)


def read_pixel_table(content: bytes, name: str, size: int, classes: int) -> Labelled:
    """Lines of size * size pixels and a label with commas between them: uint8 [n, 1, size, size], int64 [n].

    Args:
        content: gzip or text; name: of messages.
    Raises:
        ValueError: for what is no such table.
    """
    try:
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        table = np.loadtxt(text.decode().splitlines(), delimiter=",", ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{name}: no table of numbers ({error})") from None
    if table.shape[1] != size * size + 1:
        raise ValueError(f"{name}: {table.shape[1]} columns; expected {size}x{size} pixels and a label")
    if table.min() < 0 or table.max() > 255 or (table != table.round()).any():
        raise ValueError(f"{name}: pixels and labels must be whole numbers from 0 to 255")
    numbers = torch.from_numpy(table.astype(np.uint8))
    labels = check_labels(Path(name), numbers[:, -1].long(), classes)
    return numbers[:, :-1].reshape(-1, 1, size, size), labels


def check_labels(path: Path, labels: Tensor, classes: int) -> Tensor:
    """The labels; ValueError naming the file for none, or for one outside 0 to classes - 1."""
    if not len(labels):
        raise ValueError(f"{path}: no image in it")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"{path}: label {int(wrong[0])}; expected 0 to {classes - 1}")
    return labels


class _Kind:
    """Stands for a numpy dtype of a pickle: whole numbers only."""

    def __init__(self, name: Any, *_: Any):
        text = _text(name)
        if text not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"):
            raise pickle.UnpicklingError(f"an array of {text!r}, which no CIFAR file has")
        self.name, self.order = text, "<"

    def __setstate__(self, state: Any) -> None:
        order = _text(state[1])
        self.order = order if order in ("<", ">") else "|"


class _Array:
    """Stands for a numpy array while it is read: made from its bytes, without numpy's own unpickling."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, column_major, raw = state
        if not isinstance(kind, _Kind) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not of whole numbers")
        values = np.frombuffer(raw, np.dtype(kind.order.replace("|", "") + kind.name))
        self.values = values.reshape(shape, order="F" if column_major else "C")


def _latin1(text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text in encoding {encoding!r}")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, text, lists, dictionaries and arrays of numbers; every other name in a pickle is refused."""

    _NAMES: dict[tuple[str, str], Any] = {
        ("numpy", "dtype"): _Kind,
        ("numpy", "ndarray"): None,  # only ever the first argument of _reconstruct
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._NAMES[module, name]


def load_plain_pickle(path: Path) -> Any:
    """What a pickle of Python 2 or 3 holds, if that is only data; text of Python 2 is bytes.

    Nothing that the file names is imported or called, so that a file from a stranger can do no harm.

    Raises:
        ValueError: naming the file, for one that is cut off or asks for anything else.
    """
    content = read_bytes(path)
    try:
        found = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: {error}; not CIFAR's own file, or damaged: nothing of it was run"
        ) from None
    except Exception as error:  # a damaged pickle fails anywhere, with any error
        raise ValueError(f"{path}: not a whole pickle ({type(error).__name__}: {error})") from None
    return _unwrapped(found)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unwrapped(item) for key, item in value.items()}
    return value.values if isinstance(value, _Array) else value


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _check_size(path: Path, found: int, expected: int, what: str) -> None:
    if found < expected:
        raise ValueError(f"{path}: cut off: {found} bytes of the {expected} {what}; download it again")
    if found > expected:
        raise ValueError(f"{path}: {found} bytes, {found - expected} more than {what}")


def _joined(parts: Sequence[Labelled]) -> Labelled:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
