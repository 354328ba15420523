"""Text from a checkpoint, token by token, over a cache that holds a tied key/value once.

Shape legend: s sequence, b batch, V padded vocabulary.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.inference.loading import LoadedModel
from megatron_sharedproj.layers.kv_cache import cache_storage_bytes


@dataclass
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: must be at least 0 (0: greedy)")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: must be at least 0 (0: all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: must be in (0, 1]")


@dataclass
class Generation:
    """Result of :func:`generate`.

    Attributes:
        tokens: [b, prompt + new] ids; text: their decoding, cut at the end-of-document token.
        prefill_seconds: wall time to the first new token; step_seconds: of each later one.
        cache_bytes: bytes that the cache's storage holds, measured, on this rank.
        cache_formula_bytes: the same from formulas.kv_cache_bytes_per_token over all ranks.
        cache_tokens: length that the cache has room for, per sequence.
    """

    tokens: Tensor
    text: list[str]
    prefill_seconds: float
    step_seconds: list[float]
    cache_bytes: int
    cache_formula_bytes: int
    cache_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second over all sequences, from the median decode step; 0 without one."""
        return len(self.text) / statistics.median(self.step_seconds) if self.step_seconds else 0.0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose tokens [b] from logits [b, V] (float32, -inf where forbidden)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = torch.topk(logits, min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        # A token stays while the mass before it is below top_p, so one always stays.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _next_logits(model: Any, tokens: Tensor, start: int, context: Any, vocab_size: int) -> Tensor:
    """Logits [b, V] after the last of ``tokens`` [b, s], which begin at position ``start``."""
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens)
    # Megatron insists on gathered logits at inference; the model was built so.
    logits = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
    logits = logits[:, -1].float()
    logits[:, vocab_size:] = float("-inf")  # rows that only pad the vocabulary
    return logits


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    prompts: list[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    use_cache: bool = True,
) -> Generation:
    """Continue prompts that have the same number of tokens.

    Args:
        loaded: a model with gathered logits (``parallel_output=False``).
        prompts: texts; an empty one starts from the end-of-document token.
        max_new_tokens: tokens to add to each.
        use_cache: False recomputes the prefix at every step (for comparison).
    Raises:
        ValueError: for prompts of different lengths, or beyond the model's positions.
    """
    sampling = sampling or Sampling()
    sampling.check()
    tokenizer, model, config = loaded.tokenizer, loaded.model, loaded.config.model
    try:
        ids = [tokenizer.encode(prompt) or [tokenizer.eod] for prompt in prompts]
    except ValueError as error:
        raise ValueError(f"--prompt: the run's tokenizer cannot encode it ({error})") from None
    if len({len(prompt) for prompt in ids}) != 1:
        raise ValueError(f"--prompt: prompts of different lengths {[len(p) for p in ids]} in one batch")
    length = len(ids[0])
    total = length + max_new_tokens
    if max_new_tokens < 1 or total > config.max_position_embeddings:
        room = config.max_position_embeddings - length
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: must be from 1 to {max(room, 0)} ({length} prompt tokens, "
            f"{config.max_position_embeddings} positions)"
        )
    tokens = torch.tensor(ids, device=loaded.device)
    generator = torch.Generator(loaded.device).manual_seed(sampling.seed)
    context = StaticInferenceContext(len(ids), total) if use_cache else None
    marks = [time.perf_counter()]
    finished = torch.zeros(len(ids), dtype=torch.bool, device=loaded.device)
    position = 0
    for _ in range(max_new_tokens):
        logits = _next_logits(model, tokens[:, position:], position, context, tokenizer.vocab_size)
        chosen = sample(logits, sampling, generator)
        chosen = torch.where(finished, tokenizer.eod, chosen)
        finished |= chosen == tokenizer.eod
        if context is not None:
            position = tokens.shape[1]
            context.sequence_len_offset = position
            context.enable_decode_mode()
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        done = bool(finished.all())
        marks.append(time.perf_counter())
        if done:
            break
    width = torch.tensor([], dtype=model.config.params_dtype).element_size()
    return Generation(
        tokens=tokens.cpu(),
        text=[_decode(tokenizer, row.tolist(), len(prompt)) for row, prompt in zip(tokens, ids, strict=True)],
        prefill_seconds=marks[1] - marks[0],
        step_seconds=[after - before for before, after in itertools.pairwise(marks[1:])],
        cache_bytes=cache_storage_bytes(context) if context is not None else 0,
        cache_formula_bytes=formulas.kv_cache_bytes_per_token(config, width) * len(ids) * total,
        cache_tokens=total,
    )


def _decode(tokenizer: Any, row: list[int], prompt_length: int) -> str:
    if tokenizer.eod in row[prompt_length:]:
        row = row[: row.index(tokenizer.eod, prompt_length)]
    if row and row[0] == tokenizer.eod:
        row = row[1:]
    return tokenizer.decode(row)
