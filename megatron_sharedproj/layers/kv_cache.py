"""Key/value caches that hold a tied key/value once.

KVCache is this package's own: pages of 64 tokens or more, taken by sequences of any lengths. CacheContext
hands it to a Megatron-Core GPTModel. alias_tied_cache serves users of Megatron's StaticInferenceContext,
whose key_value_memory_dict maps a layer number to (key buffer, value buffer), each [t, b, g, e]: for a tied
variant both entries are the same buffer.

Shape legend: s new tokens, t maximum length, b batch, h heads on this rank, g groups on this rank,
e head size, p pages of the pool, n tokens of a page.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from torch import Tensor

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.layers.rotary import turning_tables
from megatron_sharedproj.ops.attention import attention
from megatron_sharedproj.ops.decode import decode
from megatron_sharedproj.ops.paths import DECODE_QUERIES, Request, refusal
from megatron_sharedproj.variants import CACHE_POLICIES

PAGE_MULTIPLE = 64  # the decode kernels take pages of a multiple of this
_GROWTH = 1.5


class OutOfPages(RuntimeError):
    """A pool with a fixed number of pages has too few free ones."""


class KVCache:
    """Cached tensors of all layers, each [p, n, g, e]: one per layer where key and value are tied, else two.

    A sequence has a slot, and its slot a row of the block table: the pages that hold its tokens, in order.
    Contiguous is the special case of one page per sequence.

    Args:
        layers: layers of the model on this rank (no pipeline parallelism).
        shapes: heads and their elements of each cached tensor of a layer (variants.cached_tensors).
        max_sequences: slots.
        max_tokens: length that one sequence may reach.
        page_size: tokens of a page, a multiple of 64; None: contiguous, max_tokens rounded up.
        pages: fixed size of the pool; None: contiguous has one per slot, a paged pool grows.
        dtype, device: of the storage.
    Raises:
        ValueError: for sizes out of range.
    """

    def __init__(
        self,
        *,
        layers: int,
        shapes: Sequence[tuple[int, int]],
        max_sequences: int,
        max_tokens: int,
        page_size: int | None = PAGE_MULTIPLE,
        pages: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if page_size is not None and (page_size < 1 or page_size % PAGE_MULTIPLE):
            raise ValueError(f"--page-size {page_size}: must be a multiple of {PAGE_MULTIPLE}")
        if max_sequences < 1 or max_tokens < 1 or len(shapes) not in (1, 2):
            raise ValueError(
                f"cache of {max_sequences} sequences, {max_tokens} tokens, {len(shapes)} tensors: must be at "
                "least 1 each, and 1 or 2 tensors"
            )
        if page_size is None:
            page_size = -(-max_tokens // PAGE_MULTIPLE) * PAGE_MULTIPLE
            pages = max_sequences if pages is None else pages
        self.page_size, self.max_sequences, self.max_tokens = page_size, max_sequences, max_tokens
        per_sequence = self.pages_for(max_tokens)
        self._limit = max_sequences * per_sequence if pages is None else pages
        self.lengths = [0] * max_sequences
        self.block_table = torch.zeros(max_sequences, per_sequence, dtype=torch.int32)
        self._pages: list[list[int]] = [[] for _ in range(max_sequences)]
        # Heaps: the lowest first, so that contiguous sequences lie in the order of their slots.
        self._free_slots = list(range(max_sequences))
        self._free_pages: list[int] = []
        # Only the pool's length changes later.
        self._storage = [
            [torch.empty(0, page_size, *shape, dtype=dtype, device=device) for shape in shapes]
            for _ in range(layers)
        ]
        if pages is not None:
            self._resize(pages)

    @classmethod
    def for_model(
        cls, model: Any, config: ModelConfig, *, policy: str = CACHE_POLICIES[0], **sizes: Any
    ) -> KVCache:
        """The cache of a Megatron-Core GPTModel on this rank.

        Args:
            config: the model's.
            policy: of variants.CACHE_POLICIES, where the rotary scheme has the choice.
            sizes: max_sequences, max_tokens, page_size and pages as in the class.
        """
        groups = model.decoder.layers[0].self_attention.num_query_groups_per_partition
        tensors = config.cached_tensors(policy)
        return cls(
            layers=len(model.decoder.layers),
            shapes=[(1 if tensor.shared else groups, tensor.size) for tensor in tensors],
            dtype=model.config.params_dtype,
            device=next(model.parameters()).device,
            **sizes,
        )

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of so many tokens takes."""
        return -(-tokens // self.page_size)

    @property
    def pages(self) -> int:
        """Pages that are allocated, free ones included."""
        return self._storage[0][0].shape[0]

    @property
    def free_pages(self) -> int:
        """Pages that a sequence can still get; a pool that grows counts those that it may add."""
        return len(self._free_pages) + self._limit - self.pages

    @property
    def tokens(self) -> int:
        """Tokens that the allocated pages hold."""
        return self.pages * self.page_size

    def nbytes(self) -> int:
        """Bytes of the storage, measured; ``tokens`` times formulas.kv_cache_bytes_per_token on one rank."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors()}
        return sum(storages.values())

    def tensors(self) -> list[Tensor]:
        """All cached tensors [p, n, g, e], layer by layer."""
        return [tensor for layer in self._storage for tensor in layer]

    def stored(self, layer: int) -> list[Tensor]:
        """The cached tensors [p, n, g, e] of a layer (from 0)."""
        return self._storage[layer]

    def pages_of(self, slot: int) -> list[int]:
        """Pages of a sequence, in order."""
        return list(self._pages[slot])

    def check_room(self, tokens: int) -> None:
        """Raise OutOfPages if a sequence of so many tokens cannot have room even when it is alone."""
        needed = self.pages_for(tokens)
        if needed > self._limit:
            raise OutOfPages(
                f"key/value cache: a sequence of {tokens} tokens needs {needed} pages of {self.page_size} "
                f"tokens, there are {self._limit} in all; give it more pages, or a shorter sequence"
            )

    def allocate(self) -> int:
        """Take a slot for a new, empty sequence.

        Raises:
            OutOfPages: if all slots are taken.
        """
        if not self._free_slots:
            raise OutOfPages(f"key/value cache: all {self.max_sequences} sequences are in use; release one")
        return heapq.heappop(self._free_slots)

    def extend(self, slots: Sequence[int], tokens: int) -> None:
        """Make room for as many more tokens in each sequence: all of them, or none and an error.

        Raises:
            ValueError: beyond max_tokens.
            OutOfPages: naming how many pages are needed.
        """
        wanted = {}
        for slot in slots:
            length = self.lengths[slot] + tokens
            if length > self.max_tokens:
                raise ValueError(
                    f"key/value cache: {length} tokens in one sequence, it was made for {self.max_tokens}"
                )
            wanted[slot] = self.pages_for(length) - len(self._pages[slot])
        needed = sum(wanted.values())
        if needed > self.free_pages:
            raise OutOfPages(
                f"key/value cache: {needed} more page(s) of {self.page_size} tokens are needed, "
                f"{self.free_pages} of {self._limit} are free; give it more pages, or fewer or shorter "
                "sequences at once"
            )
        if needed > len(self._free_pages):
            short = self.pages + needed - len(self._free_pages)
            self._resize(min(self._limit, max(short, int(_GROWTH * self.pages))))
        for slot, count in wanted.items():
            own = self._pages[slot]
            for _ in range(count):
                page = heapq.heappop(self._free_pages)
                self.block_table[slot, len(own)] = page
                own.append(page)
            self.lengths[slot] += tokens

    def release(self, slot: int) -> None:
        """Give a sequence's slot and pages back."""
        for page in self._pages[slot]:
            heapq.heappush(self._free_pages, page)
        self._pages[slot] = []
        self.lengths[slot] = 0
        self.block_table[slot] = 0
        heapq.heappush(self._free_slots, slot)

    def gather(self, layer: int, slot: int) -> list[Tensor]:
        """The cached tensors [length, g, e] of a sequence."""
        pages, length = self._pages[slot], self.lengths[slot]
        found = []
        for stored in self._storage[layer]:
            # One page is a view; several are copied into one piece.
            whole = stored[pages[0]] if len(pages) == 1 else stored[pages].flatten(0, 1)
            found.append(whole[:length])
        return found

    def _resize(self, pages: int) -> None:
        before = self.pages
        for stored in self._storage:
            for index, old in enumerate(stored):  # one at a time: the old and new pool of one tensor exist
                stored[index] = old.new_empty(pages, *old.shape[1:])
                stored[index][:before] = old
        for page in range(before, pages):
            heapq.heappush(self._free_pages, page)


class CacheContext(StaticInferenceContext):
    """Hands a KVCache to Megatron-Core's GPTModel, for the sequences of one forward after another.

    Usage: ``prepare(slots, s)``, then the model on tokens [b, s] with ``positions`` and
    ``inference_context=context``. SharedProjectionSelfAttention recognises it.

    Attributes:
        slots, starts: the sequences of this forward, and their lengths before it.
        positions: int64 [b, s], of the new tokens in their sequences.
    """

    def __init__(self, cache: KVCache, *, last_token_only: bool = True):
        super().__init__(cache.max_sequences, cache.max_tokens)
        self.cache = cache
        self.last_token_only = last_token_only
        # The switch moved into a configuration object in megatron-core 0.17.
        holder = self.config if hasattr(self, "config") else self
        holder.materialize_only_last_token_logits = last_token_only
        self.slots: list[int] = []
        self.starts: list[int] = []
        self._angles: Tensor | None = None
        self._scratch: dict[int, Tensor] = {}

    def prepare(self, slots: Sequence[int], new_tokens: int) -> None:
        """Make room for the next tokens of these sequences, and find where they go.

        Raises:
            ValueError, OutOfPages: as :meth:`KVCache.extend`.
        """
        cache, device = self.cache, self.cache.tensors()[0].device
        self.slots, self.starts = list(slots), [cache.lengths[slot] for slot in slots]
        cache.extend(slots, new_tokens)
        self.positions = torch.tensor(self.starts)[:, None] + torch.arange(new_tokens)
        lengths = [start + new_tokens for start in self.starts]
        table = cache.block_table[self.slots, : cache.pages_for(max(lengths))]
        pages = table.gather(1, self.positions // cache.page_size)
        rows = pages * cache.page_size + self.positions % cache.page_size
        self.positions = self.positions.to(device)
        # Time first, as the layers have it.
        self._rows = rows.t().flatten().to(device)
        self._seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        in_order = table.shape[1] == 1 and table.flatten().tolist() == list(range(len(slots)))
        self._block_table = None if in_order else table.to(device)
        self.decode_mode = all(self.starts)

    def rotation(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """layers.rotary.turning_tables of Megatron's angles [t, 1, 1, r], made once for all layers."""
        if self._angles is not angles:
            self._angles, self._rotation = angles, turning_tables(angles)
        return self._rotation

    def scratch(self, like: Tensor) -> Tensor:
        """Memory in the shape of ``like`` [t, b, g, e], until the next call."""
        # Fresh pages of the operating system would cost more than what is computed into them.
        t, b, *rest = like.shape
        return self._memory(0, like.numel(), like).view(b, t, *rest).transpose(0, 1)

    def _memory(self, place: int, count: int, like: Tensor) -> Tensor:
        held = self._scratch.get(place)
        if held is None or held.numel() < count:
            spare = 0 if held is None else int(_GROWTH * held.numel())
            held = self._scratch[place] = like.new_empty(max(count, spare))
        return held[:count]

    def _in_order(self, kept: Tensor, table: Tensor, place: int) -> Tensor:
        """The pages of a table [b, n pages] one after another, [b, t, g, e], in memory of the context."""
        flat = table.flatten().long()
        shape = (len(flat), *kept.shape[1:])
        pages = self._memory(place, math.prod(shape), kept).view(shape)
        torch.index_select(kept, 0, flat, out=pages)
        return pages.view(table.shape[0], -1, *kept.shape[2:])

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        stored: Sequence[Tensor],
        read: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Store what a layer caches of the new tokens, and attend to all that its sequences hold.

        Args:
            layer: from 0.
            query: [s, b, h, e]; key, value: [s, b, g, e] of the new tokens, one tensor where the attention
                sees one. Already rotated.
            scale: factor on the scores.
            stored: what the cache keeps of them, [s, b, ...] each.
            read: makes key and value, [t, b, g, e] each, of what is cached of positions 0 to t - 1,
                [t, b, ...] each; None: they are what is cached.
        Returns:
            [s, b, h, e].
        """
        storage = self.cache.stored(layer)
        for kept, new in zip(storage, stored, strict=True):
            kept.view(-1, *kept.shape[2:])[self._rows] = new.flatten(0, 1).to(kept.dtype)
        if not any(self.starts):
            return attention(query, key, value, causal=True, scale=scale)
        tied = len(storage) == 1 and read is None
        few = query.shape[0] <= DECODE_QUERIES
        if few and _kernel_decodes(query, storage[0], tied):
            table, longest = self._block_table, max(self.starts) + query.shape[0]
            if table is None:
                storage = [kept[: len(self.slots)] for kept in storage]
            if read is not None:
                if table is not None:
                    storage = [self._in_order(kept, table, i + 1) for i, kept in enumerate(storage)]
                made = read(*(x[:, :longest].transpose(0, 1) for x in storage))
                storage, table = [x.transpose(0, 1) for x in made], None
            out, _ = decode(
                query.transpose(0, 1), *storage, scale=scale, seqlens_k=self._seqlens, block_table=table
            )
            return out.transpose(0, 1)
        out = torch.empty_like(query)
        for index, slot in enumerate(self.slots):
            cached = [x[:, None] for x in self.cache.gather(layer, slot)]
            keys, values = (cached[0], cached[-1]) if read is None else read(*cached)
            one = slice(index, index + 1)
            out[:, one] = attention(query[:, one], keys, values, causal=True, scale=scale)
        return out


def _kernel_decodes(query: Tensor, key: Tensor, tied: bool) -> bool:
    # Without the kernel, ops.decode is its plain twin: SDPA on gathered keys is faster.
    return not refusal(
        Request(
            device=query.device.type,
            dtype=query.dtype,
            head_size=query.shape[-1],
            tied=tied,
            queries=query.shape[0],
            keys=key.shape[1],
            capability=torch.cuda.get_device_capability(query.device) if query.is_cuda else None,
        )
    )


def inference_mode() -> contextlib.AbstractContextManager[None]:
    """What megatron-core from 0.17 on wants around a forward to compute the last token's logits alone."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return contextlib.nullcontext()
    return InferenceMode.active()


def alias_tied_cache(attention: Any, context: Any, key: Tensor) -> None:
    """Give the layer one buffer as key and value cache, before Megatron allocates two.

    Raises:
        ValueError: for a dynamic (paged) context, which stores keys and values apart.
    """
    if not context.is_static_batching():
        raise ValueError(
            "dynamic batching: Megatron-Core's DynamicInferenceContext keeps keys and values in two "
            "buffers; use a StaticInferenceContext (tools/generate.py does)"
        )
    if attention.layer_number not in context.key_value_memory_dict:
        buffer = attention._allocate_memory(
            context.max_sequence_length, context.max_batch_size, attention.key_hidden_size, key.dtype
        )
        context.key_value_memory_dict[attention.layer_number] = (buffer, buffer)


def cache_storage_bytes(context: Any) -> int:
    """Bytes that a static context's cache really holds: each storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for buffers in context.key_value_memory_dict.values()
        for tensor in buffers
    }
    return sum(storages.values())
