"""A checkpoint as a model that only runs forward, and its tokenizer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj import distributed
from megatron_sharedproj.checkpointing import files, resolve_checkpoint
from megatron_sharedproj.config import DataConfig, ParallelConfig, RunConfig
from megatron_sharedproj.data.tokenizers import build_tokenizer
from megatron_sharedproj.device import get_device


@dataclass
class LoadedModel:
    """A model in evaluation mode on this rank.

    Attributes:
        model: Megatron-Core GPTModel; config: the run that trained it; folder: its iteration folder.
        tokenizer: the run's, or the one that the flags named.
    """

    model: Any
    config: RunConfig
    tokenizer: Any
    folder: Path
    device: torch.device
    train_state: dict[str, Any]


def add_loading_args(parser: argparse.ArgumentParser, *, parallel: bool = True) -> None:
    """Flags of every tool that starts from a checkpoint.

    Args:
        parallel: False for a tool that works in one process and in float32.
    """
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--load", required=True, metavar="PATH", help="a --save folder, or one iter_NNNNNNN of it"
    )
    group.add_argument(
        "--no-verify-integrity",
        action="store_true",
        help="do not compare the checkpoint with the checksums in its manifest",
    )
    group.add_argument("--tokenizer-type", help="instead of the run's tokenizer")
    group.add_argument("--tokenizer-model", help="directory of the tokenizer, where it moved")
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file")
    if not parallel:
        parser.set_defaults(tensor_model_parallel_size=1, bf16=False)
        return
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, help="under torchrun (default 1)")
    group.add_argument("--bf16", action="store_true", help="run in bfloat16")


def load_model(args: argparse.Namespace, *, parallel_output: bool) -> LoadedModel:
    """Build and load the model that :func:`add_loading_args` named.

    Args:
        parallel_output: leave the logits split over the tensor-parallel ranks.
    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    verify = not getattr(args, "no_verify_integrity", False)
    folder = resolve_checkpoint(args.load, verify=verify)
    files.check_engine(folder, files.train_state(folder))
    config = files.checkpoint_config(folder)
    data: DataConfig = config.data
    tokenizer = build_tokenizer(
        args.tokenizer_type or data.tokenizer_type,
        args.tokenizer_model or data.tokenizer_model or None,
        args.vocab_file or data.vocab_file or None,
        args.merge_file or data.merge_file or None,
        data.vocab_size or None,
    )
    if tokenizer.vocab_size > config.model.padded_vocab_size:
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: {tokenizer.vocab_size} tokens, the model has "
            f"{config.model.padded_vocab_size}; give the tokenizer that it was trained with"
        )
    ranks, tp = distributed.world_size(), args.tensor_model_parallel_size
    if tp < 1 or ranks % tp or config.model.num_attention_heads % tp:
        raise ValueError(
            f"--tensor-model-parallel-size {tp}: must divide the {ranks} process(es) and the model's "
            f"{config.model.num_attention_heads} heads"
        )
    device = get_device()
    local = distributed.initialize(device, tensor_model_parallel_size=tp, seed=config.train.seed)

    from megatron_sharedproj.checkpointing.sharded import load_checkpoint
    from megatron_sharedproj.model import build_model

    # Both implementations save under the same names: what Transformer Engine trained runs without it.
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    model = build_model(config.model, parallel, parallel_output=parallel_output)
    state, _ = load_checkpoint(folder, device, model=model, verify=verify)
    if args.bf16:
        model = model.bfloat16()
        model.config.params_dtype = torch.bfloat16
    model = model.to(local).eval()
    return LoadedModel(model, config, tokenizer, folder, local, state)
