#!/usr/bin/env python3
"""Export a checkpoint for Hugging Face: safetensors, code, tokenizer, model card; verified against the model.

The folder loads with AutoModelForCausalLM (trust_remote_code=True, or `import megatron_sharedproj.layers.hf`
where this package is installed), in lm-eval, and in vLLM. A tied key/value is one tensor there, too.
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
from megatron_sharedproj.command_line import Parser, run_distributed
from megatron_sharedproj.inference.loading import add_loading_args, load_model
from megatron_sharedproj.variants import CACHE_POLICIES

EXAMPLE = """examples:
  python tools/convert_to_hf.py --load runs/300m/qk_eq_v --output exported
  python tools/convert_to_hf.py --load runs/300m/qk_eq_v --output exported_gpt2 --format gpt2
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    add_loading_args(parser, parallel=False)
    group = parser.add_argument_group("export")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    group.add_argument(
        "--format",
        choices=("sharedproj", "gpt2", "llama", "gguf"),
        default="sharedproj",
        help="sharedproj: half the cache (default); gpt2, llama: stock architectures, the tied tensor "
        "written twice, for engines that know no K=V; gguf: the same for llama.cpp",
    )
    group.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="",
        help="of the weights (default: the training's)",
    )
    group.add_argument(
        "--kv-cache-policy",
        choices=CACHE_POLICIES,
        default=CACHE_POLICIES[0],
        help="of a model with --kv-rotary rotate_keys, for config.json: one tensor, rotated at every step, "
        "or two (default rotate_at_read)",
    )
    group.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default 5GB)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the export that the folder holds")
    group = parser.add_argument_group("verification")
    group.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the export with the model"
    )
    group.add_argument("--verify", dest="verify", action="store_true", help=argparse.SUPPRESS)
    group.add_argument(
        "--verify-data",
        default="",
        metavar="PATH",
        help="text file or indexed data to compare on (default: the run's validation data, else a text that "
        "comes with the package)",
    )
    group.add_argument("--verify-tokens", type=int, default=2048, metavar="N", help="about so many (2048)")
    group.add_argument(
        "--verify-tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="bound on the difference of fp32 logits, relative to the largest (default 1e-5)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    from megatron_sharedproj.conversion.export import ExportOptions, check_options, export

    options = ExportOptions(
        output=args.output,
        format=args.format,
        dtype=args.dtype,
        kv_cache_policy=args.kv_cache_policy,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        verify=args.verify,
        verify_data=args.verify_data,
        verify_tokens=args.verify_tokens,
        tolerance=args.verify_tolerance,
        tokenizer_source=args.tokenizer_model or args.vocab_file or "",
        load=args.load,
    )
    if distributed.world_size() > 1:
        raise ValueError(
            f"WORLD_SIZE {distributed.world_size()}: run this tool as one process, without torchrun"
        )
    check_options(options)
    loaded = load_model(args, parallel_output=False)
    if not args.tokenizer_model and not args.vocab_file:
        options.tokenizer_source = loaded.config.data.tokenizer_model
    export(loaded, options)
    print(f"{args.output}: {loaded.config.model.attention_variant}, format {args.format}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags or a failed verification (one line on stderr)."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
