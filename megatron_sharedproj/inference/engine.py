"""Generation of many texts at once: prompts of any lengths, a place in the batch passed on when a text ends.

A prompt is prefilled without padding, together with those of its length; then all texts decode together, each
at its own position. A text depends on its prompt, the seed and its place in the input, not on its neighbours
(up to rounding, which in bfloat16 can tip a close choice).

Shape legend: s new tokens, b batch, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.inference.loading import LoadedModel
from megatron_sharedproj.inference.sampling import Sampling, random_stream, sample, uniforms
from megatron_sharedproj.inference.text import TextStream
from megatron_sharedproj.layers.kv_cache import PAGE_MULTIPLE, CacheContext, KVCache, inference_mode
from megatron_sharedproj.variants import CACHE_POLICIES

CACHES = ("paged", "contiguous")


@dataclass(frozen=True)
class EngineOptions:
    """How the engine works; none of these changes a text, up to rounding (see the module).

    Attributes:
        max_batch_size: texts that are decoded at once.
        cache: "paged", "contiguous", or "" to recompute everything at every step.
        page_size: tokens of a page of the paged cache, cut to what the longest text can take; pages: fixed
            size of its pool (None: it grows).
        prefill_chunk_size: most prompt tokens in one forward pass (0: any number).
        kv_cache_policy: one of variants.CACHE_POLICIES, for ``--kv-rotary rotate_keys`` with a tied value.
    """

    max_batch_size: int = 8
    cache: str = "paged"
    page_size: int = PAGE_MULTIPLE
    pages: int | None = None
    prefill_chunk_size: int = 4096
    kv_cache_policy: str = CACHE_POLICIES[0]

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if self.max_batch_size < 1:
            raise ValueError(f"--max-batch-size {self.max_batch_size}: must be at least 1")
        if self.cache and self.cache not in CACHES:
            raise ValueError(f"--cache {self.cache}: choose one of {', '.join(CACHES)}")
        if self.page_size < 1 or self.page_size % PAGE_MULTIPLE:
            raise ValueError(f"--page-size {self.page_size}: must be a multiple of {PAGE_MULTIPLE}")
        if self.pages is not None and self.pages < 1:
            raise ValueError(f"pages {self.pages}: must be at least 1")
        if self.prefill_chunk_size < 0:
            raise ValueError(
                f"--prefill-chunk-size {self.prefill_chunk_size}: must be at least 0 (0: any number)"
            )


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Attributes:
        tokens: ids of the prompt, at least one.
        max_new_tokens: most tokens to add; fewer where the model's positions end.
        stop: strings before which the text is cut.
        prompt, sample: the text's place in the input, which chooses its random stream.
        document_start: the prompt is the end-of-document token alone and no text.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    prompt: int = 0
    sample: int = 0
    document_start: bool = False


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        text: the continuation, without the prompt.
        tokens: the generated ids, the end-of-document token or those of a stop string included.
        finish_reason: "eod", "stop" (a stop string) or "length" (max_new_tokens, or the model's positions).
    """

    request: Request
    text: str
    tokens: list[int]
    finish_reason: str


@dataclass
class Figures:
    """What a run measured.

    Attributes:
        prefill_seconds: wall time of all prefills, the first tokens' choice included.
        step_seconds, step_tokens: of each decode step: its wall time and the texts in it.
        cache_bytes: that the cache's storage held at its largest, measured on this rank.
        cache_tokens: that those bytes hold.
    """

    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    cache_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Median over the decode steps, all texts of a step together; 0 without a step."""
        rates = [n / s for n, s in zip(self.step_tokens, self.step_seconds, strict=True)]
        return statistics.median(rates) if rates else 0.0


class _Sequence:
    """A text in progress."""

    def __init__(self, request: Request, tokenizer: Any, seed: int, positions: int):
        self.request = request
        self.ids = list(request.tokens)
        self.last = min(len(self.ids) + request.max_new_tokens, positions)
        self.generator = random_stream(seed, request.prompt, request.sample)
        self.stream = TextStream(tokenizer, () if request.document_start else self.ids, request.stop)
        self.slot = -1
        self.finish_reason = ""

    def add(self, token: int, eod: int) -> str:
        """Take a token; returns the text that became certain."""
        self.ids.append(token)
        piece = ""
        if token == eod:
            self.finish_reason = "eod"
        else:
            piece = self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.last:
                self.finish_reason = "length"
        if self.finish_reason:
            piece += self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        return piece

    def completion(self) -> Completion:
        start = len(self.request.tokens)
        return Completion(self.request, self.stream.text, self.ids[start:], self.finish_reason)


class Engine:
    """Generates with a model, under any tensor-parallel size (every rank calls it alike).

    Rank 0 of the tensor-parallel group chooses the tokens and broadcasts them: all ranks go on with the same.

    Args:
        loaded: a model with gathered logits (``parallel_output=False``).
    Raises:
        ValueError: for options out of range.
    """

    def __init__(self, loaded: LoadedModel, options: EngineOptions | None = None):
        self.options = options or EngineOptions()
        self.options.check()
        self.loaded = loaded
        self.figures = Figures()

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot be served."""
        positions = self.loaded.config.model.max_position_embeddings
        if request.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {request.max_new_tokens}: must be at least 1")
        if not 1 <= len(request.tokens) < positions:
            raise ValueError(
                f"the prompt has {len(request.tokens)} tokens and the model {positions} positions: use 1 to "
                f"{positions - 1} tokens"
            )

    # 6% faster per step than no_grad: autograd keeps no version counters.
    @torch.inference_mode()
    def run(
        self,
        requests: Sequence[Request],
        sampling: Sampling | None = None,
        *,
        on_text: Callable[[Request, str], None] | None = None,
        on_done: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Generate every requested text.

        Args:
            on_text: called with each piece of text, whole characters only, as it becomes certain.
            on_done: called with each text when it ends.
        Returns:
            One completion for each request, in their order. :attr:`figures` has what was measured.
        Raises:
            ValueError: before any work, for a request that cannot be served; later, if the model's logits
                are not finite.
            OutOfPages: before any work, if a text alone is larger than a pool of fixed size.
        """
        sampling = sampling or Sampling()
        sampling.check()
        for request in requests:
            self.check(request)
        self.figures = Figures()
        if not requests:
            return []
        tokenizer = self.loaded.tokenizer
        positions = self.loaded.config.model.max_position_embeddings
        waiting = deque(_Sequence(r, tokenizer, sampling.seed, positions) for r in requests)
        everything = list(waiting)
        context = self._context(everything) if self.options.cache else None
        active: list[_Sequence] = []
        with inference_mode():
            while waiting or active:
                started = self._admit(waiting, active, context)
                begin = time.perf_counter()
                logits = self._prefill(started, context) if started else self._step(active, context)
                batch = started or active
                chosen = self._choose(logits, batch, sampling)
                elapsed = time.perf_counter() - begin
                if started:
                    self.figures.prefill_seconds += elapsed
                    active = active + started
                else:
                    self.figures.step_seconds.append(elapsed)
                    self.figures.step_tokens.append(len(active))
                for sequence, token in zip(batch, chosen, strict=True):
                    piece = sequence.add(token, tokenizer.eod)
                    if piece and on_text:
                        on_text(sequence.request, piece)
                    if sequence.finish_reason:
                        if context is not None:
                            context.cache.release(sequence.slot)
                        if on_done:
                            on_done(sequence.completion())
                active = [sequence for sequence in active if not sequence.finish_reason]
        if context is not None:
            self.figures.cache_bytes = context.cache.nbytes()
            self.figures.cache_tokens = context.cache.tokens
        return [sequence.completion() for sequence in everything]

    def _context(self, sequences: Sequence[_Sequence]) -> CacheContext:
        options = self.options
        # The last token of a text is never fed to the model, but formulas and users count it.
        longest = max(sequence.last for sequence in sequences)
        whole = -(-longest // PAGE_MULTIPLE) * PAGE_MULTIPLE
        cache = KVCache.for_model(
            self.loaded.model,
            self.loaded.config.model,
            max_sequences=min(options.max_batch_size, len(sequences)),
            max_tokens=longest,
            policy=options.kv_cache_policy,
            page_size=min(options.page_size, whole) if options.cache == "paged" else None,
            pages=options.pages if options.cache == "paged" else None,
        )
        for sequence in sequences:
            cache.check_room(sequence.last)
        return CacheContext(cache)

    def _admit(
        self, waiting: deque[_Sequence], active: list[_Sequence], context: CacheContext | None
    ) -> list[_Sequence]:
        """Texts that start now: as many as fit, with the pages that each can need at its longest."""
        started: list[_Sequence] = []
        while waiting and len(active) + len(started) < self.options.max_batch_size:
            if context is not None:
                cache = context.cache
                promised = sum(
                    cache.pages_for(s.last) - len(cache.pages_of(s.slot)) for s in (*active, *started)
                )
                if promised + cache.pages_for(waiting[0].last) > cache.free_pages:
                    break
                waiting[0].slot = cache.allocate()
            started.append(waiting.popleft())
        return started

    def _prefill(self, sequences: list[_Sequence], context: CacheContext | None) -> Tensor:
        """Logits [b, V] after the prompts, those of equal length together, long ones in chunks."""
        limit = self.options.prefill_chunk_size if context is not None else 0
        found: dict[int, Tensor] = {}
        ordered = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
        for length, same in itertools.groupby(ordered, key=lambda i: len(sequences[i].ids)):
            indices = list(same)
            width = max(1, limit // length) if limit else len(indices)
            for first in range(0, len(indices), width):
                part = indices[first : first + width]
                tokens = torch.tensor([sequences[i].ids for i in part], device=self.loaded.device)
                slots = [sequences[i].slot for i in part]
                for start in range(0, length, limit or length):
                    piece = tokens[:, start : start + (limit or length)]
                    logits = self._forward(piece, slots, context)
                found.update(zip(part, logits, strict=True))
        return torch.stack([found[i] for i in range(len(sequences))])

    def _step(self, sequences: list[_Sequence], context: CacheContext | None) -> Tensor:
        """Logits [b, V] after the last token of each text."""
        if context is None:
            return self._prefill(sequences, None)
        tokens = torch.tensor([[sequence.ids[-1]] for sequence in sequences], device=self.loaded.device)
        return self._forward(tokens, [sequence.slot for sequence in sequences], context)

    def _forward(self, tokens: Tensor, slots: list[int], context: CacheContext | None) -> Tensor:
        if context is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        else:
            context.prepare(slots, tokens.shape[1])
            positions = context.positions
        # Megatron insists on gathered logits at inference; the model was built so.
        logits = self.loaded.model(
            tokens, positions, None, inference_context=context, runtime_gather_output=True
        )
        logits = logits[:, -1].float()
        logits[:, self.loaded.tokenizer.vocab_size :] = float("-inf")  # rows that only pad the vocabulary
        return logits

    def _choose(self, logits: Tensor, sequences: list[_Sequence], sampling: Sampling) -> list[int]:
        if not bool(logits.amax(-1).isfinite().all()):  # NaN would choose a token that does not exist
            raise ValueError(
                f"--load {self.loaded.folder}: the model's logits are not finite; its weights are damaged or "
                "its training diverged: load an earlier iteration"
            )
        greedy = sampling.temperature == 0
        drawn = torch.zeros(len(sequences)) if greedy else uniforms([s.generator for s in sequences])
        chosen = sample(logits, sampling, drawn)
        from megatron.core import parallel_state

        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                chosen,
                src=parallel_state.get_tensor_model_parallel_src_rank(),
                group=parallel_state.get_tensor_model_parallel_group(),
            )
        return chosen.tolist()


def requests_for(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    first_prompt: int = 0,
) -> list[Request]:
    """Requests for ``num_samples`` continuations of each prompt, a prompt's samples after one another.

    Args:
        prompts: texts; an empty one starts from the end-of-document token.
        first_prompt: place of the first one in the input.
    Raises:
        ValueError: if the tokenizer cannot encode a prompt.
    """
    requests = []
    for index, prompt in enumerate(prompts, start=first_prompt):
        ids = tokenizer.encode(prompt)
        first = Request(
            tuple(ids or [tokenizer.eod]), max_new_tokens, tuple(stop), index, 0, document_start=not ids
        )
        requests += [dataclasses.replace(first, sample=number) for number in range(num_samples)]
    return requests
