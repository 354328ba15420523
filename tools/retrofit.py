#!/usr/bin/env python3
"""A trained Q, K, V model as a K=V model: surgery on its attention, then distillation from what it was.

surgery: one shared tensor of W_k and W_v of every layer: their mean, either of them, or the one that changes
the model least on given text (least_squares); optionally fewer key/value heads. Prints perplexity before and
after, and the command that distils; with flags behind -- it runs that.
plot: perplexity along distillations, with lines at the teacher's and at that of a K=V model from scratch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj import distributed
from megatron_sharedproj.command_line import Parser, positive_int, run_distributed

EXAMPLE = """examples:
  python tools/retrofit.py surgery --load runs/qkv --output runs/start --merge least_squares \\
      --calibration-data data/train_text_document --eval-data data/validation_text_document
  python tools/retrofit.py surgery --load gpt2 --output runs/start --merge mean --nproc-per-node 2 -- \\
      --train-data-path data/train_text_document --valid-data-path data/validation_text_document \\
      --micro-batch-size 8 --global-batch-size 32 --train-iters 500 --lr 1e-3 --save runs/k_eq_v
  python tools/retrofit.py plot runs/k_eq_v --teacher runs/qkv --scratch runs/scratch --output retrofit.png

The paper's 300M model had, after surgery and after 500M tokens of distillation: mean 6430 and 22.87, keep V
7347 and 27.00, keep K 13345 and 29.00; K=V from scratch 21.28.
"""


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.command_line import add_tokenizer_flags
    from megatron_sharedproj.retrofit.surgery import MERGES
    from megatron_sharedproj.variants import KV_ROTARY

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    surgery = commands.add_parser("surgery", help="merge keys and values, and distil", epilog=EXAMPLE)
    surgery.add_argument(
        "--load", type=Path, required=True, metavar="DIR",
        help="a --save folder, one iter_NNNNNNN of it, or a Hugging Face directory (GPT-2 or Llama shapes)",
    )  # fmt: skip
    surgery.add_argument("--output", type=Path, required=True, metavar="DIR", help="checkpoint to write")
    surgery.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --output")
    surgery.add_argument(
        "--no-verify-integrity", action="store_true", help="do not compare --load with its manifest"
    )
    group = surgery.add_argument_group("surgery")
    group.add_argument("--merge", choices=MERGES, default="mean", help="what K=V starts from (default mean)")
    group.add_argument(
        "--num-query-groups", type=positive_int, default=0, metavar="N",
        help="key/value heads of the result (default: the source's); each is made of several",
    )  # fmt: skip
    group.add_argument(
        "--kv-rotary", choices=tuple(KV_ROTARY), default="",
        help="of a source with rotary positions: what they do to the shared tensor",
    )  # fmt: skip
    group.add_argument(
        "--rotary-percent", type=float, metavar="X",
        help="part of a head that stays rotated (partial, separate_rope_head; default: the source's)",
    )  # fmt: skip
    group = surgery.add_argument_group("calibration (least_squares)")
    group.add_argument("--calibration-data", default="", metavar="PREFIX", help="indexed data (no .bin)")
    group.add_argument(
        "--calibration-tokens",
        type=int,
        default=32768,
        metavar="N",
        help="its first N (default 32768; 0: all)",
    )
    group.add_argument(
        "--parallel-calibration", action="store_true",
        help="all layers on the source's activations, not each behind the layers already changed",
    )  # fmt: skip
    group.add_argument(
        "--key-weight", type=float, default=1.0, metavar="X", help="of keys' errors (default 1)"
    )
    group.add_argument(
        "--value-weight", type=float, default=1.0, metavar="X", help="of values' errors (default 1)"
    )
    group = surgery.add_argument_group("perplexity before and after (packed)")
    group.add_argument("--eval-data", default="", metavar="PREFIX", help="indexed data (without .bin)")
    group.add_argument("--eval-tokens", type=int, default=0, metavar="N", help="its first N (default: all)")
    group.add_argument(
        "--seq-length", type=int, default=0, metavar="N",
        help="tokens per row, here and in calibration (default: the run's)",
    )  # fmt: skip
    add_tokenizer_flags(surgery.add_argument_group("tokenizer (default: the source's)"))
    surgery.set_defaults(run=run_surgery, tokenizer_type=None)
    group = surgery.add_argument_group("distillation")
    group.add_argument(
        "--nproc-per-node",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes of torchrun (default 1)",
    )
    group.add_argument("train", nargs="*", metavar="FLAG", help="behind --: the trainer's flags, to run it")

    plot = commands.add_parser("plot", help="perplexity along distillation runs", epilog=EXAMPLE)
    plot.add_argument("runs", nargs="+", metavar="RUN", help="--save folder or log.jsonl of a distillation")
    plot.add_argument("--labels", metavar="A,B", help="one per RUN (default: the folder's name)")
    plot.add_argument("--teacher", metavar="RUN", help="a line at its last validation")
    plot.add_argument("--scratch", metavar="RUN", help="a line at that of a K=V model trained from scratch")
    plot.add_argument("--x", choices=("iteration", "consumed_tokens"), default="iteration")
    plot.add_argument("--output", type=Path, required=True, metavar="FILE", help="the PNG to write")
    plot.add_argument("--title", help="text above the plot")
    plot.set_defaults(run=run_plot)
    return parser


def run_surgery(args: argparse.Namespace) -> None:
    from megatron_sharedproj.retrofit.conversion import Options, retrofit, table
    from megatron_sharedproj.retrofit.launch import distillation_flags, shown, torchrun

    if distributed.world_size() > 1:
        raise ValueError(
            f"WORLD_SIZE {distributed.world_size()}: run this tool as one process; it starts torchrun itself"
        )
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    options = Options(
        load=args.load,
        output=args.output,
        merge=args.merge,
        num_query_groups=args.num_query_groups,
        kv_rotary=args.kv_rotary,
        rotary_percent=args.rotary_percent,
        calibration_data=args.calibration_data,
        calibration_tokens=args.calibration_tokens,
        sequential=not args.parallel_calibration,
        key_weight=args.key_weight,
        value_weight=args.value_weight,
        eval_data=args.eval_data,
        eval_tokens=args.eval_tokens,
        seq_length=args.seq_length,
        overwrite=args.overwrite,
        no_verify_integrity=args.no_verify_integrity,
        tokenizer={name: getattr(args, name) for name in names},
    )
    try:
        record = retrofit(options)
    except OSError as error:
        raise ValueError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"{record['origin']}\n\n{table(record)}\n\n{record['checkpoint']}")
    flags = distillation_flags(args.output, Path(record["teacher"]))
    command = torchrun([*flags, *args.train], args.nproc_per_node)
    if not args.train:
        print(
            "\nto distil (add data, batch, --train-iters, --lr and --save as for any training, "
            f"see --help of the trainer):\n{shown(command)}"
        )
        return
    print(f"\n{shown(command)}", flush=True)
    distributed.finalize()
    args.code = _run(command)


def _run(command: list[str]) -> int:
    import os
    import subprocess

    # A rank's variables of this process are not the new launch's.
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launch}
    root = str(Path(__file__).resolve().parents[1])  # a bare clone's
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), root]))
    return subprocess.run(command, env=environment).returncode


def run_plot(args: argparse.Namespace) -> None:
    from megatron_sharedproj.reporting.plots import load_run
    from megatron_sharedproj.reporting.retrofit_plot import plot_retrofit

    if args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise ValueError(f"--output {args.output}: must be a file name that ends in .png")
    labels = [part.strip() for part in args.labels.split(",")] if args.labels else _names(args.runs)
    if len(labels) != len(args.runs) or len(set(labels)) < len(labels) or "" in labels:
        raise ValueError(
            f"--labels {args.labels or ','.join(labels)}: give {len(args.runs)} distinct one(s), one per RUN"
        )
    runs = {label: load_run(run) for label, run in zip(labels, args.runs, strict=True)}
    levels = {
        title: load_run(run)
        for title, run in (("teacher", args.teacher), ("K=V from scratch", args.scratch))
        if run
    }
    plot_retrofit(runs, args.output, levels=levels, x=args.x, title=args.title)
    print(f"{args.output}: {len(runs)} run(s)")


def _names(runs: list[str]) -> list[str]:
    paths = [Path(run).resolve() for run in runs]
    return [path.parent.name if path.suffix == ".jsonl" else path.name for path in paths]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the flags or a damaged folder (one line), or the trainer's."""
    codes: list[int] = []

    def run(args: argparse.Namespace) -> None:
        args.run(args)
        codes.append(getattr(args, "code", 0))

    return run_distributed(build_parser(), run, argv) or (codes[0] if codes else 0)


if __name__ == "__main__":
    sys.exit(main())
