"""Text from a checkpoint in one call, over a cache that holds a tied key/value once.

Shape legend: b texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.inference.engine import Completion, Engine, EngineOptions, Request, requests_for
from megatron_sharedproj.inference.loading import LoadedModel
from megatron_sharedproj.inference.sampling import Sampling

__all__ = ["Generation", "Sampling", "generate", "measured"]


@dataclass
class Generation:
    """Result of :func:`generate`; texts are in the order of the prompts, samples of a prompt together.

    Attributes:
        tokens: [b, longest] ids of prompt and continuation, filled up with the end-of-document token.
        text: their decoding, cut at the end-of-document token or before a stop string.
        completions: the continuations alone, with the reason why each ended.
        prefill_seconds: wall time of all prefills; step_seconds: of each decode step.
        cache_bytes: bytes that the cache's storage holds, measured, over all tensor-parallel ranks.
        cache_formula_bytes: the same from formulas.kv_cache_bytes_per_token, where no rank stores a copy.
        cache_tokens: tokens that the cache has room for, over all texts in it.
        tokens_per_second: of all texts together, median over the decode steps.
    """

    tokens: Tensor
    text: list[str]
    completions: list[Completion]
    prefill_seconds: float
    step_seconds: list[float]
    cache_bytes: int
    cache_formula_bytes: int
    cache_tokens: int
    tokens_per_second: float


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    use_cache: bool = True,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    options: EngineOptions | None = None,
    on_text: Callable[[Request, str], None] | None = None,
    on_done: Callable[[Completion], None] | None = None,
) -> Generation:
    """Continue prompts of any lengths.

    Args:
        loaded: a model with gathered logits (``parallel_output=False``).
        prompts: texts; an empty one starts from the end-of-document token.
        max_new_tokens: most tokens to add to each.
        use_cache: False recomputes the prefix at every step (for comparison).
        num_samples, stop: as in :func:`engine.requests_for`.
        options, on_text, on_done: as in :class:`engine.Engine`.
    Raises:
        ValueError: before any work, for a prompt that cannot be encoded or is longer than the positions, and
            for values out of range.
    """
    options = options or EngineOptions()
    engine = Engine(loaded, options if use_cache else replace(options, cache=""))
    try:
        requests = requests_for(
            loaded.tokenizer, prompts, max_new_tokens=max_new_tokens, num_samples=num_samples, stop=stop
        )
    except ValueError as error:
        raise ValueError(f"--prompt: the run's tokenizer cannot encode it ({error})") from None
    completions = engine.run(requests, sampling, on_text=on_text, on_done=on_done)
    return measured(engine, completions)


def measured(engine: Engine, completions: list[Completion]) -> Generation:
    """What an engine's last run generated and measured; every rank calls it."""
    loaded, figures = engine.loaded, engine.figures
    eod = loaded.tokenizer.eod
    rows = [[*done.request.tokens, *done.tokens] for done in completions]
    width = max((len(row) for row in rows), default=0)
    element = torch.tensor([], dtype=loaded.model.config.params_dtype).element_size()
    per_token = formulas.kv_cache_bytes_per_token(
        loaded.config.model, element, policy=engine.options.kv_cache_policy
    )
    return Generation(
        tokens=torch.tensor([row + [eod] * (width - len(row)) for row in rows]),
        text=[_prompt_text(engine, done.request) + done.text for done in completions],
        completions=completions,
        prefill_seconds=figures.prefill_seconds,
        step_seconds=figures.step_seconds,
        cache_bytes=_over_ranks(figures.cache_bytes, loaded.device),
        cache_formula_bytes=per_token * figures.cache_tokens,
        cache_tokens=figures.cache_tokens,
        tokens_per_second=figures.tokens_per_second,
    )


def _prompt_text(engine: Engine, request: Request) -> str:
    return "" if request.document_start else engine.loaded.tokenizer.decode(request.tokens)


def _over_ranks(count: int, device: torch.device) -> int:
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return count
    total = torch.tensor(count, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return int(total)
