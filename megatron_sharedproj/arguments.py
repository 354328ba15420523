"""Command line of the trainer: Megatron-LM's flags, ours beside them, and every check before step 0.

Flags fill the dataclasses of ``config.py`` by name. A flag that Megatron-LM has keeps its name and
meaning; those that it does not have are added by :func:`add_sharedproj_args`, which is in the form of
Megatron-LM's ``extra_args_provider``.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from megatron_sharedproj.command_line import Parser
from megatron_sharedproj.config import (
    DATA_PROTOCOLS,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    LogConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_sharedproj.data.tokenizers import padded_vocab_size
from megatron_sharedproj.layout import resolve_layout
from megatron_sharedproj.matching import match_parameters
from megatron_sharedproj.variants import VARIANTS, get_variant

_EXAMPLE = """examples:
  one process, K=V:
    torchrun --nproc-per-node 1 -m megatron_sharedproj.pretrain --attention-variant qk_eq_v \\
      --num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 \\
      --max-position-embeddings 256 --micro-batch-size 8 --global-batch-size 32 --train-iters 500 \\
      --lr 1e-3 --min-lr 1e-4 --data-path data/train_text_document --tokenizer-model data/tokenizer \\
      --save runs/k_eq_v
  shared heads too (Q-MQA): add  --group-query-attention --num-query-groups 1
  two tensor-parallel ranks: --nproc-per-node 2 and --tensor-model-parallel-size 2
"""

# Group title -> (configuration class, {field: help}). Defaults and types come from the field.
_TABLE: dict[str, tuple[type, dict[str, str]]] = {
    "network size": (
        ModelConfig,
        {
            "num_layers": "transformer layers",
            "hidden_size": "hidden size d",
            "ffn_hidden_size": "MLP width (default 4 * hidden size; 8/3 of it with --swiglu)",
            "num_attention_heads": "query heads",
            "kv_channels": "head size (default hidden size / heads)",
            "max_position_embeddings": "positions of the learned embedding",
            "position_embedding_type": "learned_absolute (the paper), rope (tied K and V: with --kv-rotary) "
            "or none",
            "rotary_base": "base of the rotary frequencies",
            "rotary_percent": "fraction of the head that is rotated",
            "kv_rotary": "what rotary positions do to a tied key/value: rotate_keys, rotate_values, partial "
            "or separate_rope_head",
            "normalization": "LayerNorm or RMSNorm",
            "untie_embeddings_and_output_weights": "a separate output matrix",
            "qk_layernorm": "norm on queries and keys, before they are rotated; a tied value is the normed "
            "key",
        },
    ),
    "regularization and initialization": (
        ModelConfig,
        {
            "attention_dropout": "dropout on attention weights (the paper: 0)",
            "hidden_dropout": "dropout on the residual branches and embeddings",
            "init_method_std": "standard deviation of the initial weights",
        },
    ),
    "parallelism": (
        ParallelConfig,
        {
            "tensor_model_parallel_size": "ranks that share a layer's weights",
            "pipeline_model_parallel_size": "stages that the layers are divided into",
            "num_virtual_stages_per_pipeline_rank": "chunks of a stage; above 1: interleaved schedule",
            "context_parallel_size": "ranks that share a sequence",
            "sequence_parallel": "split norms and residuals over the tensor-parallel ranks as well",
            "recompute_granularity": "what backward computes again: selective (core attention), full",
            "recompute_method": "with full: uniform (units of layers) or block (the first layers of a stage)",
            "recompute_num_layers": "layers in a unit (uniform), or layers per stage (block)",
            "use_distributed_optimizer": "shard optimizer state over data-parallel ranks (GPU)",
            "overlap_grad_reduce": "reduce gradients while backward runs",
            "overlap_param_gather": "gather parameters while forward runs (with the distributed optimizer)",
            "grad_reduce_in_bf16": "reduce gradients in bf16 instead of fp32 (with --bf16)",
            "cross_entropy_loss_fusion": "Megatron's fused cross-entropy (GPU)",
            "distributed_backend": "nccl or gloo (default: nccl on GPUs, gloo on CPUs)",
            "distributed_timeout_minutes": "minutes before a stuck collective is an error",
            "transformer_impl": "local, or transformer_engine where it is installed",
        },
    ),
    "training": (
        TrainConfig,
        {
            "seq_length": "tokens in a sequence",
            "micro_batch_size": "sequences per forward pass and rank",
            "global_batch_size": "sequences per step (default micro batch x data-parallel ranks)",
            "rampup_batch_size": "begin with a global batch of START and raise it by INCREMENT at even "
            "distances over the first SEQUENCES (with --train-samples)",
            "train_iters": "steps",
            "eval_interval": "steps between validations",
            "eval_iters": "global batches per validation; 0: none",
            "seed": "seed of weights, dropout and data order",
            "bf16": "bfloat16 with fp32 master weights (GPU)",
            "fp16": "float16 with loss scaling (GPU)",
            "deterministic_mode": "bitwise repeatable kernels and collectives, usually slower",
            "manual_gc": "no automatic garbage collection: ranks would pause at different times",
            "manual_gc_interval": "collect every so many steps with --manual-gc; 0: never",
            "exit_interval": "save and exit when the step is a multiple of this",
            "exit_duration_in_mins": "save and exit after this many minutes",
            "max_nan_iterations": "stop after so many steps in a row whose loss or gradient is NaN or "
            "infinite; until then they are skipped",
        },
    ),
    "optimizer and schedule": (
        TrainConfig,
        {
            "lr": "peak learning rate",
            "min_lr": "final learning rate",
            "decoupled_lr": "peak learning rate of embedding and output layer, where it differs",
            "decoupled_min_lr": "its final value",
            "lr_decay_style": "constant, linear, cosine or inverse-square-root",
            "lr_warmup_iters": "steps of linear warm-up",
            "lr_warmup_fraction": "warm-up as a fraction of the decay steps",
            "lr_decay_iters": "steps to the final learning rate (default: all)",
            "weight_decay": "AdamW weight decay",
            "adam_beta1": "AdamW beta 1",
            "adam_beta2": "AdamW beta 2",
            "adam_eps": "AdamW epsilon",
            "clip_grad": "gradient-norm clipping; 0: none",
        },
    ),
    "data and tokenizer": (
        DataConfig,
        {
            "data_path": "indexed data prefix, or WEIGHT PREFIX pairs to blend; divided by --split",
            "train_data_path": "like --data-path, for training only",
            "valid_data_path": "like --data-path, for validation only",
            "test_data_path": "like --data-path, evaluated once when training is done",
            "split": "shares of --data-path for training, validation and test",
            "data_protocol": "packed: documents back to back, all tokens real; padded: the paper's, a "
            "document per row, cut, or filled with end-of-document tokens, which are scored (and counted in "
            "tokens/s and consumed tokens)",
            "reset_position_ids": "positions start anew after each end-of-document token",
            "reset_attention_mask": "no attention across an end-of-document token",
            "eod_mask_loss": "no loss where the input is the end-of-document token",
            "mock_data": "Megatron's synthetic data instead of --data-path, for timing",
            "no_mmap_bin_files": "read .bin files instead of mapping them",
            "data_cache_path": "folder for index caches (default: beside the data)",
            "tokenizer_type": "HuggingFaceTokenizer, GPT2BPETokenizer or NullTokenizer",
            "tokenizer_model": "tokenizer directory (or tokenizer.json)",
            "vocab_file": "GPT-2 encoder.json / vocab.json",
            "merge_file": "GPT-2 vocab.bpe / merges.txt",
            "vocab_size": "vocabulary size, for NullTokenizer",
            "num_workers": "data loader processes per rank; 0: in the training process",
        },
    ),
    "checkpoints": (
        CheckpointConfig,
        {
            "save": "folder for checkpoints (iter_NNNNNNN), configuration and logs",
            "load": "folder to resume from; a --save folder that has a checkpoint is resumed by itself",
            "save_interval": "steps between checkpoints",
            "async_save": "copy the state to host memory and write it while training goes on",
            "save_retain_interval": "keep checkpoints of every Nth step; delete the others but the last",
            "most_recent_k": "keep the last N checkpoints (and --save-retain-interval's); delete the others; "
            "-1: all",
            "load_fallback": "where the checkpoint is damaged, go on from the newest that is whole",
            "no_verify_integrity": "do not compare a checkpoint with its manifest before loading",
            "override_data_fingerprint": "resume although the training data are others than the checkpoint's",
            "finetune": "take the weights only: step, data position, optimizer and RNG start anew",
            "no_load_optim": "do not load optimizer state",
            "no_load_rng": "do not load RNG state",
            "no_save_optim": "do not save optimizer state",
        },
    ),
    "distillation": (
        DistillConfig,
        {
            "distill_teacher": "checkpoint of a trained model with this run's vocabulary, any variant: the "
            "loss is (1 - alpha) CE + alpha T^2 KL(teacher || student)",
            "distill_temperature": "T, that both models' logits are divided by in the KL",
            "distill_alpha": "weight of the teacher against the data, from 0 to 1",
        },
    ),
    "logging": (
        LogConfig,
        {
            "log_interval": "steps between log lines",
            "tensorboard_dir": "write TensorBoard events here",
            "wandb_project": "log to this Weights & Biases project",
            "wandb_exp_name": "its run name",
            "wandb_save_dir": "where it keeps its files",
            "log_throughput": "print TFLOP/s per rank (and MFU where the GPU's peak is known)",
            "log_grad_norm_per_group": "gradient norms of embedding, attention, MLP, norms and output layer",
            "log_params_norm": "norm of the parameters",
            "log_num_zeros_in_grad": "zeros in the gradient",
            "log_memory_to_tensorboard": "allocated and reserved memory of the logging rank",
        },
    ),
}

# Megatron-LM flags that name what this trainer always does: accepted, so that command lines carry over.
_ALWAYS_SO = (
    "use-mcore-models",
    "use-cpu-initialization",
    "no-gradient-accumulation-fusion",
    "no-masked-softmax-fusion",
    "no-persist-layer-norm",
    "no-rope-fusion",
    "no-create-attention-mask-in-dataloader",
    # Packed sequences have no padding: the mean over micro batches is the mean over tokens.
    "calculate-per-token-loss",
    "override-opt_param-scheduler",
    "exit-signal-handler",
    "log-validation-ppl-to-tensorboard",
)


_DERIVED = ("width_before_match",)  # fields that no flag sets
_BY_SAMPLES = ("train", "lr_decay", "lr_warmup")


def _field_type(annotation: str) -> Any:
    return {"int": int, "float": float, "str": str, "float | None": float}[annotation]


def build_parser() -> argparse.ArgumentParser:
    """The trainer's argument parser."""
    parser = Parser(
        prog="python -m megatron_sharedproj.pretrain",
        usage="torchrun --nproc-per-node N -m megatron_sharedproj.pretrain [flags]",
        description="Train a GPT whose attention shares projections, with Megatron-Core.",
        epilog=_EXAMPLE,
    )
    add_sharedproj_args(parser)
    for title, (cls, fields) in _TABLE.items():
        group = parser.add_argument_group(title)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name, text in fields.items():
            spec = known[name]
            flag = "--" + name.replace("_", "-")
            annotation = str(spec.type)
            if annotation == "bool":
                group.add_argument(flag, action="store_true", help=text)
            elif annotation == "list[int]":
                names = ("START", "INCREMENT", "SEQUENCES")
                group.add_argument(flag, nargs=3, type=int, default=[], metavar=names, help=text)
            elif annotation == "list[str]":
                group.add_argument(flag, nargs="*", default=[], metavar="PATH", help=text)
            else:
                default = None if spec.default is dataclasses.MISSING else spec.default
                shown = "" if default in (None, "", 0) else f" (default {default})"
                kind = _field_type(annotation)
                metavar = {int: "N", float: "X", str: "NAME"}[kind]
                group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text + shown)
        if title == "network size":
            _add_network_switches(group)
        if title == "optimizer and schedule":
            for name in _BY_SAMPLES:
                flag = f"--{name.replace('_', '-')}-samples"
                group.add_argument(flag, type=int, help=f"{name}_iters in sequences".replace("_", "-"))
        if title == "data and tokenizer":
            group.add_argument(
                "--data-args-path", default="", metavar="FILE", help="a file that holds --data-path's words"
            )
        if title == "parallelism":
            group.add_argument(
                "--num-layers-per-virtual-pipeline-stage",
                type=int,
                metavar="N",
                help="instead of --num-virtual-stages-per-pipeline-rank: layers in a chunk",
            )
            group.add_argument(
                "--recompute-activations",
                action="store_true",
                help="the same as --recompute-granularity selective",
            )
    parser.add_argument(
        "--check-only",
        action="store_true",
        help="check flags, files and checkpoint as a start would, then exit (WORLD_SIZE: processes)",
    )
    _add_simulation(parser.add_argument_group("dry run"))
    fixed = parser.add_argument_group("accepted from Megatron-LM, always so here")
    for flag in _ALWAYS_SO:
        fixed.add_argument(f"--{flag}", action="store_true", help=argparse.SUPPRESS)
    fixed.add_argument("--attention-backend", choices=["auto"], default="auto", help=argparse.SUPPRESS)
    fixed.add_argument(
        "--ckpt-format", choices=["torch_dist"], default="torch_dist", help="always torch_dist"
    )
    return parser


def _add_network_switches(group: Any) -> None:
    group.add_argument("--group-query-attention", action="store_true", help="use --num-query-groups")
    group.add_argument("--num-query-groups", type=int, help="key/value heads (default 1: MQA)")
    group.add_argument("--swiglu", action="store_true", help="gated SiLU MLP instead of GELU")
    group.add_argument(
        "--no-bias-gelu-fusion",
        action="store_true",
        help="exact GELU (the paper); without it, as in Megatron-LM, its tanh approximation",
    )
    group.add_argument("--disable-bias-linear", action="store_true", help="no biases in linear layers")
    group.add_argument("--norm-epsilon", type=float, default=1e-5, help="epsilon of the norms (default 1e-5)")
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="pad the vocabulary to a multiple, the same at any tensor-parallel size (default 128)",
    )


def _add_simulation(group: Any) -> None:
    group.add_argument(
        "--simulate-world-size",
        type=int,
        metavar="N",
        help="train nothing: build a rank's shard of a run on N GPUs without memory, and print its "
        "parameters, memory and communication (no torchrun, no data; --vocab-size replaces a tokenizer)",
    )
    group.add_argument(
        "--simulate-gpu", default="A100-40GB", metavar="NAME", help="the GPU (default A100-40GB)"
    )
    group.add_argument(
        "--simulate-mfu",
        type=float,
        default=0.4,
        metavar="X",
        help="model FLOP/s over the GPU's peak that hours are printed for: an assumption (default 0.4)",
    )
    group.add_argument(
        "--simulate-output",
        metavar="FILE",
        help="write the figures here (.json, .csv, .md)",
    )


def add_sharedproj_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that Megatron-LM does not have (its ``extra_args_provider`` form)."""
    group = parser.add_argument_group("shared projections")
    names = "; ".join(f"{v.name}: {v.formula}, paper {v.paper_name}" for v in VARIANTS.values())
    group.add_argument(
        "--attention-variant",
        default="qkv",
        metavar="{" + ",".join(VARIANTS) + "}",
        help=f"which projections exist ({names}); default qkv",
    )
    group.add_argument(
        "--no-scaled-init",
        action="store_true",
        help="output projections are initialised like all others (the paper), without 1/sqrt(2 * layers)",
    )
    group.add_argument(
        "--weight-decay-on-all",
        action="store_true",
        help="decay every parameter (the paper); without it biases and norms are not decayed (Megatron-LM)",
    )
    group.add_argument(
        "--match-parameters-of",
        default="",
        metavar="VARIANT",
        help="widen the MLP until the model has as many parameters (to 0.1%%) as this variant of it with a "
        "key/value head for each head: qkv for a comparison at equal parameters",
    )
    group.add_argument(
        "--require-kernel", action="store_true", help="refuse to run without the compiled attention kernel"
    )
    return parser


def model_config(args: argparse.Namespace, vocab_size: int) -> ModelConfig:
    """The ModelConfig of parsed flags.

    Args:
        vocab_size: the tokenizer's; padded here.
    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    if args.make_vocab_size_divisible_by < 1:
        raise ValueError(
            f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by}: must be at least 1"
        )
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"):
        if not getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: required")
    fields = {
        name: getattr(args, name) for cls, table in _TABLE.values() if cls is ModelConfig for name in table
    }
    groups = 1 if args.num_query_groups is None else args.num_query_groups
    if args.group_query_attention and groups < 1:
        raise ValueError(f"--num-query-groups {groups}: must be at least 1")
    if args.num_query_groups is not None and not args.group_query_attention:
        # Megatron-LM ignores it then; here it would be another model than the one asked for.
        raise ValueError(f"--num-query-groups {groups}: needs --group-query-attention; add it, or drop this")
    activation = "swiglu" if args.swiglu else ("gelu" if args.no_bias_gelu_fusion else "gelu_tanh")
    if args.swiglu and not fields["ffn_hidden_size"]:
        # Megatron-LM's rule: as many parameters as an ungated MLP of width 4d.
        fields["ffn_hidden_size"] = int(4 * args.hidden_size * 2 / 3) // 64 * 64 or 64
    return ModelConfig(
        **fields,
        attention_variant=get_variant(args.attention_variant).name,
        num_query_groups=groups if args.group_query_attention else 0,
        padded_vocab_size=padded_vocab_size(vocab_size, args.make_vocab_size_divisible_by),
        activation=activation,
        add_bias_linear=not args.disable_bias_linear,
        layernorm_epsilon=args.norm_epsilon,
        scaled_init=not args.no_scaled_init,
    )


def run_config(args: argparse.Namespace, vocab_size: int, world_size: int) -> RunConfig:
    """The RunConfig of parsed flags, with derived defaults resolved and checked.

    Args:
        vocab_size: the tokenizer's vocabulary size.
        world_size: number of processes.
    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    parts: dict[type, Any] = {}
    hints = {
        cls: {f.name for f in dataclasses.fields(cls)} for cls in typing.get_type_hints(RunConfig).values()
    }
    for cls, names in hints.items():
        if cls is not ModelConfig:
            parts[cls] = cls(**{name: getattr(args, name) for name in names if name not in _DERIVED})
    model, baseline = model_config(args, vocab_size), args.match_parameters_of
    if baseline:
        parts[TrainConfig].width_before_match = model.ffn_hidden_size
        ranks = max(1, args.tensor_model_parallel_size)
        model = match_parameters(model, baseline, multiple_of=ranks)
    config = RunConfig(
        model=model,
        parallel=parts[ParallelConfig],
        train=parts[TrainConfig],
        data=parts[DataConfig],
        checkpoint=parts[CheckpointConfig],
        distill=parts[DistillConfig],
        log=parts[LogConfig],
    )
    if args.data_args_path:
        config.data.data_path = _read_blend(args.data_args_path, config.data)
    _check_data(config, per_token_loss=args.calculate_per_token_loss)
    resolve_layout(config, args.num_layers_per_virtual_pipeline_stage, args.recompute_activations)
    _resolve(config, world_size, {name: getattr(args, f"{name}_samples") for name in _BY_SAMPLES})
    return config


def _read_blend(path: str, data: DataConfig) -> list[str]:
    """The words of a blend file, as Megatron-LM reads it; the saved configuration holds them as data_path."""
    from megatron_sharedproj.data.datasets import blend_prefixes

    flag = f"--data-args-path {path}"
    if data.data_path:
        raise ValueError(f"{flag}: --data-path is given too; give one")
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{flag}: cannot be read ({reason}); give a file of WEIGHT PREFIX words") from None
    if not words:
        raise ValueError(f"{flag}: is empty; write WEIGHT PREFIX words into it, as for --data-path")
    blend_prefixes(words, f"{flag}:")  # here, so that a mistake is reported under the flag that was given
    return words


def _check_data(config: RunConfig, *, per_token_loss: bool) -> None:
    """Check the flags that say how documents become rows. Raises ValueError."""
    data, position = config.data, config.model.position_embedding_type
    if data.data_protocol not in DATA_PROTOCOLS:
        raise ValueError(f"--data-protocol {data.data_protocol}: choose {' or '.join(DATA_PROTOCOLS)}")
    resets = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    given = ["--" + name.replace("_", "-") for name in resets if getattr(data, name)]
    if data.data_protocol == "padded":
        if given:
            raise ValueError(
                f"{given[0]}: with --data-protocol padded a row is one document, and its filling is scored; "
                "drop the flag, or use packed"
            )
        if data.mock_data:
            raise ValueError("--mock-data: not with --data-protocol padded; drop it, or use packed")
    if data.reset_position_ids and position != "learned_absolute" and not data.reset_attention_mask:
        raise ValueError(
            f"--reset-position-ids: does nothing with --position-embedding-type {position}, which has no "
            "position ids to restart; add --reset-attention-mask, or drop it"
        )
    if data.eod_mask_loss and per_token_loss:
        raise ValueError(
            "--calculate-per-token-loss: with --eod-mask-loss micro batches score different numbers of "
            "tokens, and each is averaged by itself here (Megatron-LM without the flag); drop one of the two"
        )


def _set_by_samples(train: TrainConfig, name: str, count: int) -> None:
    flag = f"--{name.replace('_', '-')}-samples {count}"
    if getattr(train, f"{name}_iters"):
        raise ValueError(f"{flag}: --{name.replace('_', '-')}-iters is given too; give one")
    if count < 0 or (count < train.global_batch_size and name != "lr_warmup"):
        raise ValueError(f"{flag}: less than one --global-batch-size of {train.global_batch_size}")
    # As in Megatron-LM: whole global batches.
    setattr(train, f"{name}_iters", train.steps_within(count))


def _resolve(config: RunConfig, world_size: int, samples: dict[str, int | None]) -> None:
    from megatron_sharedproj.validation import check_parallel, check_rampup, check_train

    train = config.train
    data_parallel = check_parallel(config, world_size)
    if train.micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {train.micro_batch_size}: must be at least 1")
    if not train.global_batch_size:
        train.global_batch_size = train.micro_batch_size * data_parallel
    if train.rampup_batch_size:
        check_rampup(train, config.parallel, data_parallel, samples["train"])
    for name, count in samples.items():
        if count is not None:
            _set_by_samples(train, name, count)
    train.lr_decay_iters = train.lr_decay_iters or train.train_iters
    if train.lr_warmup_fraction is not None:
        if train.lr_warmup_iters:
            raise ValueError(
                f"--lr-warmup-fraction {train.lr_warmup_fraction}: --lr-warmup-iters {train.lr_warmup_iters} "
                "is given too; give one"
            )
        if not 0 <= train.lr_warmup_fraction < 1:
            raise ValueError(f"--lr-warmup-fraction {train.lr_warmup_fraction}: must be in [0, 1)")
        train.lr_warmup_iters = int(train.lr_warmup_fraction * train.lr_decay_iters)
    check_train(config, data_parallel)
