"""Checks of a run before step 0: each error names the flag, the value and what would work."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sharedproj import formulas
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.checkpointing.selection import Choice, choose
from megatron_sharedproj.config import DistillConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sharedproj.formulas_memory import parameters_per_rank, training_memory_bytes
from megatron_sharedproj.layout import check_layout, check_micro_batches, check_sequence

if TYPE_CHECKING:  # torch is not needed to check flags
    from megatron_sharedproj.device import Device


def check_parallel(config: RunConfig, world_size: int) -> int:
    """Check how the model divides over the ranks.

    Returns:
        Data-parallel size: ranks / (tensor x pipeline x context-parallel size).
    Raises:
        ValueError: naming the flag, the value and what would work.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    flag = f"--tensor-model-parallel-size {tp}"
    if tp < 1 or world_size % tp:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"{flag}: must divide the number of processes, {world_size}; use one of {divisors}, or start "
            f"torchrun with a multiple of {max(tp, 1)} processes"
        )
    check_layout(model, parallel)
    replica = parallel.ranks_per_replica
    if world_size % replica:
        named = [f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}", flag]
        named.append(f"--context-parallel-size {parallel.context_parallel_size}")
        raise ValueError(
            f"{' x '.join(named)}: is {replica}, which must divide the number of processes, {world_size}; "
            f"lower one of them, or start torchrun with a multiple of {replica} processes"
        )
    if model.num_attention_heads % tp:
        raise ValueError(f"{flag}: must divide --num-attention-heads {model.num_attention_heads}")
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        raise ValueError(f"{flag}: must divide --num-query-groups {groups}, or be a multiple of it")
    sizes = {
        "--ffn-hidden-size": model.ffn_hidden_size,
        "padded vocabulary (--make-vocab-size-divisible-by)": model.padded_vocab_size,
        "the projected rows (groups x heads per group x head size)": formulas.projected_rows(model),
    }
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(f"{flag}: must divide {name}, {size}")
    if parallel.sequence_parallel and tp == 1:
        raise ValueError("--sequence-parallel: needs --tensor-model-parallel-size of at least 2")
    if parallel.transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {parallel.transformer_impl}: choose local or transformer_engine"
        )
    if parallel.transformer_impl != "local" and model.rotary_scheme.rope_head:
        raise ValueError(
            f"--kv-rotary {model.kv_rotary}: projects the normed input once more, which Transformer Engine's "
            "fused norm and projection keeps to itself; use --transformer-impl local, or another scheme"
        )
    if parallel.distributed_backend not in ("", "nccl", "gloo"):
        raise ValueError(f"--distributed-backend {parallel.distributed_backend}: choose nccl or gloo")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        raise ValueError("--overlap-param-gather: needs --use-distributed-optimizer")
    return world_size // replica


_NOT_NEGATIVE = (
    "global_batch_size",
    "eval_iters",
    "min_lr",
    "lr_warmup_iters",
    "lr_decay_iters",
    "weight_decay",
    "adam_eps",
    "clip_grad",
    "exit_interval",
    "manual_gc_interval",
    "exit_duration_in_mins",
    "num_workers",
)


def check_train(config: RunConfig, data_parallel_size: int) -> None:
    """Check batch, lengths, schedule and intervals. Raises ValueError."""
    train, model = config.train, config.model
    for name in ("seq_length", "micro_batch_size", "train_iters", "lr"):
        if not 0 < getattr(train, name) < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(train, name)}: must be given and positive")
    for part in (train, config.data):
        for name in _NOT_NEGATIVE:
            value = getattr(part, name, 0)
            if not 0 <= value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must not be negative")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(train, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(train, name)}: must be in [0, 1)")
    intervals = {
        "--log-interval": config.log.log_interval,
        "--save-interval": config.checkpoint.save_interval,
        "--eval-interval": train.eval_interval,
    }
    for flag, interval in intervals.items():
        if interval < 1:
            hint = " (--eval-iters 0 turns validation off)" if flag == "--eval-interval" else ""
            raise ValueError(f"{flag} {interval}: must be at least 1{hint}")
    _check_retention(config)
    if train.max_nan_iterations < 1:
        raise ValueError(f"--max-nan-iterations {train.max_nan_iterations}: must be at least 1")
    step = train.micro_batch_size * data_parallel_size
    if train.global_batch_size % step:
        nearest = max(step, round(train.global_batch_size / step) * step)
        raise ValueError(
            f"--global-batch-size {train.global_batch_size}: must be a multiple of --micro-batch-size "
            f"{train.micro_batch_size} x {data_parallel_size} data-parallel ranks; try {nearest}"
        )
    check_micro_batches(config.parallel, train.global_batch_size // step)
    if train.seq_length > model.max_position_embeddings:
        raise ValueError(
            f"--seq-length {train.seq_length}: longer than --max-position-embeddings "
            f"{model.max_position_embeddings}"
        )
    check_sequence(config)
    for name in ("decoupled_lr", "decoupled_min_lr"):
        value = getattr(train, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must not be negative")
    if train.decoupled_min_lr is not None and train.decoupled_lr is None:
        raise ValueError(f"--decoupled-min-lr {train.decoupled_min_lr}: needs --decoupled-lr")
    if train.min_lr > train.lr:
        raise ValueError(f"--min-lr {train.min_lr}: above --lr {train.lr}")
    if train.lr_warmup_iters >= train.lr_decay_iters:
        raise ValueError(
            f"--lr-warmup-iters {train.lr_warmup_iters}: must be below the {train.lr_decay_iters} decay "
            "steps (--train-iters or --lr-decay-iters)"
        )
    styles = ("constant", "linear", "cosine", "inverse-square-root")
    if train.lr_decay_style not in styles:
        raise ValueError(f"--lr-decay-style {train.lr_decay_style}: choose one of {', '.join(styles)}")
    if config.parallel.grad_reduce_in_bf16 and not train.bf16:
        raise ValueError("--grad-reduce-in-bf16: needs --bf16")
    if train.deterministic_mode and config.parallel.cross_entropy_loss_fusion:
        raise ValueError("--deterministic-mode: --cross-entropy-loss-fusion is not deterministic; drop one")
    if train.bf16 and train.fp16:
        raise ValueError("--bf16: --fp16 is given too; give one")


def check_rampup(
    train: TrainConfig, parallel: ParallelConfig, data_parallel_size: int, train_samples: int | None
) -> None:
    """Check --rampup-batch-size, which decides what the counts by sequences mean. Raises ValueError."""
    start, increment, samples = train.rampup_batch_size
    flag = f"--rampup-batch-size {start} {increment} {samples}"
    unit, end = train.micro_batch_size * data_parallel_size, train.global_batch_size
    if train_samples is None:
        raise ValueError(
            f"{flag}: needs --train-samples, not --train-iters: a step is no fixed number of them"
        )
    if min(start, increment, samples) < 1:
        raise ValueError(f"{flag}: all three must be at least 1")
    if start % unit or increment % unit:
        raise ValueError(
            f"{flag}: START and INCREMENT must be multiples of --micro-batch-size {train.micro_batch_size} x "
            f"{data_parallel_size} data-parallel ranks"
        )
    stages = parallel.pipeline_model_parallel_size
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and (
        start // unit % stages or increment // unit % stages
    ):
        raise ValueError(
            f"{flag}: START and INCREMENT must be multiples of {unit * stages} for the interleaved schedule, "
            f"which needs a multiple of --pipeline-model-parallel-size {stages} micro batches per step"
        )
    if start >= end or (end - start) % increment:
        raise ValueError(
            f"{flag}: START plus a whole number of INCREMENTs must give --global-batch-size {end}; take "
            f"START {end % increment or increment}"
        )
    if samples > train_samples:
        raise ValueError(f"{flag}: --train-samples {train_samples} ends before the ramp does")


def check_distillation(config: RunConfig) -> Choice | None:
    """Check the flags of a teacher, and whether it can run beside the student.

    Returns:
        Its checkpoint, or None without one.
    Raises:
        ValueError: naming the flag, the value and what would work.
    """
    distill, parallel = config.distill, config.parallel
    if not 0 < distill.distill_temperature < float("inf"):
        raise ValueError(
            f"--distill-temperature {distill.distill_temperature}: must be above 0; the paper: 2"
        )
    if not 0 <= distill.distill_alpha <= 1:
        raise ValueError(f"--distill-alpha {distill.distill_alpha}: must be in [0, 1]; the paper: 0.5")
    if not distill.distill_teacher:
        for name, default in vars(DistillConfig()).items():
            if getattr(distill, name) != default:
                flag = f"--{name.replace('_', '-')} {getattr(distill, name)}"
                raise ValueError(f"{flag}: needs --distill-teacher; add it, or drop this")
        return None
    flag = f"--distill-teacher {distill.distill_teacher}"
    choice = choose(
        distill.distill_teacher, "--distill-teacher", verify=not config.checkpoint.no_verify_integrity
    )
    teacher = files.checkpoint_config(choice.folder).model
    files.check_engine(choice.folder, files.train_state(choice.folder))
    if teacher.padded_vocab_size != config.model.padded_vocab_size:
        raise ValueError(
            f"{flag}: has {teacher.padded_vocab_size} rows of vocabulary and this run "
            f"{config.model.padded_vocab_size}; use its tokenizer and --make-vocab-size-divisible-by"
        )
    if teacher.max_position_embeddings < config.train.seq_length:
        raise ValueError(
            f"{flag}: has {teacher.max_position_embeddings} positions, fewer than --seq-length "
            f"{config.train.seq_length}; lower that"
        )
    without = dataclasses.replace(
        parallel, recompute_granularity="", recompute_method="", recompute_num_layers=0
    )
    try:
        check_parallel(RunConfig(teacher, without), parallel.ranks_per_replica)
    except ValueError as error:
        raise ValueError(f"{flag}: cannot be split as this run is: {error}") from None
    return choice


def _teacher_bytes(config: RunConfig, teacher: ModelConfig, stage: int, micro_batches: int) -> int:
    """Weights of a teacher on a rank, and its logits: of one micro batch, in a pipeline of a global one."""
    parallel, train = config.parallel, config.train
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    weights = parameters_per_rank(teacher, tp, pipeline_parallel_size=stages, pipeline_stage=stage)
    tokens = train.micro_batch_size * train.seq_length // parallel.context_parallel_size
    kept = 1 if stages == 1 else micro_batches
    logits = kept * tokens * teacher.padded_vocab_size // tp if stage == stages - 1 else 0
    return (weights + logits) * (2 if train.bf16 or train.fp16 else 4)


def _check_retention(config: RunConfig) -> None:
    options = config.checkpoint
    every = options.save_retain_interval
    if every < 0 or every % options.save_interval:
        raise ValueError(
            f"--save-retain-interval {every}: must be a multiple of --save-interval {options.save_interval}"
        )
    if options.most_recent_k < 1 and options.most_recent_k != -1:
        raise ValueError(f"--most-recent-k {options.most_recent_k}: must be at least 1, or -1 for all")


def check_folders(config: RunConfig) -> None:
    """Check that what the run will write can be written; leaves nothing behind.

    Raises:
        ValueError: naming the flag and the folder.
    """
    data = config.data
    folders = {"--save": config.checkpoint.save, "--tensorboard-dir": config.log.tensorboard_dir}
    if data.data_cache_path:
        folders["--data-cache-path"] = data.data_cache_path
    needed = {
        f"--tensorboard-dir {config.log.tensorboard_dir}": ("tensorboard", config.log.tensorboard_dir),
        f"--wandb-project {config.log.wandb_project}": ("wandb", config.log.wandb_project),
    }
    for flag, (module, given) in needed.items():
        if given and importlib.util.find_spec(module) is None:
            raise ValueError(f"{flag}: {module} is not installed; install the [log] extra, or drop the flag")
    for flag, folder in folders.items():
        if folder:
            _check_writable(flag, Path(folder), "give a folder that can be written")
    if not data.data_cache_path:
        for prefix in [*data.data_path, *data.train_data_path, *data.valid_data_path, *data.test_data_path]:
            if Path(prefix + ".idx").is_file():
                _check_writable("--data-cache-path", Path(prefix).parent, "give a folder for the index cache")


def _check_writable(flag: str, folder: Path, remedy: str) -> None:
    # Nothing is made on the way: other nodes of a job look at the same folder at the same time.
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written ({error.strerror}); {remedy}") from None


def check_device(
    config: RunConfig, device: Device, data_parallel_size: int, teacher: ModelConfig | None = None
) -> str:
    """Check what this device can run and whether the model fits its memory, its teacher included.

    Returns:
        One line: estimated and available memory.
    Raises:
        ValueError: naming the flag, the value and what would work.
    """
    train = config.train
    if train.fp16 and not device.trains_in_fp16:
        raise ValueError("--fp16: needs a GPU, and none is visible here; use --bf16, or neither for fp32")
    if not device.has_fused_kernels:
        wanted = {
            "--cross-entropy-loss-fusion": config.parallel.cross_entropy_loss_fusion,
            "--transformer-impl transformer_engine": config.parallel.transformer_impl != "local",
            "--distributed-backend nccl": config.parallel.distributed_backend == "nccl",
        }
        for flag, given in wanted.items():
            if given:
                raise ValueError(f"{flag}: needs a GPU, and none is visible here; drop it to use the CPU")
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel_size)
    stages = (
        training_memory_bytes(
            config.model,
            config.parallel,
            seq_length=train.seq_length,
            micro_batch_size=train.micro_batch_size,
            data_parallel_size=data_parallel_size,
            low_precision=train.bf16 or train.fp16,
            fused=device.has_fused_kernels,
            pipeline_stage=stage,
            micro_batches=micro_batches,
        )["total"]
        + (_teacher_bytes(config, teacher, stage, micro_batches) if teacher else 0)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    )
    need = max(stages)
    have = device.total_memory_bytes()
    line = f"memory per process: about {need / 2**30:.2f} GiB needed, {have / 2**30:.2f} GiB there"
    if need > have:
        raise ValueError(
            f"--micro-batch-size {train.micro_batch_size}: {line}; lower it, or --seq-length, "
            "--num-layers or --hidden-size, or raise --tensor-model-parallel-size or "
            "--pipeline-model-parallel-size, or add --recompute-granularity full"
        )
    return line
