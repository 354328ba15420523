"""The paper's anomaly task: which of ten images is of another class than the other nine?

Set-up (arXiv 2606.04032, section 4): sets of 10 items, 9 of one class and 1 of another, each item the 512
frozen features of an image; an encoder without positions, one score per item, cross-entropy over which item
it is; Adam 1e-3, gradient clip 5, batches of 128, 20 epochs of 10,000 sets, 2,000 test sets.

Choices of this package where that leaves them open: training sets are of training images and test sets of
test images, of the same classes; the 10,000 sets are drawn once; features are normalised by the training
images' mean and deviation; hidden size 64, 2 layers, 4 heads; a tenth of the steps as warm-up. The + forms
are left out: their positional term has no meaning without positions.

Shape legend: k sets, b batch, i items of a set, n images, f features of an image, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_sharedproj.experiments.image_features import FeatureSet, read_features
from megatron_sharedproj.experiments.small_models import SmallConfig, SmallTransformer, count_parameters
from megatron_sharedproj.experiments.small_training import Schedule, train
from megatron_sharedproj.experiments.vision import check_device, device_name

_TEST_SEED = 1_000_003  # the same test sets for every form and seed


@dataclass(frozen=True)
class AnomalySettings:
    """One training.

    Attributes:
        dataset: the images' name; features: fingerprint of the file of features.
        form: a key of small_models.FORMS, without a + form.
        items: of a set; train_sets: of an epoch; test_sets: the same ones for all.
        seed: of initial weights, training sets and their order.
    """

    dataset: str
    features: str
    form: str = "qkv"
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    items: int = 10
    train_sets: int = 10_000
    test_sets: int = 2_000
    epochs: int = 20
    batch: int = 128
    lr: float = 1e-3
    seed: int = 1
    device: str = "cpu"

    def config(self) -> SmallConfig:
        """Of the transformer; ValueError for a shape that can't be."""
        if self.form.endswith("+"):
            raise ValueError(f"form {self.form}: has a positional term, and the anomaly task no positions")
        if self.items < 3:
            raise ValueError(f"items {self.items}: with fewer than 3 no item is the odd one")
        return SmallConfig(self.hidden_size, self.layers, self.heads, self.form)


class AnomalyModel(nn.Module):
    """Features of sets [b, i, f] -> a score for each item [b, i]; reordered items have reordered scores.

    Args:
        mean, deviation: of each feature, [f].
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: SmallConfig, mean: Tensor, deviation: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.embedding = nn.Linear(len(mean), config.hidden_size)
        self.transformer = SmallTransformer(config)
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(self, sets: Tensor) -> Tensor:
        x = self.embedding((sets - self.mean) / self.deviation)
        return self.head(self.transformer(x)).squeeze(-1)


def draw_sets(labels: Tensor, count: int, items: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random sets: int64 [k, i] of images, and int64 [k], where the odd one is.

    Classes are drawn evenly, images of a set once each, the odd one's place evenly.

    Args:
        labels: int64 [n].
    Raises:
        ValueError: for fewer than two classes, or one with fewer than items - 1 images.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    least = min(map(len, members), default=0)
    if len(members) < 2 or least < items - 1:
        raise ValueError(
            f"{len(members)} class(es), the smallest of {least} image(s): sets of {items} need two classes "
            f"and {items - 1} images of each"
        )
    usual = torch.randint(len(members), (count,), generator=generator)
    odd = (usual + torch.randint(1, len(members), (count,), generator=generator)) % len(members)
    places = torch.randint(items, (count,), generator=generator)
    sets = torch.empty(count, items, dtype=torch.long)
    for row, (one, other, place) in enumerate(
        zip(usual.tolist(), odd.tolist(), places.tolist(), strict=True)
    ):
        of_class = members[one]
        chosen = of_class[torch.randperm(len(of_class), generator=generator)[: items - 1]]
        strange = members[other][torch.randint(len(members[other]), (1,), generator=generator)]
        sets[row] = torch.cat([chosen[:place], strange, chosen[place:]])
    return sets, places


def set_batches(
    features: Tensor, sets: Tensor, places: Tensor, batch: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all sets, shuffled in every epoch: [b, i, f] and int64 [b]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(sets), generator=generator).split(batch):
            yield features[sets[rows]], places[rows]


def run_anomaly_cell(cell: Mapping[str, Any], *, files: Mapping[str, Path]) -> dict[str, Any]:
    """Train and test one model; with the files of features bound, the cell function of a sweep.

    Args:
        cell: AnomalySettings' attributes; files: fingerprint -> file of features.
    Returns:
        ``accuracy`` (0 to 1) and ``loss`` on the test sets, ``train_loss`` of the last epoch, ``parameters``,
        ``steps``, ``train_images``, ``test_images``, ``device``, and ``features_accuracy`` where it is known.
    Raises:
        ValueError: for settings or a file that can't be.
    """
    settings = AnomalySettings(**cell)
    settings.config()
    check_device(settings.device)
    return train_and_test_anomaly(settings, read_features(files[settings.features]))


def train_and_test_anomaly(settings: AnomalySettings, data: FeatureSet) -> dict[str, Any]:
    """As run_anomaly_cell, with features that are loaded."""
    sets, places = draw_sets(data.train_labels, settings.train_sets, settings.items, settings.seed)
    test_sets, test_places = draw_sets(data.test_labels, settings.test_sets, settings.items, _TEST_SEED)
    deviation, mean = torch.std_mean(data.train_features, 0, correction=0)
    torch.manual_seed(settings.seed)
    # A feature that is hardly ever active would otherwise be blown up.
    model = AnomalyModel(settings.config(), mean, deviation.clamp_min(0.1 * float(deviation.mean()) + 1e-6))
    model.to(settings.device)
    steps_per_epoch = -(-settings.train_sets // settings.batch)
    steps = steps_per_epoch * settings.epochs

    def loss_of(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(module(inputs.to(settings.device)), targets.to(settings.device))

    order = set_batches(data.train_features, sets, places, settings.batch, settings.epochs, settings.seed)
    losses = train(model, order, loss_of, Schedule(steps, lr=settings.lr, warmup=steps // 10, clip=5.0))
    accuracy, loss = evaluate_anomaly(model, data.test_features[test_sets], test_places, settings.batch)
    last = losses[-steps_per_epoch:]
    return {
        "accuracy": accuracy,
        "loss": loss,
        "train_loss": sum(last) / len(last),
        "parameters": count_parameters(model),
        "steps": steps,
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "features_accuracy": None if math.isnan(data.accuracy) else data.accuracy,
        "device": device_name(settings.device),
    }


@torch.no_grad()
def evaluate_anomaly(model: AnomalyModel, sets: Tensor, places: Tensor, batch: int) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy (nats) over sets [k, i, f] with their odd ones [k]."""
    model.eval()
    device = model.mean.device
    scores = torch.cat([model(part.to(device)).cpu() for part in sets.split(4 * batch)])
    loss = float(functional.cross_entropy(scores, places))
    return float((scores.argmax(1) == places).double().mean()), loss
