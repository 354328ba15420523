#!/usr/bin/env python3
"""Train variants on the same data in the same order, several seeds each, and evaluate them alike.

Models are VARIANT or VARIANT:GROUPS, where GROUPS is the number of key/value heads: qk_eq_v:1 is Q-MQA.
Those of --models have one shape (iso-architecture); those of --matched have their MLP widened until they have
as many parameters as qkv (iso-parameter). The default is a GPT-2 of 1 M parameters on State of the Union
speeches, 2 minutes a run on a CPU core; flags of the trainer after -- win over it, at
any size.

Interrupted, the same command goes on; more seeds or models join what is there. tools/report.py reports on it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, list_of, positive_int, print_error
from megatron_sharedproj.config import DATA_PROTOCOLS
from megatron_sharedproj.experiments.comparison import Comparison, Model, parse_model
from megatron_sharedproj.experiments.jobs import run_jobs
from megatron_sharedproj.experiments.places import places_for_runs

EXAMPLE = """
examples:
  python tools/compare_variants.py --folder comparison
  python tools/compare_variants.py --folder comparison --models qkv,qk_eq_v --matched qk_eq_v --seeds 5
  python tools/compare_variants.py --folder larger --train-data-path data/c4_train_text_document \\
    --valid-data-path data/c4_validation_text_document --tokenizer-model data/tokenizer \\
    --processes 8 --at-once 1 --steps 5000 -- --num-layers 12 --hidden-size 768 --num-attention-heads 12 \\
    --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 256 --bf16
"""
MODELS = "qkv,q_eq_k,qk_eq_v,q_eq_k_eq_v,qkv:2,qkv:1,qk_eq_v:2,qk_eq_v:1"
MATCHED = "q_eq_k,qk_eq_v,q_eq_k_eq_v,qk_eq_v:2,qk_eq_v:1"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--folder", type=Path, required=True, help="of data, runs and records")
    parser.add_argument(
        "--models", type=list_of(str), default=MODELS, help=f"of one shape (default {MODELS})"
    )
    parser.add_argument(
        "--matched",
        type=list_of(str),
        default=MATCHED,
        help=f"with qkv's parameters, or none (default {MATCHED})",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, help="how many (default 3)")
    parser.add_argument("--first-seed", type=positive_int, default=1234, help="default 1234")
    parser.add_argument("--steps", type=positive_int, default=400, help="optimizer steps (default 400)")
    parser.add_argument(
        "--data-protocol", choices=DATA_PROTOCOLS, default="packed", help="of training (default packed)"
    )
    parser.add_argument(
        "--documents",
        choices=("speeches", "paragraphs"),
        default="speeches",
        help="of the default text; paragraphs are shorter than a row, for the padded protocol",
    )
    parser.add_argument("--processes", type=positive_int, default=1, help="of each run (default 1)")
    parser.add_argument(
        "--at-once",
        type=positive_int,
        default=0,
        help="runs at a time (default: as many as GPUs, or cores, hold)",
    )
    parser.add_argument("--title", default="", help="of the report")
    data = parser.add_argument_group("other data than the speeches; all three")
    data.add_argument("--train-data-path", metavar="PREFIX", help="indexed data")
    data.add_argument("--valid-data-path", metavar="PREFIX", help="indexed data")
    data.add_argument("--tokenizer-model", metavar="DIR", help="tokenizer directory")
    parser.add_argument("trainer_flags", nargs="*", metavar="-- TRAINER FLAGS", help="win over the default's")
    return parser


def models_of(args: argparse.Namespace) -> list[Model]:
    """The models of --models, then those of --matched. Raises ValueError, naming the flag."""
    models = []
    for flag, names in (("--models", args.models), ("--matched", args.matched)):
        for name in names:
            if flag == "--matched" and name == "none":
                continue
            try:
                models.append(parse_model(name, matched=flag == "--matched"))
            except ValueError as error:
                raise ValueError(f"{flag} {name}: {error}") from None
    return models


def comparison_of(args: argparse.Namespace) -> Comparison:
    """What the flags describe. Raises ValueError, naming the flag, the value and the remedy."""
    names = ("train_data_path", "valid_data_path", "tokenizer_model")
    given = [name for name in names if getattr(args, name)]
    if given and len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise ValueError(f"--{missing.replace('_', '-')}: needed beside --{given[0].replace('_', '-')}")
    data: list[str] = []
    for name in given:
        path = Path(getattr(args, name)).absolute()
        there = path.exists() if name == "tokenizer_model" else path.with_name(f"{path.name}.idx").exists()
        if not there:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: not found")
        data += [f"--{name.replace('_', '-')}", str(path)]
    if 16 % args.processes and "--global-batch-size" not in args.trainer_flags:
        raise ValueError(
            f"--processes {args.processes}: must divide the batch of 16, or give --global-batch-size"
        )
    return Comparison(
        folder=args.folder.absolute(),
        models=models_of(args),
        seeds=range(args.first_seed, args.first_seed + args.seeds),
        steps=args.steps,
        processes=args.processes,
        protocol=args.data_protocol,
        documents=args.documents,
        title=args.title,
        own_data=data,
        extra_flags=args.trainer_flags,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake or a failed run, 130 after Ctrl-C (the same command goes on)."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    try:
        comparison, places = comparison_of(args), places_for_runs(args.processes, args.at_once)
        comparison.write_manifest(["python", "tools/compare_variants.py", *map(shlex.quote, words)])
        run_jobs(comparison.jobs(), args.folder, places=places)
    except ValueError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt as interrupt:
        print_error(f"interrupted; {interrupt}")
        return 130
    print(f"report: python tools/report.py {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
