"""Frozen features of images: files of them, and a small convolutional network that makes some.

The paper's are 512 frozen numbers per image. Those made here are weaker: of three convolutions, trained for
one epoch on the training images of the set itself.

Shape legend: n images, b batch, c channels, h height, w width, f features of an image.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_sharedproj.experiments.images import Images, ImageSet, batches
from megatron_sharedproj.experiments.small_training import Schedule, train

FEATURES = 512
_KEYS = ("train_features", "train_labels", "test_features", "test_labels")


@dataclass(frozen=True)
class FeatureSet:
    """float32 [n, f] and int64 [n] of training and of test images.

    Attributes:
        accuracy: share of the test images that the network which made them classifies right; NaN: unknown.
    """

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor
    accuracy: float = math.nan

    @property
    def size(self) -> int:
        """f."""
        return self.train_features.shape[1]


def read_features(path: Path) -> FeatureSet:
    """An .npz file with train_features [n, f], train_labels [n], test_features and test_labels.

    ``accuracy`` may be there too.

    Raises:
        ValueError: naming the file and the array that is missing or can't be.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file]
            if missing:
                raise ValueError(f"no {', '.join(missing)} in it")
            arrays = {key: file[key] for key in _KEYS}
            accuracy = float(file["accuracy"]) if "accuracy" in file else math.nan
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a file of features: {error}") from None
    for half in ("train", "test"):
        features, labels = arrays[f"{half}_features"], arrays[f"{half}_labels"]
        if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
            raise ValueError(f"{path}: {half}_features must be finite numbers [n, f]")
        if labels.shape != features.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"{path}: {half}_labels must be whole numbers, one for each of {len(features)}")
    if arrays["train_features"].shape[1] != arrays["test_features"].shape[1]:
        raise ValueError(f"{path}: train_features and test_features differ in their number of features")
    kinds = {key: np.float32 if key.endswith("features") else np.int64 for key in _KEYS}
    tensors = {key: torch.from_numpy(arrays[key].astype(kinds[key])) for key in _KEYS}
    return FeatureSet(**tensors, accuracy=accuracy)


def write_features(path: Path, features: FeatureSet) -> None:
    """Write the file that read_features reads, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            arrays = {key: getattr(features, key).numpy() for key in _KEYS}
            np.savez(stream, accuracy=np.array(features.accuracy), **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(path: Path) -> str:
    """12 hexadecimal digits of a file's SHA-256: what tells one file of features from another."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


class FeatureNetwork(nn.Module):
    """Three convolutions and a linear layer: uint8 [b, c, h, w] -> scores [b, classes]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int, classes: int, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("deviation", deviation.view(-1, 1, 1))
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(128 * 9, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [b, c, h, w] -> [b, 512], what the classifier reads."""
        return self.body((images.to(self.mean.dtype) - self.mean) / self.deviation)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def make_features(data: ImageSet, *, epochs: int = 1, seed: int = 0) -> FeatureSet:
    """Features of all images from a FeatureNetwork that is trained on the training images, on the CPU."""
    torch.manual_seed(seed)
    first = data.train.read(torch.tensor([0]))
    network = FeatureNetwork(first.shape[1], data.classes, *data.normalisation())
    steps = epochs * -(-len(data.train) // 64)

    def loss_of(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(module(images), labels)

    train(network, batches(data.train, 64, epochs, seed), loss_of, Schedule(steps, warmup=steps // 10))
    network.eval()
    of_train, of_test = _all_features(network, data.train), _all_features(network, data.test)
    with torch.no_grad():
        right = (network.head(of_test).argmax(1) == data.test.labels).double().mean()
    return FeatureSet(of_train, data.train.labels, of_test, data.test.labels, float(right))


@torch.no_grad()
def _all_features(network: FeatureNetwork, images: Images) -> Tensor:
    parts = torch.arange(len(images)).split(256)
    return torch.cat([network.features(images.read(indices)) for indices in parts])
