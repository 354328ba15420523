"""The trainer's command line that distils a retrofitted checkpoint from its source."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from megatron_sharedproj.checkpointing import files, resolve_checkpoint
from megatron_sharedproj.config import ModelConfig, RunConfig


def model_flags(model: ModelConfig) -> list[str]:
    """The flags of arguments.py that describe a model."""
    values: dict[str, object] = {
        "attention-variant": model.attention_variant,
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.ffn_hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "kv-channels": model.kv_channels,
        "max-position-embeddings": model.max_position_embeddings,
        "position-embedding-type": model.position_embedding_type,
        "normalization": model.normalization,
        "norm-epsilon": model.layernorm_epsilon,
        "attention-dropout": model.attention_dropout,
        "hidden-dropout": model.hidden_dropout,
        # The padded vocabulary is a multiple of itself, whatever its tokenizer has.
        "make-vocab-size-divisible-by": model.padded_vocab_size,
        "swiglu": model.activation == "swiglu",
        "no-bias-gelu-fusion": model.activation == "gelu",
        "disable-bias-linear": not model.add_bias_linear,
        "untie-embeddings-and-output-weights": model.untie_embeddings_and_output_weights,
        "qk-layernorm": model.qk_layernorm,
        "no-scaled-init": not model.scaled_init,
    }
    if model.num_query_groups != model.num_attention_heads:
        values |= {"group-query-attention": True, "num-query-groups": model.num_query_groups}
    if model.position_embedding_type == "rope":
        values |= {"rotary-base": model.rotary_base, "rotary-percent": model.rotary_percent}
        values["kv-rotary"] = model.kv_rotary if model.variant.tied_kv else False
    flags: list[str] = []
    for name, value in values.items():
        if value is not False:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def run_flags(run: RunConfig) -> list[str]:
    """Model, sequence length, precision and tokenizer of a checkpoint, which a training on it keeps."""
    flags = [*model_flags(run.model), "--seq-length", str(run.train.seq_length)]
    flags += [f"--{name}" for name in ("bf16", "fp16") if getattr(run.train, name)]
    flags += ["--tokenizer-type", run.data.tokenizer_type]
    for name in ("tokenizer_model", "vocab_file", "merge_file", "vocab_size"):
        if value := getattr(run.data, name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def distillation_flags(start: Path, teacher: Path) -> list[str]:
    """The trainer's flags that go on from a retrofitted checkpoint with its source as the teacher."""
    run = files.checkpoint_config(resolve_checkpoint(start))
    return [*run_flags(run), "--load", str(start), "--finetune", "--distill-teacher", str(teacher)]


def torchrun(flags: list[str], processes: int) -> list[str]:
    """The command that trains with those flags on this machine."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launch, "-m", "megatron_sharedproj.pretrain", *flags]


def shown(command: list[str]) -> str:
    """A torchrun command for people: one that a shell takes."""
    words = ["torchrun", *command[3:]] if command[1:3] == ["-m", "torch.distributed.run"] else command
    return shlex.join(words)
