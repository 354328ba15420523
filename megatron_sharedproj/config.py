"""Model and run configuration: plain dataclasses, saved as JSON beside every run and checkpoint.

A field carries the name of the Megatron-LM flag that sets it (``arguments.py`` maps flags to fields by
name), so a saved configuration reads like the command line that made it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_sharedproj.variants import (
    CACHE_POLICIES,
    KV_ROTARY,
    AttentionVariant,
    CachedTensor,
    RotaryScheme,
    cached_tensors,
    get_variant,
    resolve_kv_rotary,
)

T = TypeVar("T")

# How documents become rows: back to back, or the paper's one per row with scored filling (data/padded.py).
DATA_PROTOCOLS = ("packed", "padded")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: everything that its weights and its function depend on.

    Sizes are in elements; dropouts are probabilities. ``padded_vocab_size`` is the number of rows of
    the embedding, the same at any tensor-parallel size.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    padded_vocab_size: int
    max_position_embeddings: int
    attention_variant: str = "qkv"
    num_query_groups: int = 0  # 0: as many as heads
    kv_channels: int = 0  # 0: hidden_size / heads
    ffn_hidden_size: int = 0  # 0: 4 * hidden_size
    position_embedding_type: str = "learned_absolute"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    kv_rotary: str = ""  # resolved: none without rotary positions, rotate_keys where K and V are untied
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"  # gelu (exact), gelu_tanh (Megatron's fused form), swiglu
    add_bias_linear: bool = True
    untie_embeddings_and_output_weights: bool = False
    qk_layernorm: bool = False
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    init_method_std: float = 0.02
    scaled_init: bool = True  # output projections initialised with std / sqrt(2 * layers)

    def __post_init__(self) -> None:
        variant = get_variant(self.attention_variant)
        sizes = (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "padded_vocab_size",
            "max_position_embeddings",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("num_query_groups", "kv_channels", "ffn_hidden_size"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1, or left out"
                )
        defaults = {
            "attention_variant": variant.name,
            "num_query_groups": self.num_query_groups or self.num_attention_heads,
            "ffn_hidden_size": self.ffn_hidden_size or 4 * self.hidden_size,
        }
        if not self.kv_channels:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"--hidden-size {self.hidden_size}: not divisible by --num-attention-heads "
                    f"{self.num_attention_heads}; change one or give --kv-channels"
                )
            defaults["kv_channels"] = self.hidden_size // self.num_attention_heads
        for name, value in defaults.items():
            object.__setattr__(self, name, value)
        self._check(variant)

    def _check(self, variant: AttentionVariant) -> None:
        variant.check_groups(self.num_attention_heads, self.num_query_groups)
        choices = {
            "position_embedding_type": ("learned_absolute", "rope", "none"),
            "normalization": ("LayerNorm", "RMSNorm"),
            "activation": ("gelu", "gelu_tanh", "swiglu"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: choose one of {', '.join(allowed)}")
        scheme = resolve_kv_rotary(variant, self.kv_rotary, rope=self.position_embedding_type == "rope")
        object.__setattr__(self, "kv_rotary", scheme.name)
        if self.position_embedding_type == "rope":
            if not 0 < self.rotary_percent <= 1 or self.rope_size < 2 or self.rope_size % 2:
                raise ValueError(
                    f"--rotary-percent {self.rotary_percent}: must be in (0, 1] and leave an even number of "
                    f"--kv-channels {self.kv_channels} to rotate, at least 2"
                )
            if variant.tied_kv:
                scheme.check_part(self.rotary_percent)
        for name, value in (
            ("init-method-std", self.init_method_std),
            ("norm-epsilon", self.layernorm_epsilon),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"--{name} {value}: must be positive")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be in [0, 1)")

    @property
    def variant(self) -> AttentionVariant:
        return get_variant(self.attention_variant)

    @property
    def rotary_scheme(self) -> RotaryScheme:
        """What rotary positions do to key and value; ``none`` without them."""
        return KV_ROTARY[self.kv_rotary]

    @property
    def rope_size(self) -> int:
        """Rotated elements of a head, r; 0 without rotary positions."""
        rope = self.position_embedding_type == "rope"
        return int(self.kv_channels * self.rotary_percent) if rope else 0

    @property
    def attends_one_tensor(self) -> bool:
        """The attention kernel sees key and value as one tensor."""
        apart = self.rotary_scheme.rope_head or self.kv_rotary == "rotate_keys"
        return self.variant.tied_kv and not apart

    def describe_attention(self) -> str:
        """One line for logs: projections and their roles, what positions do to them, and what is cached."""
        rotary = ""
        if self.position_embedding_type == "rope":
            part = f" on {self.rope_size} of {self.kv_channels} elements" if self.rotary_percent < 1 else ""
            rotary = f", rotary {self.kv_rotary}{part} ({self.rotary_scheme.function})"
        cached = ", ".join(tensor.describe() for tensor in self.cached_tensors())
        return f"{self.variant.describe()}{rotary}, cached: {cached}"

    def cached_tensors(self, policy: str = CACHE_POLICIES[0]) -> tuple[CachedTensor, ...]:
        """What a layer's key/value cache stores (variants.cached_tensors)."""
        return cached_tensors(
            self.variant,
            self.rotary_scheme,
            num_groups=self.num_query_groups,
            head_size=self.kv_channels,
            rope_size=self.rope_size,
            policy=policy,
        )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with other values; ``kv_rotary`` is kept where it still has a meaning."""
        if "kv_rotary" not in changes:
            variant = get_variant(changes.get("attention_variant", self.attention_variant))
            position = changes.get("position_embedding_type", self.position_embedding_type)
            if (variant.tied_kv, position) != (self.variant.tied_kv, self.position_embedding_type):
                changes["kv_rotary"] = ""
        return dataclasses.replace(self, **changes)


@dataclass
class ParallelConfig:
    """How the work is split, and what is computed twice to keep less. Sizes are numbers of ranks.

    ``num_virtual_stages_per_pipeline_rank`` is the number of model chunks of a rank: above 1 the schedule is
    interleaved. ``recompute_granularity`` is empty (none), selective or full.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_virtual_stages_per_pipeline_rank: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute_granularity: str = ""
    recompute_method: str = ""  # full: uniform or block
    recompute_num_layers: int = 0
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    grad_reduce_in_bf16: bool = False
    cross_entropy_loss_fusion: bool = False
    distributed_backend: str = ""  # empty: nccl on GPUs, gloo on CPUs
    distributed_timeout_minutes: int = 10
    transformer_impl: str = "local"

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model together."""
        sizes = self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size
        return math.prod(sizes)


@dataclass
class TrainConfig:
    """Steps, batch, optimizer and schedule. Batches are in sequences, lengths in tokens."""

    seq_length: int = 0
    micro_batch_size: int = 1
    global_batch_size: int = 0  # 0: micro batch x data-parallel size
    rampup_batch_size: list[int] = field(default_factory=list)  # start, increment, sequences; empty: none
    train_iters: int = 0
    eval_interval: int = 1000
    eval_iters: int = 100
    seed: int = 1234
    bf16: bool = False
    fp16: bool = False
    lr: float = 0.0
    min_lr: float = 0.0
    decoupled_lr: float | None = None
    decoupled_min_lr: float | None = None
    lr_decay_style: str = "cosine"
    lr_warmup_iters: int = 0
    lr_warmup_fraction: float | None = None
    lr_decay_iters: int = 0  # 0: train_iters
    weight_decay: float = 0.01
    weight_decay_on_all: bool = False
    match_parameters_of: str = ""  # a variant: the MLP was widened to its number of parameters
    width_before_match: int = 0  # of the MLP; derived, not a flag
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    require_kernel: bool = False
    deterministic_mode: bool = False
    manual_gc: bool = False
    manual_gc_interval: int = 0
    exit_interval: int = 0
    exit_duration_in_mins: float = 0.0
    max_nan_iterations: int = 5

    def batch_size_at(self, consumed: int) -> int:
        """Sequences of the step behind ``consumed`` ones.

        Source: RampupBatchsizeNumMicroBatchesCalculator (megatron-core 0.16.1).
        """
        if not self.rampup_batch_size or consumed > self.rampup_batch_size[2]:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        per_increment = samples / ((self.global_batch_size - start) // increment)
        return start + int(consumed / per_increment) * increment

    def samples_after(self, steps: int, consumed: int = 0) -> int:
        """Sequences consumed after so many more steps."""
        while steps and self.rampup_batch_size and consumed <= self.rampup_batch_size[2]:
            consumed, steps = consumed + self.batch_size_at(consumed), steps - 1
        return consumed + steps * self.global_batch_size

    def steps_within(self, samples: int) -> int:
        """Whole steps in so many sequences from the start."""
        consumed = steps = 0
        while self.rampup_batch_size and consumed <= self.rampup_batch_size[2]:
            consumed, steps = consumed + self.batch_size_at(consumed), steps + 1
            if consumed > samples:
                return steps - 1
        return steps + (samples - consumed) // self.global_batch_size

    @property
    def params_dtype(self) -> str:
        """Name of the parameters' torch dtype."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


@dataclass
class DataConfig:
    """Indexed data sets, the tokenizer and loading."""

    data_path: list[str] = field(default_factory=list)
    train_data_path: list[str] = field(default_factory=list)
    valid_data_path: list[str] = field(default_factory=list)
    test_data_path: list[str] = field(default_factory=list)
    split: str = "969,30,1"
    data_protocol: str = "packed"  # one of DATA_PROTOCOLS
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    mock_data: bool = False
    no_mmap_bin_files: bool = False
    data_cache_path: str = ""
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str = ""
    vocab_file: str = ""
    merge_file: str = ""
    vocab_size: int = 0
    num_workers: int = 2


@dataclass
class CheckpointConfig:
    """Where and when to save, and from where to load."""

    save: str = ""
    load: str = ""
    save_interval: int = 1000
    async_save: bool = False
    save_retain_interval: int = 0
    most_recent_k: int = -1
    load_fallback: bool = False
    no_verify_integrity: bool = False
    override_data_fingerprint: bool = False
    finetune: bool = False
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_optim: bool = False


@dataclass
class DistillConfig:
    """A trained model that a run learns from, beside its data.

    The loss is (1 - alpha) CE + alpha T^2 KL(teacher || student), both at temperature T in the KL.
    ``distill_teacher`` is a checkpoint; empty: there is none.
    """

    distill_teacher: str = ""
    distill_temperature: float = 2.0
    distill_alpha: float = 0.5


@dataclass
class LogConfig:
    """What is written and how often (in iterations)."""

    log_interval: int = 100
    tensorboard_dir: str = ""
    wandb_project: str = ""
    wandb_exp_name: str = ""
    wandb_save_dir: str = ""
    log_throughput: bool = False
    log_grad_norm_per_group: bool = False
    log_params_norm: bool = False
    log_num_zeros_in_grad: bool = False
    log_memory_to_tensorboard: bool = False


@dataclass
class RunConfig:
    """One training run: all that is needed to start it again."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    log: LogConfig = field(default_factory=LogConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as a JSON-ready dictionary."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Build a configuration dataclass from :func:`to_dict`'s dictionary.

    Raises:
        ValueError: naming the fields that this version does not know.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__}: unknown field(s) {', '.join(unknown)}; written by a newer version?"
        )
    nested = _NESTED.get(cls, {})
    return cls(**{k: from_dict(nested[k], v) if k in nested else v for k, v in values.items()})


_NESTED: dict[type, dict[str, type]] = {
    RunConfig: {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "train": TrainConfig,
        "data": DataConfig,
        "checkpoint": CheckpointConfig,
        "distill": DistillConfig,
        "log": LogConfig,
    }
}


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, payload: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(payload, indent=2, sort_keys=False) + "\n")


def _paper(**shape: Any) -> ModelConfig:
    # The released code's block: GPT-2 style, exact GELU, no output-init scaling (paper.md, section 2).
    return ModelConfig(
        padded_vocab_size=50304,
        max_position_embeddings=2048,
        activation="gelu",
        attention_dropout=0.0,
        hidden_dropout=0.1,
        scaled_init=False,
        **shape,
    )


PRESETS: dict[str, ModelConfig] = {
    "300m": _paper(num_layers=20, hidden_size=1024, num_attention_heads=16),
    "1b": _paper(num_layers=22, hidden_size=2048, num_attention_heads=32),
}
