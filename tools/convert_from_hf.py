#!/usr/bin/env python3
"""Import a Hugging Face folder as a Megatron checkpoint: our exports (bit for bit), GPT-2 or Llama shapes.

The checkpoint trains on with `python -m megatron_sharedproj.pretrain --load DIR --finetune`, and the tools
evaluate it and generate with it. Only safetensors are read, never pickled weights.
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
from megatron_sharedproj.command_line import Parser, add_tokenizer_flags, run_distributed

EXAMPLE = """examples:
  python tools/convert_from_hf.py --load exported --save runs/again
  python tools/convert_from_hf.py --load gpt2 --save runs/gpt2
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder with config.json")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --save")
    add_tokenizer_flags(parser.add_argument_group("tokenizer (default: the folder's)"))
    return parser


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.conversion.hf_import import import_folder, tokenizer_fields
    from megatron_sharedproj.conversion.weight_files import read_config

    if distributed.world_size() > 1:
        raise ValueError(
            f"WORLD_SIZE {distributed.world_size()}: run this tool as one process, without torchrun"
        )
    read_config(args.load)
    given = {
        name: getattr(args, name)
        for name in ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    }
    fields = tokenizer_fields(args.load, given)
    try:
        print(import_folder(args.load, args.save, tokenizer=fields, overwrite=args.overwrite))
    except OSError as error:
        raise ValueError(f"--save {args.save}: cannot be written ({error})") from None


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags or a damaged folder (one line on stderr)."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
