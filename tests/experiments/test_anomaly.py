"""Anomaly sets: what they are made of, what the encoder may see, learning, files of features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sharedproj.experiments.anomaly import (
    AnomalyModel,
    AnomalySettings,
    draw_sets,
    run_anomaly_cell,
    set_batches,
    train_and_test_anomaly,
)
from megatron_sharedproj.experiments.image_features import (
    FEATURES,
    FeatureSet,
    fingerprint,
    make_features,
    read_features,
    write_features,
)
from megatron_sharedproj.experiments.images import load_images
from megatron_sharedproj.experiments.small_models import FORMS, SmallConfig

PLAIN_FORMS = [form for form in FORMS if not form.endswith("+")]
SMALL = AnomalySettings(
    "clusters",
    "x",
    hidden_size=32,
    layers=1,
    heads=2,
    train_sets=512,
    test_sets=256,
    epochs=6,
    batch=64,
    lr=3e-3,
)


def clusters(noise: float = 0.5, classes: int = 5, each: int = 30) -> FeatureSet:
    """Images of a class lie around its centre; test images are others of the same classes."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 24, generator=random)
    labels = torch.arange(classes).repeat_interleave(each)

    def half() -> torch.Tensor:
        return centres[labels] + noise * torch.randn(len(labels), 24, generator=random)

    return FeatureSet(half(), labels, half(), labels)


def test_a_set_has_one_odd_item() -> None:
    labels = torch.tensor([3, 1, 0, 1] * 20)[torch.randperm(80, generator=torch.Generator().manual_seed(1))]
    sets, places = draw_sets(labels, 400, 10, seed=5)
    assert sets.shape == (400, 10) and places.shape == (400,)
    pairs = set()
    for items, place in zip(sets.tolist(), places.tolist(), strict=True):
        odd, others = items[place], items[:place] + items[place + 1 :]
        assert len(set(items)) == 10
        kinds = {int(labels[item]) for item in others}
        assert len(kinds) == 1 and int(labels[odd]) not in kinds
        pairs.add((*kinds, int(labels[odd])))
    assert len(pairs) == 6  # each ordered pair of three classes
    counts = places.bincount(minlength=10)
    assert counts.min() > 20 and counts.max() < 65


def test_sets_are_the_seeds() -> None:
    labels = torch.arange(4).repeat_interleave(12)
    one, again, other = (draw_sets(labels, 50, 10, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_batches_hold_each_set_once_an_epoch() -> None:
    features = torch.arange(40.0)[:, None]
    sets, places = draw_sets(torch.arange(4).repeat_interleave(10), 7, 5, 0)
    found = list(set_batches(features, sets, places, 3, 2, 0))
    assert [len(inputs) for inputs, _ in found] == [3, 3, 1] * 2
    for epoch in (found[:3], found[3:]):
        rows = torch.cat([inputs for inputs, _ in epoch]).squeeze(-1).long()
        assert sorted(rows.tolist()) == sorted(sets.tolist())


@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_reordered_items_have_reordered_scores(form: str) -> None:
    torch.manual_seed(0)
    model = AnomalyModel(SmallConfig(16, 2, 4, form), torch.zeros(24), torch.ones(24))
    sets, order = torch.randn(3, 10, 24), torch.randperm(10)
    scores = model(sets)
    assert scores.shape == (3, 10)
    assert torch.allclose(model(sets[:, order]), scores[:, order], atol=1e-5)


@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_the_odd_item_is_learned(form: str) -> None:
    result = train_and_test_anomaly(AnomalySettings(**{**asdict(SMALL), "form": form}), clusters())
    assert result["accuracy"] > 0.8 and result["features_accuracy"] is None
    assert result["steps"] == 6 * 8


def test_without_information_it_is_guessed() -> None:
    """Noise alone: what is learned of training sets does not help on test sets, of other images."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat_interleave(30)
    noise = FeatureSet(
        torch.randn(150, 24, generator=random), labels, torch.randn(150, 24, generator=random), labels
    )
    result = train_and_test_anomaly(SMALL, noise)
    assert 0.02 < result["accuracy"] < 0.25 and result["loss"] > 0.9 * math.log(10)


def test_a_cell_reads_the_file_of_its_fingerprint_and_is_repeatable(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    write_features(path, clusters())
    digits = fingerprint(path)
    cell = {**asdict(SMALL), "features": digits, "epochs": 1}
    first = run_anomaly_cell(cell, files={digits: path, "other": tmp_path / "none"})
    assert run_anomaly_cell(cell, files={digits: path}) == first
    assert run_anomaly_cell({**cell, "seed": 2}, files={digits: path})["loss"] != first["loss"]


def test_features_of_the_small_network(tmp_path: Path) -> None:
    data = load_images("digits")
    made = make_features(data, epochs=2)
    assert made.train_features.shape == (1438, FEATURES) and made.test_features.shape == (359, FEATURES)
    assert (made.train_features >= 0).all() and made.accuracy > 0.8
    # The nearest class mean of training features classifies test images: they hold what a class is.
    means = torch.stack([made.train_features[made.train_labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(made.test_features, means).argmin(1)
    assert (nearest == made.test_labels).double().mean() > 0.7
    write_features(tmp_path / "f.npz", made)
    again = read_features(tmp_path / "f.npz")
    for name in ("train_features", "train_labels", "test_features", "test_labels"):
        assert torch.equal(getattr(again, name), getattr(made, name))
    assert again.accuracy == made.accuracy


def saved(path: Path, **changes: object) -> None:
    made = clusters()
    arrays: dict[str, object] = {
        name: getattr(made, name).numpy()
        for name in ("train_features", "train_labels", "test_features", "test_labels")
    }
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_bytes(b"text"), "not a file of features"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "not a file of features"),
        (lambda path: None, "not a file of features: .*No such file"),
        (lambda path: np.save(path.open("wb"), np.zeros(3)), "not a file of features"),
        (lambda path: saved(path, test_labels=None), "no test_labels in it"),
        (
            lambda path: saved(path, train_labels=np.array([{}] * 150)),
            "not a file of features: .*allow_pickle",
        ),
        (
            lambda path: saved(path, train_labels=np.zeros(9, int)),
            "train_labels must be whole numbers, one for",
        ),
        (lambda path: saved(path, test_features=np.full((150, 24), np.nan)), "test_features must be finite"),
        (lambda path: saved(path, test_features=np.zeros((150, 23))), "differ in their number of features"),
    ],
)
def test_bad_files_of_features(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "f.npz"
    write(path)
    with pytest.raises(ValueError, match=rf"f\.npz: .*{message}"):
        read_features(path)


def test_mistakes() -> None:
    with pytest.raises(
        ValueError, match=r"form q_eq_k\+: has a positional term, and the anomaly task no posi"
    ):
        AnomalySettings("x", "x", form="q_eq_k+").config()
    with pytest.raises(ValueError, match="items 2: with fewer than 3"):
        AnomalySettings("x", "x", items=2).config()
    for labels in (torch.zeros(50).long(), torch.tensor([0] * 50 + [1] * 8)):
        with pytest.raises(ValueError, match=r"sets of 10 need two classes and 9 images of each"):
            draw_sets(labels, 5, 10, 0)
