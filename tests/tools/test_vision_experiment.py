"""tools/vision_experiment.py: both tasks at tiny sizes, resuming, the table's figures, mistakes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_sharedproj.experiments.image_features import fingerprint
from megatron_sharedproj.experiments.small_models import FORMS
from megatron_sharedproj.experiments.vision_results import notes_of, rows_of
from megatron_sharedproj.reporting.vision_plot import vision_figure
from scripts import load


class Tool:
    """The tool in this process, its results in ./out."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.module, self.capsys = load("tools/vision_experiment.py"), capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """main(): exit code, stdout, stderr."""
        try:
            code = self.module.main(["--folder", "out", *args])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *self.capsys.readouterr()

    def sweep(self, *args: str) -> Any:
        """The cells of a command line, the function that runs one, and its cost."""
        return self.module.sweep_of(self.module.build_parser().parse_args(["--folder", "out", *args]))


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    monkeypatch.chdir(tmp_path)
    return Tool(capsys)


def write_features(path: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    halves = {half: (random.normal(size=(36, 8)) + 3 * np.eye(8)[labels]) for half in ("train", "test")}
    arrays = {f"{half}_features": values.astype(np.float32) for half, values in halves.items()}
    np.savez(path, **arrays, train_labels=labels, test_labels=labels)


TINY = ("--device", "cpu", "--hidden-sizes", "16", "--heads", "2", "--layers", "1", "--epochs", "1")


def test_images_then_more_seeds_into_the_same_folder(tool: Tool, tmp_path: Path) -> None:
    flags = (*TINY, "--dataset", "digits", "--forms", "qk_eq_v,qkv", "--batch-size", "512")
    code, out, err = tool(*flags, "--seeds", "1", "--output", "one.md")
    assert code == 0, err
    head = (tmp_path / "one.md").read_text().splitlines()
    assert "| QKV" in head[2] and "| K=V" in head[3]
    code, out, err = tool(*flags, "--seeds", "1,2", "--output", "two.csv", "--plot", "two.png")
    assert code == 0 and "2 of 4 cells are done already" in out
    assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "two.csv") as stream:
        rows = list(csv.DictReader(stream))
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["form"] for row in rows] == ["qkv", "qk_eq_v"] and len(records) == 4
    mine = [r["result"]["accuracy"] for r in records if r["settings"]["form"] == "qk_eq_v"]
    assert json.loads(rows[1]["accuracies"]) == mine and float(rows[1]["accuracy"]) == sum(mine) / 2


def test_anomaly_from_a_file_of_features(tool: Tool, tmp_path: Path) -> None:
    write_features(tmp_path / "f.npz")
    flags = (*TINY, "--task", "anomaly", "--dataset", "cifar100", "--features", "f.npz", "--seeds", "1")
    code, out, err = tool(
        *flags, "--train-sets", "64", "--test-sets", "32", "--forms", "qkv", "--format", "json"
    )
    assert code == 0, err
    (row,) = json.loads(out)
    assert row["task"] == "anomaly" and row["paper"] == 0.942 and row["steps"] == 1 and row["items"] == 10
    assert "32 test sets: one model's accuracy is known to" in err
    write_features(tmp_path / "f.npz")
    assert "cells are done" in tool(*flags, "--train-sets", "64", "--test-sets", "32", "--forms", "qkv")[1]


def test_anomaly_from_features_of_its_own(tool: Tool, tmp_path: Path) -> None:
    """Made once, then found again; other settings make another file."""
    flags = ("--task", "anomaly", "--dataset", "digits", "--seeds", "1", "--forms", "q_mqa", *TINY)
    (cell,), run, _ = tool.sweep(*flags, "--train-sets", "64", "--test-sets", "32")
    (path,) = (tmp_path / "out").glob("features_digits_*.npz")
    result = run(cell)
    assert cell["features"] == fingerprint(path) and 0.3 < result["features_accuracy"] <= 1
    made = path.stat().st_mtime_ns
    assert tool.sweep(*flags)[0][0]["features"] == cell["features"] and path.stat().st_mtime_ns == made
    assert tool.sweep(*flags, "--feature-epochs", "2")[0][0]["features"] != cell["features"]


def write_tiny_imagenet(root: Path) -> None:
    lines = []
    for number, wnid in enumerate(("n01443537", "n01629819")):
        pictures = [(root / "train" / wnid / "images" / f"{wnid}_{image}.JPEG") for image in range(3)]
        pictures.append(root / "val" / "images" / f"val_{number}.JPEG")
        for path in pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 90 * number + 40, np.uint8)).save(path)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def test_the_large_models_code_at_a_small_size(tool: Tool, tmp_path: Path) -> None:
    """Files from disk, resized, bf16 autocast: the preset with a smaller model and 96 pixels."""
    write_tiny_imagenet(tmp_path / "data")
    (cell,), run, _ = tool.sweep(
        "--device", "cpu", "--hidden-sizes", "32", "--heads", "4", "--layers", "2", "--epochs", "2",
        "--preset", "tiny_imagenet", "--data-path", "data", "--image-size", "96", "--batch-size", "4",
        "--forms", "q_eq_k_eq_v", "--seeds", "1",
    )  # fmt: skip
    assert cell["bf16"] and cell["patch"] == 16 and cell["path"] == "data"
    result = run(cell)
    assert result["steps"] == 4 and result["patches"] == 36
    assert result["parameters"] == 768 * 32 + 32 + 36 * 32 + 2 * (2 * 1056 + 8 * 1024 + 160 + 128) + 64 + 66
    assert math.isfinite(result["loss"]) and (result["train_images"], result["test_images"]) == (6, 2)


def test_the_preset_as_it_is(tool: Tool, tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path / "data")
    cells, _, cost = tool.sweep("--preset", "tiny_imagenet", "--data-path", "data", "--seeds", "1")
    shape = {key: cells[0][key] for key in ("image_size", "patch", "hidden_size", "layers", "heads")}
    assert shape == {"image_size": 224, "patch": 16, "hidden_size": 768, "layers": 12, "heads": 12}
    assert [cell["form"] for cell in cells] == [form for form in FORMS if "mqa" not in form]
    assert cost(cells[0]) == 6 * 14 * 14 * 30 * 12 * 768 * 818


def record(form: str, seed: int, accuracy: float, dataset: str = "mnist_5k", **more: Any) -> dict[str, Any]:
    settings = {"dataset": dataset, "path": "", "form": form, "hidden_size": 64, "layers": 2, "heads": 4}
    result = {
        "accuracy": accuracy, "loss": 1 - accuracy, "train_loss": 0.1, "parameters": 1000, "steps": 5,
        "train_images": 400, "test_images": 100, "device": "cpu",
    }  # fmt: skip
    notes = {"commit": "abc", "device": "a CPU", "torch": "2", "date": "2026-11-30T00:00:00Z", "seconds": 2.0}
    return {"settings": {**settings, "seed": seed, **more}, "result": result, **notes}


def test_rows_compare_seed_by_seed() -> None:
    qkv, tied = [0.80, 0.90, 0.85], [0.79, 0.89, 0.85]
    records = [record("qk_eq_v", seed, value) for seed, value in enumerate(tied)]
    records += [record("qkv", seed, value) for seed, value in enumerate(qkv)]
    records += [record("q_eq_k", 7, 0.5)]
    first, other, second = rows_of(records)
    assert [first["form"], other["form"], second["form"]] == ["qkv", "q_eq_k", "qk_eq_v"]
    assert first["accuracy"] == pytest.approx(0.85) and first["deviation"] == pytest.approx(0.05)
    assert first["difference"] is None and other["difference"] is None  # other seeds
    assert second["difference"] == pytest.approx(-2 / 3)
    half = 4.302653 * np.std([-1, -1, 0], ddof=1) / 3**0.5
    assert second["difference_high"] == pytest.approx(-2 / 3 + half, rel=1e-5)
    assert second["difference_text"] == "-0.67 +- 0.58" and second["accuracy_text"] == "0.8433 +- 0.0503"
    assert (second["paper"], second["paper_dataset"]) == (0.976, "mnist")
    assert second["device"] == "a CPU" and second["seconds"] == 6.0
    # A share of 0.85 of 100 images: 1.96 sqrt(0.85 * 0.15 / 100) = 7 points.
    assert "100 test images: one model's accuracy is known to 7.0 points" in notes_of([first])[1]


def test_a_clear_difference_is_starred() -> None:
    records = [record("qkv", seed, 0.9 + seed / 100) for seed in range(3)]
    records += [record("q_eq_k_eq_v", seed, 0.8 + seed / 100 + seed / 1000) for seed in range(3)]
    assert rows_of(records)[1]["difference_text"] == "-9.90 +- 0.10 *"


def test_the_plot_has_a_panel_per_data_set_and_the_papers_figures() -> None:
    records = [
        record(form, seed, 0.8 + seed / 50 + heads / 100, dataset, heads=heads)
        for dataset in ("digits", "mnist_5k")
        for heads in (2, 4)
        for form in ("qkv", "qk_eq_v")
        for seed in (0, 1, 2)
    ]
    figure = vision_figure(rows_of(records))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["images: digits", "images: mnist_5k\n(paper: mnist)"]
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["QKV", "K=V"]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 3 and "the paper" in labels and "d 64, 2 layers, 2 heads" in labels[0]
    (bars,) = [c for c in panels[0].containers if "2 heads" in c.get_label()]
    assert bars.lines[0].get_ydata() == pytest.approx([0.84, 0.84])
    with pytest.raises(ValueError, match="no result to plot"):
        vision_figure([])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--dataset", "cifar10"), "--dataset cifar10: needs --data-path"),
        (("--dataset", "cifar10", "--data-path", "nowhere"), "--data-path nowhere: is not a folder"),
        (("--dataset", "imagenet"), "--dataset: 'imagenet' is unknown; choose from digits"),
        (("--dataset", "digits", "--heads", "3"), "hidden_size 64: not divisible by num_heads 3"),
        (("--dataset", "digits", "--device", "none"), "--device none: "),
        (("--items", "4"), "--items: is a flag of --task anomaly; leave it out"),
        (("--task", "anomaly", "--patch", "4"), "--patch: is a flag of --task images; leave it out"),
        (("--task", "anomaly", "--features", "f.npz"), "f.npz: not a file of features"),
        (
            ("--task", "anomaly", "--dataset", "digits", "--forms", "q_eq_k+"),
            "form q_eq_k+: has a positional",
        ),
        (
            ("--task", "anomaly", "--dataset", "digits,mnist_5k", "--features", "f"),
            "give one with --features",
        ),
        (
            (
                "--preset",
                "tiny_imagenet",
            ),
            "--dataset tiny_imagenet: needs --data-path",
        ),
        (("--plot", "x.jpg"), "--plot x.jpg: must be a file name that ends in .png"),
        (("--epochs", "0"), "--epochs: '0' is not a whole number above 0"),
    ],
)
def test_mistakes_are_one_line(tool: Tool, flags: tuple[str, ...], message: str) -> None:
    code, out, err = tool(*flags)
    assert code == 2 and message in err and err.startswith("error: ")
    assert err.count("\n") == 1
