"""Image data sets that are folders of files: TinyImageNet's, and split/class/file as torchvision has them.

Files are decoded when a batch asks for them (ImageFiles): a set need not fit into memory.

Shape legend: k images, h height, w width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_TEST_NAMES = ("test", "val", "validation")
_THREADS = min(8, os.cpu_count() or 1)


class ImageFiles:
    """Images in files, as uint8 RGB.

    Args:
        files: one per image; labels: int64 [n].
        size: every image is cropped to a centred square and resized to it; 0: they have to be of one size.
    """

    def __init__(self, files: Sequence[Path], labels: Tensor, size: int = 0):
        self.files, self.labels, self.size = files, labels, size

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Tensor) -> Tensor:
        """uint8 [k, 3, h, w] of the given images, decoded by several threads.

        Raises:
            ValueError: naming the file that cannot be read or is of another size; without Pillow.
        """
        chosen = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(_THREADS) as pool:  # Pillow decodes without Python's lock
            images = list(pool.map(self._decoded, chosen))
        for path, image in zip(chosen, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{path}: {_size(image)} pixels, {chosen[0]} has {_size(images[0])}; "
                    "give --image-size to have all of one size"
                )
        return torch.stack(images)

    def _decoded(self, path: Path) -> Tensor:
        """uint8 [3, h, w]."""
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise ValueError("Pillow is not installed; install it with `pip install pillow`") from None
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # each of Pillow's formats fails in its own way
            raise ValueError(f"{path}: not a readable image ({error})") from None
        if self.size:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_image_folder(path: Path, size: int = 0) -> tuple[ImageFiles, ImageFiles]:
    """Training and test images of ``path/train/CLASS/FILE`` and ``path/test/CLASS/FILE``.

    The latter may be named val or validation. Classes are numbered in the order of their names.

    Raises:
        ValueError: naming the folder that is missing or empty, or the class that only one half has.
    """
    train = path / "train"
    test = next((path / name for name in _TEST_NAMES if (path / name).is_dir()), path / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected train/CLASS/FILE and test/CLASS/FILE")
    names = _folders(train)
    if not names:
        raise ValueError(f"{train}: no folder of a class in it; expected train/CLASS/FILE")
    others = _folders(test)
    for name in sorted({*names} ^ {*others}):
        here, there = (test, train) if name in names else (train, test)
        raise ValueError(f"{here / name}: no such folder; {there} has that class")
    train_files, test_files = (
        _labelled((_images(half / name) for name in names), size) for half in (train, test)
    )
    return train_files, test_files


def read_tiny_imagenet(path: Path) -> tuple[ImageFiles, ImageFiles]:
    """TinyImageNet as it is published: train/WNID/images and val/val_annotations.txt.

    Its test half has no labels: the validation half is the test set here, as in the literature.

    Raises:
        ValueError: naming the folder, file or line that is not as expected.
    """
    train, listing = path / "train", path / "val" / "val_annotations.txt"
    if not train.is_dir():
        raise ValueError(f"{train}: no such folder; expected the unpacked tiny-imagenet-200")
    names = _folders(train)
    if not names:
        raise ValueError(f"{train}: no folder of a class in it; expected train/WNID/images")
    train_files = _labelled((_images(train / name / "images") for name in names), 0)
    try:
        lines = listing.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{listing}: {getattr(error, 'strerror', error)}") from None
    folder, number_of = listing.parent / "images", {name: number for number, name in enumerate(names)}
    present = {file.name for file in _images(folder)}
    files, labels = [], []
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number_of:
            raise ValueError(f"{listing}: line {number}: class {wnid!r} has no folder in {train}")
        if name not in present:
            raise ValueError(f"{listing}: line {number}: no {name} in {folder}")
        files.append(folder / name)
        labels.append(number_of[wnid])
    if not files:
        raise ValueError(f"{listing}: empty; download the set again")
    return train_files, ImageFiles(files, torch.tensor(labels))


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _images(folder: Path) -> list[Path]:
    """The image files of a folder, by name; ValueError for none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = sorted(
        Path(entry.path) for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS)
    )
    if not found:
        raise ValueError(f"{folder}: no image in it (known: {' '.join(EXTENSIONS)})")
    return found


def _labelled(classes: Iterable[Sequence[Path]], size: int) -> ImageFiles:
    files, labels = list[Path](), list[int]()
    for number, paths in enumerate(classes):
        files += paths
        labels += [number] * len(paths)
    return ImageFiles(files, torch.tensor(labels), size)


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
