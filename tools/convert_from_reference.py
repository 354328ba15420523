#!/usr/bin/env python3
"""Turn a .pt file of the paper's released code into a checkpoint, and check its logits against the file."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj import distributed, formulas
from megatron_sharedproj.command_line import Parser, add_tokenizer_flags, run_distributed
from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.variants import VARIANTS

if TYPE_CHECKING:
    from megatron_sharedproj.conversion.released_checkpoints import Released

EXAMPLE = """example:
  python tools/convert_from_reference.py --load final_model.pt --save runs/released \\
    --tokenizer-model gpt2_tokenizer
  then: tools/evaluate.py, tools/generate.py and tools/convert_to_hf.py --load runs/released, or pretrain with
  --load runs/released --finetune --save runs/more and the flags of the same model.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument(
        "--load", type=Path, required=True, metavar="FILE", help="checkpoint_step_N.pt or final_model.pt"
    )
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an iteration that is there already")
    parser.add_argument(
        "--attention-variant", choices=tuple(VARIANTS), help="where names and shapes leave it open"
    )
    parser.add_argument(
        "--num-query-groups", type=int, metavar="N", help="key/value heads, where they are left open"
    )
    parser.add_argument("--no-check", action="store_true", help="do not compare logits with the file's")
    add_tokenizer_flags(
        parser.add_argument_group("tokenizer (recorded for later tools; the paper's is GPT-2's)")
    )
    return parser


def tokenizer_fields(args: argparse.Namespace, model: ModelConfig) -> dict[str, object]:
    """DataConfig's fields of the tokenizer.

    Raises:
        ValueError: if it cannot be loaded, or has more ids than the model has rows.
    """
    from megatron_sharedproj.data.tokenizers import build_tokenizer

    fields: dict[str, object] = {"tokenizer_type": args.tokenizer_type}
    if args.tokenizer_type == "NullTokenizer":
        return {**fields, "vocab_size": model.padded_vocab_size}
    files = {name: getattr(args, name) for name in ("tokenizer_model", "vocab_file", "merge_file")}
    if not any(files.values()):
        return fields
    tokenizer = build_tokenizer(args.tokenizer_type, *files.values())
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: {tokenizer.vocab_size} tokens, the model has "
            f"{model.padded_vocab_size} rows; give the tokenizer that it was trained with"
        )
    return {**fields, **{name: value for name, value in files.items() if value}}


def publish(folder: Path, save: Path) -> Path:
    """Move a complete iteration folder into ``save`` and name it latest; one of that name is replaced."""
    from megatron_sharedproj.checkpointing import files

    final, replaced = save / folder.name, save / f".{folder.name}.old"
    save.mkdir(exist_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(folder, final)
    files.write_tracker(save, int(folder.name.removeprefix("iter_")))
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.conversion.megatron_checkpoint import check_target
    from megatron_sharedproj.conversion.released_checkpoints import read_released

    if distributed.world_size() > 1:
        raise ValueError(
            f"WORLD_SIZE {distributed.world_size()}: run this tool as one process, without torchrun"
        )
    if args.num_query_groups is not None and args.num_query_groups < 1:
        raise ValueError(f"--num-query-groups {args.num_query_groups}: must be at least 1")
    check_target(args.save, args.overwrite)
    if not args.save.absolute().parent.is_dir():
        raise ValueError(f"--save {args.save}: {args.save.absolute().parent} is not a folder; make it first")
    found = read_released(args.load, variant=args.attention_variant, num_query_groups=args.num_query_groups)
    config = found.config
    fields = tokenizer_fields(args, config)
    held = sum(tensor.numel() for tensor in found.tensors.values())
    counted = formulas.parameters(config)["total"]
    if held != counted:
        raise ValueError(f"--load {args.load}: {held} parameters, the formulas say {counted}")
    modules = ", ".join(f"{name}: {' '.join(names)}" for name, names in found.layout.modules.items())
    print(f"{args.load}: {config.describe_attention()}")
    print(
        f"  read from {modules}; {config.num_query_groups} key/value head(s) for {config.num_attention_heads}"
    )
    print(f"  {config.num_layers} layers, hidden {config.hidden_size}, {config.padded_vocab_size} rows, "
          f"{config.max_position_embeddings} positions; {held} parameters, as the formulas say")  # fmt: skip
    seen = found.provenance.get("tokens_seen", "not recorded")
    print(f"  step {found.step}, tokens seen {seen} (the released code counts padding as tokens)")
    for note in found.notes:
        print(f"  note: {note}")
    if not fields.get("tokenizer_model") and not fields.get("vocab_file") and "vocab_size" not in fields:
        print(
            "  note: no tokenizer recorded; give later tools --tokenizer-model DIR (the paper's is GPT-2's)"
        )
    try:
        folder = convert(args, found, fields)
    except OSError as error:
        raise ValueError(f"--save {args.save}: {error}") from None
    print(f"{folder}: written; --load {args.save} takes it")


def convert(args: argparse.Namespace, found: Released, fields: dict[str, object]) -> Path:
    """Write aside, check, publish; nothing is left of a run that fails."""
    import torch

    from megatron_sharedproj.checkpointing import files, manifest
    from megatron_sharedproj.config import to_dict, write_json
    from megatron_sharedproj.conversion.megatron_checkpoint import imported_run, write_checkpoint
    from megatron_sharedproj.conversion.released_checkpoints import record_training
    from megatron_sharedproj.conversion.released_forward import BOUND, check_import
    from megatron_sharedproj.conversion.staging import scratch_folder

    with scratch_folder(args.save.resolve()) as scratch:
        aside = scratch / "new"
        run = imported_run(found.config, torch.float32, **fields)
        record_training(found, run)
        seen = found.provenance.get("tokens_seen", "an unrecorded number of")
        origin = f"{args.load.name} of the paper's code, step {found.step}, {seen} tokens with padding"
        provenance = {"imported_from": origin, "released": found.provenance}
        folder = write_checkpoint(aside, run, found.tensors, iteration=found.step, train_state=provenance)
        run.checkpoint.save = str(args.save)
        write_json(folder / files.RUN_CONFIG, to_dict(run))
        manifest.update_manifest(folder, files.RUN_CONFIG)
        if args.no_check:
            print("  not checked (--no-check)")
        else:
            check = check_import(found, folder)
            line = (
                f"largest difference {check.difference:.3g} over {check.logits} logits, {check.relative:.3g} "
                f"of the largest ({check.largest:.4g}); bound {BOUND:g}"
            )
            if not check.relative <= BOUND:
                raise ValueError(
                    f"--load {args.load}: the import computes something else than the file: {line}"
                )
            print(f"  checked in fp32 against a plain forward pass on the file's own tensors: {line}")
        return publish(folder, args.save)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags or the file (one line on stderr)."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
