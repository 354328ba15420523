"""The paper's vision task: a small vision transformer that classifies images, for each form of attention.

Set-up (arXiv 2606.04032, Table 2): patches of 4, 2 layers, hidden size 64 or 256, 2 or 4 heads, learning
rate 1e-3; TinyImageNet at 224 pixels with patches of 16, hidden size 768, 12 layers. Choices of this
package: learned positions, the mean over patches as what is classified (no class token), no augmentation,
no dropout, 20 epochs in batches of 64, a tenth of the steps as warm-up.

Shape legend: b batch, c channels, h and w image height and width, p patch size, s patches, d hidden size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_sharedproj.experiments.images import Images, ImageSet, batches, load_images
from megatron_sharedproj.experiments.small_models import SmallConfig, SmallTransformer, count_parameters
from megatron_sharedproj.experiments.small_training import Schedule, train

# What a preset sets apart from the defaults of VisionSettings.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny_imagenet": {
        "dataset": "tiny_imagenet",
        "image_size": 224,
        "patch": 16,
        "hidden_size": 768,
        "layers": 12,
        "heads": 12,
        "batch": 128,
        "epochs": 30,
        "bf16": True,
    },
}
_SECONDS_BETWEEN_LINES = 60.0


@dataclass(frozen=True)
class VisionSettings:
    """One training.

    Attributes:
        dataset: a key of images.DATASETS; path: the folder of its files, where it has some.
        form: a key of small_models.FORMS.
        image_size: what images are resized to, in pixels; 0: as they are.
        patch: pixels of a patch's side; images are filled up with their mean to whole patches.
        seed: of initial weights and of the order of images.
        device: torch's name of it; bf16: autocast.
    """

    dataset: str
    path: str = ""
    form: str = "qkv"
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    patch: int = 4
    image_size: int = 0
    epochs: int = 20
    batch: int = 64
    lr: float = 1e-3
    seed: int = 1
    device: str = "cpu"
    bf16: bool = False

    def config(self) -> SmallConfig:
        """Of the transformer; ValueError for a shape that can't be."""
        return SmallConfig(self.hidden_size, self.layers, self.heads, self.form)


def patch_grid(size: Sequence[int], image_size: int, patch: int) -> tuple[int, int]:
    """Patches down and across, of images of size (h, w), or image_size squared where that is not 0."""
    height, width = (image_size, image_size) if image_size else size
    return -(-height // patch), -(-width // patch)


class VisionTransformer(nn.Module):
    """uint8 [b, c, h, w] -> scores of classes [b, classes].

    Args:
        shape: (c, h, w) of the images as they come.
        image_size: what they are resized to (bilinear, antialiased); 0: as they are.
        mean, deviation: of each channel, [c], in units of uint8.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        config: SmallConfig,
        *,
        shape: tuple[int, int, int],
        patch: int,
        classes: int,
        mean: Tensor,
        deviation: Tensor,
        image_size: int = 0,
    ):
        super().__init__()
        channels, height, width = shape
        self.size = (image_size, image_size) if image_size else (height, width)
        self.patch = patch
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("deviation", deviation.view(-1, 1, 1))
        down, across = patch_grid(self.size, image_size, patch)
        self.embedding = nn.Linear(channels * patch * patch, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(down * across, config.hidden_size).normal_(std=0.02))
        self.transformer = SmallTransformer(config)
        self.head = nn.Linear(config.hidden_size, classes)

    def patches(self, images: Tensor) -> Tensor:
        """Normalised patches, row by row: uint8 [b, c, h, w] -> [b, s, c * p * p]."""
        x = images.to(self.mean.dtype)
        if x.shape[-2:] != self.size:
            x = functional.interpolate(x, self.size, mode="bilinear", antialias=True)
        x = (x - self.mean) / self.deviation
        p, (height, width) = self.patch, self.size
        x = functional.pad(x, (0, -width % p, 0, -height % p))  # zero is the mean
        b, c, h, w = x.shape
        x = x.view(b, c, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(self.patches(images)) + self.positions
        return self.head(self.transformer(x).mean(1))


def build_model(settings: VisionSettings, data: ImageSet) -> VisionTransformer:
    """The model for a data set, on the settings' device; its weights are the seed's."""
    first = data.train.read(torch.tensor([0]))
    mean, deviation = data.normalisation()
    torch.manual_seed(settings.seed)
    model = VisionTransformer(
        settings.config(),
        shape=(first.shape[1], first.shape[2], first.shape[3]),
        patch=settings.patch,
        classes=data.classes,
        mean=mean,
        deviation=deviation,
        image_size=settings.image_size,
    )
    return model.to(check_device(settings.device))


def run_vision_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train and test one model; the cell function of a sweep.

    Args:
        cell: VisionSettings' attributes.
    Returns:
        ``accuracy`` (0 to 1) and ``loss`` on the test images, ``train_loss`` of the last epoch,
        ``parameters``, ``patches`` per image, ``steps``, ``train_images``, ``test_images``, ``device``.
    Raises:
        ValueError: for settings or files that can't be.
    """
    settings = VisionSettings(**cell)
    settings.config()
    check_device(settings.device)
    path = Path(settings.path) if settings.path else None
    return train_and_test(settings, load_images(settings.dataset, path, settings.image_size))


def train_and_test(settings: VisionSettings, data: ImageSet) -> dict[str, Any]:
    """As run_vision_cell, with data that are loaded."""
    model = build_model(settings, data)
    steps_per_epoch = -(-len(data.train) // settings.batch)
    steps = steps_per_epoch * settings.epochs
    progress = _Progress(f"{settings.dataset}, {settings.form}, seed {settings.seed}", steps)

    def loss_of(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(_scores(module, images, settings), labels.to(settings.device))
        progress.step(loss)
        return loss

    order = batches(data.train, settings.batch, settings.epochs, settings.seed)
    losses = train(model, order, loss_of, Schedule(steps, lr=settings.lr, warmup=steps // 10))
    accuracy, loss = evaluate(model, data.test, settings)
    last = losses[-steps_per_epoch:]
    return {
        "accuracy": accuracy,
        "loss": loss,
        "train_loss": sum(last) / len(last),
        "parameters": count_parameters(model),
        "patches": len(model.positions),
        "steps": steps,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "device": device_name(settings.device),
    }


@torch.no_grad()
def evaluate(model: nn.Module, images: Images, settings: VisionSettings) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) over all images."""
    model.eval()
    right, loss = 0, 0.0
    for indices in torch.arange(len(images)).split(4 * settings.batch):
        scores, labels = _scores(model, images.read(indices), settings), images.labels[indices]
        labels = labels.to(scores.device)
        right += int((scores.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(scores, labels, reduction="sum"))
    return right / len(images), loss / len(images)


def _scores(model: nn.Module, images: Tensor, settings: VisionSettings) -> Tensor:
    device = torch.device(settings.device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        return model(images.to(device)).float()


def check_device(name: str) -> torch.device:
    """The device; ValueError for one that is not here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; use --device cpu") from None
    return torch.device(name)


def device_name(name: str) -> str:
    """A GPU's product name, else the name as it is."""
    device = torch.device(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name


class _Progress:
    """A line on stderr now and then, of a training that takes minutes."""

    def __init__(self, what: str, steps: int):
        self._what, self._steps, self._done, self._last = what, steps, 0, time.monotonic()

    def step(self, loss: Tensor) -> None:
        self._done += 1
        if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            line = f"{self._what}: step {self._done} of {self._steps}, loss {loss.item():.3f}"
            print(line, file=sys.stderr, flush=True)
