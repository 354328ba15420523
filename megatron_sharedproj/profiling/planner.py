"""What fits on a GPU, and how fast it could be at best: training, serving, prefill and decode.

Sizes are bytes, lengths tokens, rates FLOP/s and bytes/s. Counts come from the formulas; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig, ParallelConfig
from megatron_sharedproj.formulas_memory import parameters_per_rank, training_memory_bytes
from megatron_sharedproj.layout import check_layout, check_sequence_length

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_MOST_MICRO_BATCH = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How a training run is laid out over GPUs.

    Attributes:
        tensor, pipeline, data: parallel sizes; dtype: one of DTYPE_BYTES; recompute: one of RECOMPUTE.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    dtype: str = "bf16"
    recompute: str = "none"
    chunks: int = 1  # num_virtual_stages_per_pipeline_rank
    recompute_method: str = ""
    recompute_num_layers: int = 0
    context: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            num_virtual_stages_per_pipeline_rank=self.chunks,
            context_parallel_size=self.context,
            recompute_granularity="" if self.recompute == "none" else self.recompute,
            recompute_method=self.recompute_method,
            recompute_num_layers=self.recompute_num_layers,
            sequence_parallel=self.sequence_parallel,
            use_distributed_optimizer=self.distributed_optimizer,
        )

    def check(self, config: ModelConfig, seq_length: int) -> None:
        """Raise ValueError where the model or the sequence does not divide so, as the trainer would."""
        flag = f"--tensor-model-parallel-size {self.tensor}"
        formulas.groups_per_rank(config, self.tensor)
        for name, size in (
            ("--ffn-hidden-size", config.ffn_hidden_size),
            ("--vocab-size", config.padded_vocab_size),
            ("the projected rows", formulas.projected_rows(config)),
        ):
            if size % self.tensor:
                raise ValueError(f"{flag}: must divide {name}, {size}")
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("--sequence-parallel: needs --tensor-model-parallel-size of at least 2")
        check_sequence_length(seq_length, self.parallel)
        if self.distributed_optimizer and self.dtype == "fp32":
            raise ValueError("--use-distributed-optimizer: needs --dtype bf16 or fp16")
        check_layout(config, self.parallel)

    def training_bytes(self, config: ModelConfig, seq_length: int, micro_batch: int) -> dict[str, int]:
        """training_memory_bytes of the pipeline stage that needs most."""
        stages = (
            training_memory_bytes(
                config,
                self.parallel,
                seq_length=seq_length,
                micro_batch_size=micro_batch,
                data_parallel_size=self.data,
                low_precision=DTYPE_BYTES[self.dtype] == 2,
                pipeline_stage=stage,
            )
            for stage in range(self.pipeline)
        )
        return max(stages, key=lambda counts: counts["total"])


def check_context(config: ModelConfig, tokens: int, flag: str) -> None:
    """Raise ValueError for a length beyond a learned position embedding, naming the flag."""
    if config.position_embedding_type == "learned_absolute" and tokens > config.max_position_embeddings:
        raise ValueError(
            f"{flag} {tokens}: longer than --max-position-embeddings {config.max_position_embeddings}"
        )


def largest_micro_batch(config: ModelConfig, layout: Layout, seq_length: int, memory: int) -> int:
    """The largest micro batch whose training fits into `memory`; 0: not even one sequence."""
    fits, fails = 0, 1
    while fails <= _MOST_MICRO_BATCH and layout.training_bytes(config, seq_length, fails)["total"] <= memory:
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if layout.training_bytes(config, seq_length, middle)["total"] <= memory:
            fits = middle
        else:
            fails = middle
    return fits


@dataclass(frozen=True)
class Serving:
    """What a server of a model could hold on each of its ranks.

    Attributes:
        weights: bytes; per_token: cache bytes of a token; per_sequence: of a sequence of the full context;
        free: bytes left for the cache, negative where the weights do not fit; sequences: that fit at once.
    """

    weights: int
    per_token: int
    per_sequence: int
    free: int
    sequences: int


def serving(config: ModelConfig, *, memory: int, context: int, dtype: str, tensor: int = 1) -> Serving:
    """Weights and cache in one dtype; no activations or workspace."""
    weights = parameters_per_rank(config, tensor) * DTYPE_BYTES[dtype]
    per_token = formulas.kv_cache_bytes_per_token(config, DTYPE_BYTES[dtype], tensor)
    free = memory - weights
    return Serving(weights, per_token, per_token * context, free, max(0, free // (per_token * context)))


@dataclass(frozen=True)
class Phase:
    """The work of one call of a model and the shortest time for it on a GPU's roofline.

    Attributes:
        flops: FLOPs; moved: bytes that any implementation reads and writes; tokens: that it processes;
        seconds: the longer of both times; bound: "compute" or "memory", whichever that is.
    """

    flops: int
    moved: int
    tokens: int
    seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.moved

    @property
    def tokens_per_second(self) -> float:
        """An upper bound."""
        return self.tokens / self.seconds


def _phase(flops: int, moved: int, tokens: int, peak: float, bandwidth: float) -> Phase:
    compute, memory = flops / peak, moved / bandwidth
    bound = "compute" if compute > memory else "memory"
    return Phase(flops, moved, tokens, max(compute, memory), bound)


def _weights_read(config: ModelConfig, width: int) -> int:
    """Bytes of weights that one call reads: all but tables of which it only looks a few rows up."""
    counts = formulas.parameters(config)
    looked_up = counts["position_embedding"]
    if config.untie_embeddings_and_output_weights:
        looked_up += counts["embedding"]
    return (counts["total"] - looked_up) * width


def prefill(
    config: ModelConfig, *, batch: int, context: int, dtype: str, peak: float, bandwidth: float
) -> Phase:
    """Prompts of `context` tokens: causal scores, logits of the last token only, weights read once.

    Counted as moved are weights and the cache that is written; activations could stay on the chip.
    """
    counts = formulas.macs(config, context, causal=True)
    macs = counts["total"] - counts["head"] + counts["head"] // context
    width = DTYPE_BYTES[dtype]
    cache = batch * context * formulas.kv_cache_bytes_per_token(config, width)
    moved = _weights_read(config, width) + cache
    return _phase(2 * batch * macs, moved, batch * context, peak, bandwidth)


def decode(
    config: ModelConfig, *, batch: int, context: int, dtype: str, peak: float, bandwidth: float
) -> Phase:
    """One new token for each of `batch` sequences, the last of `context`: the others' cache is read."""
    counts = formulas.macs(config, 1, causal=True)
    macs = counts["total"] + counts["scores"] * (context - 1)
    width = DTYPE_BYTES[dtype]
    cache = batch * context * formulas.kv_cache_bytes_per_token(config, width)  # context - 1 read, 1 written
    return _phase(2 * batch * macs, _weights_read(config, width) + cache, batch, peak, bandwidth)
