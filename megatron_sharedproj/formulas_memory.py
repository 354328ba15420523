"""What a training step keeps in memory and sends over the network, per rank, by component; in bytes.

Pure functions of configurations, needing neither torch nor Megatron. They extend V. Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198): its section 4.1 counts a
layer's activations, 4.2 divides them by tensor, sequence and pipeline parallelism, section 5 is selective
recompute. What differs here: a variant saves the tensors that it projects (one for a tied key and value),
attention saves the log-sum-exp instead of scores, and a dropout mask is 1 byte with GPU kernels and as wide
as its input on a CPU.

Shape legend: d hidden size, h heads, g groups, e head size, f ffn size, V padded vocabulary, T tokens of a
micro batch, t tensor-parallel ranks, p pipeline stages, w bytes of a parameter or activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_sharedproj.config import ModelConfig, ParallelConfig
from megatron_sharedproj.formulas import (
    projected_rows,
    projected_rows_per_rank,
    qk_norm_parameters,
    rope_head_rows,
)

RECOMPUTE = ("none", "selective", "full")

# What training_memory_bytes leaves out; printed wherever its counts are.
NOT_MODELLED = (
    "CUDA context and libraries, cuBLAS and attention workspace, NCCL buffers",
    "what the allocator holds beyond the tensors (fragmentation, rounding)",
    "temporaries of the optimizer's step, padding of Megatron's parameter buffers",
    "batches in the loader, and copies made while a checkpoint is saved",
)


@dataclass(frozen=True)
class _Step:
    """One rank's part of a training step; the arguments are those of :func:`training_memory_bytes`."""

    config: ModelConfig
    parallel: ParallelConfig
    seq_length: int
    micro_batch_size: int
    low_precision: bool
    fused: bool
    recompute: str
    stages: int
    stage: int

    @property
    def chunks(self) -> int:
        return self.parallel.num_virtual_stages_per_pipeline_rank

    def __post_init__(self) -> None:
        sizes = {"seq-length": self.seq_length, "micro-batch-size": self.micro_batch_size}
        for flag, value in sizes.items():
            if value < 1:
                raise ValueError(f"--{flag} {value}: must be at least 1")
        if self.recompute not in RECOMPUTE:
            raise ValueError(
                f"--recompute-granularity {self.recompute}: choose one of {', '.join(RECOMPUTE)}"
            )
        check_stages(self.config, self.stages)
        if not 0 <= self.stage < self.stages:
            raise ValueError(f"pipeline stage {self.stage}: must be from 0 to {self.stages - 1}")

    @property
    def tokens(self) -> int:
        return self.seq_length * self.micro_batch_size // self.context

    @property
    def context(self) -> int:
        return self.parallel.context_parallel_size

    @property
    def width(self) -> int:
        return 2 if self.low_precision else 4

    @property
    def layers(self) -> int:
        return self.config.num_layers // self.stages

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def ranks(self) -> int:
        return self.parallel.tensor_model_parallel_size

    def residual(self, per_token: int) -> int:
        """Bytes over all tokens of what only sequence parallelism divides."""
        return self.tokens * per_token // (self.ranks if self.parallel.sequence_parallel else 1)

    @property
    def mask(self) -> int:
        """Bytes of a dropout mask per token: PyTorch's CPU dropout keeps the noise in the input's dtype."""
        if not self.config.hidden_dropout:
            return 0
        return self.config.hidden_size * (1 if self.fused else self.width)

    @property
    def norm(self) -> int:
        """Bytes of a norm per token: input, output (the next linear's input), and the fp32 statistics."""
        rms = self.config.normalization == "RMSNorm"
        tensors = 3 if rms and not self.fused else 2  # PyTorch's CPU RMSNorm keeps the normed input too
        statistics = (1 if rms else 2) * (4 if self.fused else self.width)
        return tensors * self.config.hidden_size * self.width + statistics

    @cached_property
    def attention(self) -> int:
        """Bytes that a layer's attention saves on this rank: projection, output, and what lies between."""
        c, ranks, e = self.config, self.ranks, self.config.kv_channels
        variant, turns_value, normed = c.variant, c.rotary_scheme.rotates_value, c.qk_layernorm
        rope, selective = c.rope_size > 0, self.recompute == "selective"
        heads, groups = c.num_attention_heads // ranks, max(1, c.num_query_groups // ranks)
        attended, keys = heads * e, groups * e
        rows = projected_rows(c) if self.gathers_rows else projected_rows_per_rank(c, ranks)
        # Megatron rotates a tied query and key twice, layers/attention.py once.
        one = variant.tied_qk and (self._own_rotation or not rope)
        # Several query heads in each of several groups are not one strided view: reshape copies them.
        copied = attended if 1 < groups < heads and (normed or not rope) else 0
        inputs = rows + copied if normed else 0  # of the norms
        view = not (variant.tied_kv and (normed or turns_value))  # the value is a piece of the projection
        fp32 = 0 if selective else heads
        if c.attention_dropout and not self.fused and not selective:
            # No CPU kernel has dropout: plain attention keeps scaled copies, three of the scores, and the
            # value, which it repeats where it has fewer heads.
            value = attended if heads != groups else keys if not view else 0 if normed else rows
            elements, fp32 = inputs + 2 * attended + 3 * heads * self.seq_length + value, 0
        elif self.context > 1 and not selective:
            queries = attended if copied or rope or normed else rows
            elements = inputs + queries + attended + self._gathered(keys)
        else:
            elements = rows + copied if normed or view else 0
            if rope or normed:
                elements += keys + (0 if one else attended)
            if variant.tied_kv and normed and rope and not turns_value:
                elements += keys  # normed, but not rotated
            if turns_value and not selective:
                elements += attended  # what the kernel keeps; the rotation back keeps nothing of it
        elements += attended  # the output projection's input
        if normed:
            count = groups if variant.tied_qk else heads + groups
            fp32 += (1 if c.normalization == "RMSNorm" else 2) * count
            if c.normalization == "RMSNorm" and not self.fused:
                elements += count * e
        tables = 2 * (2 + turns_value - one) * (self.seq_length // self.context) * c.rope_size * self.width
        # A copy of keys' and values' rows is a weight of its own, joined to the queries' for the product.
        joined = 0 if c.num_query_groups >= ranks or self.gathers_rows else rows * c.hidden_size * self.width
        return self.tokens * (elements * self.width + 4 * fp32) + tables + joined

    @property
    def gathers_rows(self) -> bool:
        """Every rank gathers the whole projection's output: Transformer Engine, fewer groups than ranks."""
        return self.config.num_query_groups < self.ranks and self.parallel.transformer_impl != "local"

    @property
    def _own_rotation(self) -> bool:
        """layers/attention.py rotates, not Megatron."""
        return self.config.rotary_scheme.rotates_value or self.config.rotary_scheme.rope_head

    @property
    def keys(self) -> int:
        """Bytes of this rank's keys and values in a layer: one tensor where they are tied."""
        groups = max(1, self.config.num_query_groups // self.ranks)
        return self.tokens * (self._gathered(groups * self.config.kv_channels) // self.context) * self.width

    def _gathered(self, keys: int) -> int:
        """Elements per token of the keys and values that context parallelism gathers."""
        return (1 if self.config.attends_one_tensor else 2) * keys * self.context

    @property
    def mlp(self) -> int:
        """Bytes that a layer's MLP saves on this rank: input and output of the activation."""
        tensors = 2
        if self.config.activation == "swiglu":
            # Unfused, Megatron keeps silu's output and a copy of the other half; its fusion needs biases.
            tensors = 3 if self.fused and self.config.add_bias_linear else 5
        return self.tokens * tensors * self.config.ffn_hidden_size * self.width // self.ranks

    @property
    def layer(self) -> int:
        """Bytes of a layer's activations while its backward runs."""
        return self.residual(2 * self.norm + 2 * self.mask) + self.attention + self.mlp

    @property
    def unit(self) -> int:
        """Layers that full recompute runs again at once."""
        return (self.parallel.recompute_num_layers or 1) if self.parallel.recompute_method != "block" else 1

    @property
    def kept(self) -> int:
        """Bytes of a model chunk's activations between its forward and its backward."""
        layers = self.layers // self.chunks
        if self.recompute != "full":
            return layers * self.layer
        inputs = self.residual(self.config.hidden_size * self.width)
        if self.parallel.recompute_method == "block":
            again = self.parallel.recompute_num_layers
            return again * inputs + (layers - again) * self.layer
        return -(-layers // self.unit) * inputs

    @property
    def ends(self) -> int:
        """Bytes of the embedding (indices, dropout mask) and of the final norm and loss, where they are."""
        learned = self.config.position_embedding_type == "learned_absolute"
        total = self.tokens * 8 * (1 + learned) + self.residual(self.mask) if self.first else 0
        loss = self.tokens * (9 if self.fused else 17)  # cpu_cross_entropy.py keeps two more numbers in fp32
        return total + (self.residual(self.norm) + loss if self.last else 0)

    @property
    def probabilities(self) -> int:
        """Bytes that the loss keeps of the logits, which their gradient overwrites: a softmax in fp32.

        On a CPU it keeps the logits themselves (cpu_cross_entropy.py).
        """
        width = 4 if self.fused else self.width
        return self.tokens * self.config.padded_vocab_size * width // self.ranks if self.last else 0

    def peak(self, saved: int, master_copy: int) -> int:
        """Most bytes beside weights, gradients and optimizer, where `saved` are kept when backward starts."""
        c = self.config
        table = c.padded_vocab_size * c.hidden_size * self.width // self.ranks
        tied = not c.untie_embeddings_and_output_weights and self.stages == 1
        logits = self.tokens * c.padded_vocab_size * self.width // self.ranks if self.last else 0
        probabilities = self.probabilities
        # Autograd holds the head's gradient until the embedding's, of the same weight, is there.
        held = table if tied else 0
        mlp = (self.tokens + c.hidden_size) * c.ffn_hidden_size * self.width // self.ranks
        again = self.unit * self.layer if self.recompute == "full" else 0
        return max(
            saved + probabilities + (logits if self.low_precision and self.fused else 0),
            saved + logits + table if self.last else 0,
            saved + held + mlp + again,
            held + table if self.first else 0,
            master_copy,
        )


def in_flight(stages: int, stage: int, chunks: int, micro_batches: int | None) -> tuple[int, int]:
    """Most forward passes of a stage's chunks that wait for their backward, and how many of its first chunk.

    1F1B holds those of stages - stage micro batches. The interleaved schedule first runs
    2 (stages - stage - 1) of a chunk beside (chunks - 1) rounds of ``stages`` micro batches, then one more
    before each backward (megatron.core.pipeline_parallel.schedules.get_pp_rank_microbatches).
    """
    if chunks == 1:
        count = stages - stage
        count = count if micro_batches is None else min(count, micro_batches)
        return count, count
    rounds = 4 if micro_batches is None else -(-micro_batches // stages)
    chunk_of = [chunk for _ in range(rounds) for chunk in range(chunks) for _ in range(stages)]
    count = min((chunks - 1) * stages + 2 * (stages - stage - 1) + 1, len(chunk_of))
    first = most = chunk_of[:count].count(0)
    for backward, forward in zip(chunk_of, chunk_of[count:], strict=False):
        first += (forward == 0) - (backward == chunks - 1)  # backward takes the chunks in reverse
        most = max(most, first)
    return count, most


def check_stages(config: ModelConfig, stages: int) -> None:
    """Raise ValueError if the layers do not divide over the pipeline stages."""
    if stages < 1 or config.num_layers % stages:
        divisors = [n for n in range(1, config.num_layers + 1) if config.num_layers % n == 0]
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}: must divide --num-layers {config.num_layers}; use one "
            f"of {divisors}"
        )


def parameters_per_rank(
    config: ModelConfig,
    tensor_parallel_size: int = 1,
    *,
    pipeline_parallel_size: int = 1,
    pipeline_stage: int = 0,
) -> int:
    """Parameters that one rank holds, in elements.

    Column- and row-parallel weights, column biases and the vocabulary are divided by t; norms, position
    embedding and row biases are whole on every rank (megatron.core.tensor_parallel.layers), and so are keys
    and values of a group that several ranks share (not with Transformer Engine). With several stages the last
    has a copy of a tied embedding (megatron.core.models.common.language_module).

    Raises:
        ValueError: where the layers do not divide over the stages, or heads or groups over the ranks.
    """
    check_stages(config, pipeline_parallel_size)
    d, f, ranks = config.hidden_size, config.ffn_hidden_size, tensor_parallel_size
    bias = int(config.add_bias_linear)
    up = (2 if config.activation == "swiglu" else 1) * f
    rows, attended = projected_rows_per_rank(config, ranks), config.num_attention_heads * config.kv_channels
    norm = 2 if config.normalization == "LayerNorm" else 1
    split = up * (d + bias) + (attended + f) * d
    whole = (rows + rope_head_rows(config)) * (d + bias) + 2 * (bias + norm) * d + qk_norm_parameters(config)
    table = config.padded_vocab_size * d // ranks
    count = config.num_layers // pipeline_parallel_size * (split // ranks + whole)
    first, last = pipeline_stage == 0, pipeline_stage == pipeline_parallel_size - 1
    if first:
        learned = config.position_embedding_type == "learned_absolute"
        count += table + (config.max_position_embeddings * d if learned else 0)
    if last:
        own_head = config.untie_embeddings_and_output_weights or not first
        count += norm * d + (table if own_head else 0)
    return count


def training_memory_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    data_parallel_size: int = 1,
    low_precision: bool = False,
    fused: bool = True,
    recompute: str | None = None,
    pipeline_parallel_size: int | None = None,
    pipeline_stage: int = 0,
    micro_batches: int | None = None,
) -> dict[str, int]:
    """Bytes that one rank needs to train, by component, and their ``total``; see NOT_MODELLED.

    Weights, gradient buffer and Adam state are 4 + 4 + 8 bytes a parameter in fp32 and 2 + 4 + 12 in bf16 or
    fp16 (fp32 master weight and two moments), of which Megatron's distributed optimizer divides the last over
    the data-parallel ranks. ``activations`` are what autograd keeps between forward and backward, ``logits``
    the fp32 softmax that the loss keeps, ``temporary`` what the step's largest moment needs beside: gradients
    on their way to the buffer (a tied embedding's two parts meet only at the end), of the logits and the MLP,
    and the layer that full recompute runs again.

    Args:
        seq_length: tokens in a sequence; micro_batch_size: sequences in one forward pass.
        data_parallel_size: ranks over which the distributed optimizer shards its state.
        low_precision: bf16 or fp16 parameters.
        fused: a GPU's kernels; False: what PyTorch's CPU operations keep.
        recompute: none, selective (Megatron's core_attn) or full; None: as ``parallel`` says, which also has
            the method (uniform, one layer at a time, if it is silent).
        pipeline_parallel_size, pipeline_stage: p (None: parallel's), and the stage that this rank is. Under
            the 1F1B schedule stage i holds the activations of p - i micro batches; see :func:`in_flight`.
        micro_batches: in a step, which bounds those; None: enough of them.
    Raises:
        ValueError: for sizes below 1, an unknown recompute, or layers that do not divide over the stages.
    """
    if recompute is None:
        recompute = parallel.recompute_granularity or "none"
    stages = pipeline_parallel_size or parallel.pipeline_model_parallel_size
    step = _Step(
        config, parallel, seq_length, micro_batch_size, low_precision, fused, recompute, stages,
        pipeline_stage,
    )  # fmt: skip
    if data_parallel_size < 1:
        raise ValueError(f"--data-parallel-size {data_parallel_size}: must be at least 1")
    count = parameters_per_rank(
        config,
        parallel.tensor_model_parallel_size,
        pipeline_parallel_size=stages,
        pipeline_stage=pipeline_stage,
    )
    shards = data_parallel_size * step.context if parallel.use_distributed_optimizer else 1
    own = -(-count // shards)
    passes, first = in_flight(stages, pipeline_stage, step.chunks, micro_batches)
    reduced_in_bf16 = low_precision and parallel.grad_reduce_in_bf16
    # The loss's chunk runs backward at once, the embedding's waits longest.
    activations = passes * step.kept + (first if step.first else 1) * step.ends
    peak = step.peak(activations, 4 * own if reduced_in_bf16 else 0)
    counts = {
        "weights": count * step.width,
        "gradients": count * (2 if reduced_in_bf16 else 4),
        "optimizer": own * (12 if low_precision else 8),
        "activations": activations,
        "logits": step.probabilities,
        "temporary": peak - activations - step.probabilities,
    }
    counts["total"] = sum(counts.values())
    return counts


def communication_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int = 1,
    data_parallel_size: int = 1,
    low_precision: bool = False,
    pipeline_parallel_size: int | None = None,
    pipeline_stage: int = 0,
) -> dict[str, int]:
    """Bytes that one rank sends in one optimizer step, by purpose, and their ``total``.

    Collectives are counted as rings: n ranks send 2 (n - 1) / n of a tensor to all-reduce it, half of that to
    all-gather or reduce-scatter it. Per layer and micro batch tensor parallelism all-reduces [T, d] twice
    forward and twice backward; sequence parallelism replaces each by a reduce-scatter and an all-gather and
    gathers both linears' inputs again in backward (Korthikanti et al., section 4.2;
    megatron.core.tensor_parallel.layers.LinearWithGradAccumulationAndAsyncCommunication). Not counted: loss
    and norm scalars, and what recompute sends again.

    Returns:
        ``tensor_parallel``; ``context_parallel``, keys and values and their gradients; ``data_parallel``, the
        gradient reduction; ``parameter_gather``, the distributed optimizer's; ``pipeline``, activations and
        their gradients to the neighbours and a tied embedding's gradient between the ends.
    Raises:
        ValueError: as :func:`training_memory_bytes`.
    """
    stages = pipeline_parallel_size or parallel.pipeline_model_parallel_size
    step = _Step(
        config, parallel, seq_length, micro_batch_size, low_precision, True, "none", stages, pipeline_stage
    )
    # A weight's gradient is summed over the context-parallel ranks as well.
    ranks, replicas, width = step.ranks, data_parallel_size * step.context, step.width
    count = parameters_per_rank(config, ranks, pipeline_parallel_size=stages, pipeline_stage=pipeline_stage)
    gradient = 2 if low_precision and parallel.grad_reduce_in_bf16 else 4
    sharded = parallel.use_distributed_optimizer
    # A chunk's activations go to the next stage, and from the last to the first; their gradients back.
    neighbours = 2 * step.chunks - step.first - step.last if step.stages > 1 else 0
    stream = step.tokens * config.hidden_size * width
    hop = stream // (ranks if parallel.sequence_parallel else 1)
    tied = not config.untie_embeddings_and_output_weights and step.stages > 1 and (step.first or step.last)
    table = config.padded_vocab_size * config.hidden_size // ranks
    counts = {
        "tensor_parallel": _tensor_parallel_halves(step, micro_batches) * (ranks - 1) // ranks,
        "data_parallel": (1 if sharded else 2) * (replicas - 1) * count * gradient // replicas,
        "parameter_gather": (replicas - 1) * count * width // replicas if sharded else 0,
        "context_parallel": micro_batches * step.layers * 2 * step.keys * (step.context - 1),
        "pipeline": micro_batches * neighbours * hop + (table * gradient if tied else 0),
    }
    counts["total"] = sum(counts.values())
    return counts


def _tensor_parallel_halves(step: _Step, micro_batches: int) -> int:
    """Bytes of tensors gathered or scattered over t ranks in a step; an all-reduced one counts twice."""
    c = step.config
    stream = step.tokens * c.hidden_size * step.width
    if step.parallel.sequence_parallel:
        per_batch = step.layers * 10 * stream
        # Learned positions are added before the sequence is divided: then only backward gathers.
        learned = c.position_embedding_type == "learned_absolute"
        per_batch += (2 + learned) * stream if step.first else 0
        per_batch += 3 * stream if step.last else 0
    else:
        per_batch = (step.layers * 8 + 2 * step.first + 2 * step.last) * stream
    bias = int(c.add_bias_linear)
    if step.gathers_rows:
        per_batch += step.layers * 2 * step.tokens * projected_rows(c) * step.width
    elif c.num_query_groups < step.ranks:
        # The gradients of all groups' keys and values, summed in one message.
        keys = c.num_query_groups * (len(c.variant.projections) - 1) * c.kv_channels
        per_batch += step.layers * 2 * keys * (c.hidden_size + bias) * step.width
    per_batch += step.layers * 2 * step.tokens * rope_head_rows(c) * step.width
    if step.last:
        per_batch += 3 * 2 * step.tokens * 4  # the loss's largest logit, target's logit and sum, fp32
    # Norms of queries and keys see a rank's heads only: their gradients are summed once a step.
    whole = step.layers * qk_norm_parameters(c)
    if step.parallel.sequence_parallel:
        # Each rank saw a part of the sequence: so are those of norms, row biases and a rotary head.
        norm = 2 if c.normalization == "LayerNorm" else 1
        whole += step.layers * 2 * (norm + bias) * c.hidden_size
        whole += step.layers * rope_head_rows(c) * (c.hidden_size + bias)
        whole += norm * c.hidden_size if step.last else 0
    return micro_batches * per_batch + 2 * 4 * whole
