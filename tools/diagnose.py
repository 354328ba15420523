#!/usr/bin/env python3
"""What trained attention looks like: K/V similarity, ranks, symmetry of scores, and where heads look.

On any checkpoint, or a Hugging Face directory (our export, or of GPT-2's or Llama's shape). Prints a table
of layers and writes diagnostics.csv and diagnostics.jsonl (every layer and head), diagnostics.png (the runs
compared) and a heads_RUN.png for each run. docs/diagnostics.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj import distributed
from megatron_sharedproj.command_line import Parser, positive_int, run_distributed

EXAMPLE = """examples:
  python tools/diagnose.py --load runs/qkv runs/k_eq_v --data-path data/validation_text_document \\
      --output-dir diagnostics
  python tools/diagnose.py --load qkv_1 qkv_2 k_eq_v_1 k_eq_v_2 --labels qkv,qkv,K=V,K=V \\
      --data-path data/validation_text_document --output-dir diagnostics
  python tools/diagnose.py --load gpt2 --text book.txt --tokens 16384 --output-dir diagnostics

Runs with the same label are drawn as one line with a band of one standard deviation.
"""


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.inference.loading import add_loading_args

    # --load takes several here, so the flag is given again.
    parser = Parser(description=__doc__, epilog=EXAMPLE, conflict_handler="resolve")
    add_loading_args(parser, parallel=False)
    parser.add_argument(
        "--load", type=Path, nargs="+", required=True, metavar="RUN",
        help="--save folders, iter_NNNNNNN folders, or Hugging Face directories",
    )  # fmt: skip
    parser.add_argument(
        "--labels", metavar="A,B", help="one per RUN, several may share one (default: the folders' names)"
    )
    group = parser.add_argument_group("text")
    group.add_argument("--data-path", default="", metavar="PREFIX", help="indexed data (without .bin)")
    group.add_argument("--text", type=Path, metavar="FILE", help="a text file (UTF-8) instead")
    group.add_argument(
        "--tokens", type=positive_int, default=65536, metavar="N", help="its first N (default 65536)"
    )
    group.add_argument(
        "--seq-length", type=int, default=0, metavar="N", help="tokens per row (default: each run's)"
    )
    group.add_argument(
        "--micro-batch-size", type=positive_int, default=8, metavar="N", help="rows at a time (default 8)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="made if absent")
    group.add_argument("--no-plots", action="store_true", help="figures only as numbers")
    group.add_argument("--title", default="", help="text above the comparison")
    return parser


def labels_of(args: argparse.Namespace) -> list[str]:
    """A label for each run; folders of the same name are told apart by their paths.

    Raises:
        ValueError: for another number of labels than runs, or an empty one.
    """
    if args.labels is None:
        names = [run_name(path) for path in args.load]
        return [
            name if names.count(name) == 1 else str(path) for name, path in zip(names, args.load, strict=True)
        ]
    labels = [part.strip() for part in args.labels.split(",")]
    if len(labels) != len(args.load) or "" in labels:
        raise ValueError(
            f"--labels {args.labels}: give {len(args.load)}, one per RUN; several may be the same"
        )
    return labels


def run_name(path: Path) -> str:
    """What a run is called: its folder, and the iteration where that was named."""
    path = path.absolute()
    return f"{path.parent.name}_{path.name}" if path.name.startswith("iter_") else path.name


def check(args: argparse.Namespace, labels: Sequence[str]) -> None:
    """Everything that can be wrong before a model is loaded. Raises ValueError."""
    from megatron_sharedproj.checkpointing import files, resolve_checkpoint
    from megatron_sharedproj.retrofit.conversion import is_hugging_face

    if distributed.world_size() > 1:
        raise ValueError(f"WORLD_SIZE {distributed.world_size()}: run this tool as one process")
    if bool(args.data_path) == (args.text is not None):
        raise ValueError("--data-path, --text: give one of them, indexed data or a text file")
    if args.text is not None and not args.text.is_file():
        raise ValueError(f"--text {args.text}: is not a file")
    for suffix in (".bin", ".idx") if args.data_path else ():
        if not Path(args.data_path + suffix).is_file():
            raise ValueError(f"--data-path {args.data_path}: {args.data_path}{suffix} does not exist")
    if args.seq_length < 0:
        raise ValueError(f"--seq-length {args.seq_length}: must not be negative (0: each run's)")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output-dir {args.output_dir}: is not a folder")
    if len({path.resolve() for path in args.load}) < len(args.load):
        raise ValueError(f"--load {' '.join(map(str, args.load))}: a run is given twice; name each once")
    if not args.no_plots:
        from megatron_sharedproj.reporting.figures import new_figure

        try:
            new_figure()
        except ValueError as error:
            raise ValueError(f"{error}, or add --no-plots") from None
    shapes: dict[str, tuple[Any, ...]] = {}
    for path, label in zip(args.load, labels, strict=True):
        if not is_hugging_face(path):
            folder = resolve_checkpoint(path, verify=not args.no_verify_integrity)
            check_label(shapes, label, files.checkpoint_config(folder).model)


def check_label(shapes: dict[str, tuple[Any, ...]], label: str, model: Any) -> None:
    """Models of one label are averaged: refuse those of different shapes."""
    shape = (model.attention_variant, model.num_layers, model.num_attention_heads, model.num_query_groups)
    if shapes.setdefault(label, shape) != shape:
        raise ValueError(
            f"--labels {label}: names models of different shapes (variant, layers, heads, groups: "
            f"{shapes[label]} and {shape}); give them different labels"
        )


def load(args: argparse.Namespace, path: Path) -> Any:
    """A run as a model of one process; a Hugging Face directory by way of a checkpoint that is not kept."""
    from megatron_sharedproj.conversion.hf_import import import_folder, tokenizer_fields
    from megatron_sharedproj.inference.loading import load_model
    from megatron_sharedproj.retrofit.conversion import is_hugging_face

    values = argparse.Namespace(**{**vars(args), "load": path})
    if not is_hugging_face(path):
        return load_model(values, parallel_output=True)
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    fields = tokenizer_fields(path, {name: getattr(args, name) for name in names})
    with tempfile.TemporaryDirectory() as folder:
        import_folder(path, Path(folder) / "model", tokenizer=fields)
        values.load = Path(folder) / "model"
        return load_model(values, parallel_output=True)


def tokens_of(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The stream that a model runs over: --tokens, and the one that the last of them predicts."""
    import numpy as np

    from megatron_sharedproj.data.inspection import validate_indexed
    from megatron_sharedproj.evaluation.perplexity import read_tokens

    if args.data_path:
        validate_indexed(args.data_path, tokenizer.vocab_size, args.tokens + 1)
        return read_tokens(args.data_path, args.tokens + 1)[0]
    try:
        text = args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {args.text}: is not UTF-8 ({error})") from None
    return np.array(tokenizer.encode(text)[: args.tokens + 1], dtype=np.int64)


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.evaluation.diagnostics import diagnose
    from megatron_sharedproj.profiling.attention_results import commit
    from megatron_sharedproj.profiling.progress import ProgressBar

    labels = labels_of(args)
    check(args, labels)
    origin = {"commit": commit(Path(__file__).parent), "date": datetime.now(UTC).date().isoformat()}
    rows: list[dict[str, Any]] = []
    shapes: dict[str, tuple[Any, ...]] = {}
    for path, label in zip(args.load, labels, strict=True):
        loaded = load(args, path)
        model = loaded.config.model
        check_label(shapes, label, model)
        bar = ProgressBar(1.0)
        found = diagnose(
            loaded,
            tokens_of(args, loaded.tokenizer),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            say=lambda done, total, bar=bar, path=path: bar.show(
                done / total, f"{path}, row {done} of {total}"
            ),
        )
        bar.clear()
        head = {"label": label, "run": str(path), "variant": model.attention_variant}
        tail = {"loss": found.loss, "tokens": found.tokens, "seq_length": found.seq_length, **origin}
        new = [{**head, **row, **tail} for row in found.rows]
        rows += new
        perplexity = math.exp(min(found.loss, 700.0))
        print(f"{path}: {model.describe_attention()}")
        print(f"{found.tokens:,} tokens in rows of {found.seq_length}, perplexity {perplexity:.2f}\n")
        features = model.num_attention_heads * model.kv_channels
        few = f"{found.tokens} tokens for {features} features: CKA is too high, cka_*_unbiased is not"
        print_table(found.layers, [few] if found.tokens < 10 * features else [])
        print(flush=True)
        with writing(args):
            write(args, rows, new)  # what is measured stays, whatever becomes of the next run
    if not args.no_plots:
        with writing(args):
            compare(args, rows)
    if len({row["seq_length"] for row in rows}) > 1:
        print("note: the runs have different sequence lengths, on which entropy depends; see --seq-length")
    print(f"{args.output_dir}: {', '.join(sorted(path.name for path in args.output_dir.iterdir()))}")


@contextmanager
def writing(args: argparse.Namespace) -> Iterator[None]:
    """Name the flag where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output-dir {args.output_dir}: cannot be written ({error})") from None


def write(args: argparse.Namespace, rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
    """Write the numbers of all runs so far, and the last one's heads (``new`` are its rows)."""
    from megatron_sharedproj.config import write_text
    from megatron_sharedproj.profiling.tables import write_csv
    from megatron_sharedproj.reporting.diagnostics_plot import plot_heads

    args.output_dir.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(args.output_dir / "diagnostics.csv", columns, [plain(row, 6) for row in rows])
    lines = [json.dumps(plain(row)) + "\n" for row in rows]
    write_text(args.output_dir / "diagnostics.jsonl", "".join(lines))
    if args.no_plots:
        return
    names = [run_name(path) for path in args.load]
    path = Path(new[0]["run"])
    name = run_name(path) if names.count(run_name(path)) == 1 else str(path)
    file = "heads_" + re.sub(r"[^\w.=-]+", "_", name) + ".png"
    plot_heads(new, args.output_dir / file, title=f"{name}, {new[0]['variant']}")


def compare(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Draw all runs into one plot."""
    from megatron_sharedproj.evaluation.similarity import uniform_weight
    from megatron_sharedproj.reporting.diagnostics_plot import plot_comparison

    lengths = {row["seq_length"] for row in rows}
    uniform = uniform_weight(lengths.pop()) if len(lengths) == 1 else None
    plot_comparison(rows, args.output_dir / "diagnostics.png", uniform=uniform, title=args.title)


def plain(row: dict[str, Any], digits: int = 0) -> dict[str, Any]:
    """A row that CSV and JSON can hold: no NaN; floats with so many significant digits (0: all)."""
    found = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
    return {key: f"{x:.{digits}g}" if digits and isinstance(x, float) else x for key, x in found.items()}


# Key of a row, heading, digits.
_COLUMNS = (
    ("cka_key_value", "CKA k,v", 3),
    ("cka_key_value_heads", "by head", 3),
    ("cka_query_key_heads", "q,k by head", 3),
    ("effective_rank_query", "rank q", 1),
    ("effective_rank_key", "rank k", 1),
    ("effective_rank_value", "rank v", 1),
    ("score_symmetry", "symmetry", 3),
    ("score_symmetry_centred", "centred", 3),
    ("weight_symmetry", "weights", 3),
    ("entropy", "entropy", 2),
    ("entropy_share", "/ log n", 3),
    ("first_token", "first", 3),
    ("self", "self", 3),
)


def print_table(layers: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Layers and their mean, aligned."""
    from megatron_sharedproj.profiling.tables import Column, write_rows

    mean: dict[str, Any] = {"layer": "mean"}
    for key, _, _ in _COLUMNS:
        values = [row[key] for row in layers]
        mean[key] = values[0] if isinstance(values[0], str) else sum(values) / len(values)
    columns = [Column(key, title, f".{digits}f") for key, title, digits in _COLUMNS]
    shown = argparse.Namespace(format="table", output=None)
    write_rows([*layers, mean], [Column("layer", "layer"), *columns], shown, notes)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the flags or a damaged checkpoint (one line), 130 after Ctrl-C."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
