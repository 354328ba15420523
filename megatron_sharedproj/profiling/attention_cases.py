"""What the attention benchmark measures: cases, their FLOPs and bytes, and the presets.

Shape legend: b batch, s query length, t key length, h query heads, g groups (key/value heads), e head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

# As flash-attention's benchmark counts: the backward's five matrix products for the forward's two.
FLOP_FACTORS = {"fwd": 1.0, "bwd": 2.5, "fwdbwd": 3.5, "decode": 1.0}
OPS = tuple(FLOP_FACTORS)
# Tensors of the query's and of the key's size that an op reads or writes at least once: forward reads query
# and key and writes the output; backward reads both, output and its gradient, and writes two gradients.
_TRAFFIC = {"fwd": (2, 1), "bwd": (4, 2), "fwdbwd": (6, 3), "decode": (2, 1)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# strided: views of one fused projection [s, b, g, (h / g + 1) e], as the model makes them (decode: of a cache
# [b, t, g, e]); contiguous: each tensor [b, heads, length, e], SDPA's own order.
LAYOUTS = ("strided", "contiguous")
MASKS = ("causal", "full")


@dataclass(frozen=True)
class Case:
    """One attention, measured for every implementation side by side.

    Attributes:
        op: fwd, bwd, fwdbwd or decode; layout: one of LAYOUTS; dtype: a key of DTYPES.
        batch, seq_q, seq_k, heads, groups, head_size: b, s, t, h, g, e.
        causal: the mask; a decoded token sees all keys, and has none.
        page_size: keys in a page of the extension's decode cache, 0 for one that is not paged.
    """

    op: str
    layout: str
    dtype: str
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    groups: int
    head_size: int
    causal: bool
    page_size: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def training(self) -> bool:
        return self.op in ("bwd", "fwdbwd")

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def flops(self) -> float:
        """4 b h s t e in the forward, half of it when causal; zeros above the diagonal are not work."""
        full = 4 * self.batch * self.heads * self.seq_q * self.seq_k * self.head_size
        return FLOP_FACTORS[self.op] * (full / 2 if self.causal else full)

    def key_bytes(self) -> int:
        """Size of a key tensor (or cache)."""
        return self.batch * self.seq_k * self.groups * self.head_size * self.torch_dtype.itemsize

    def query_bytes(self) -> int:
        """Size of a query tensor."""
        return self.batch * self.seq_q * self.heads * self.head_size * self.torch_dtype.itemsize

    def bytes(self, separate: bool) -> int:
        """Bytes that any algorithm has to move: each tensor once, a tied key/value once as well."""
        queries, keys = _TRAFFIC[self.op]
        return queries * self.query_bytes() + keys * self.key_bytes() * (2 if separate else 1)

    def reduced(self) -> Case:
        """The same in a size whose exact result is cheap: one sequence, few tokens."""
        if self.op == "decode":
            keys = min(self.seq_k, max(512, self.page_size))
            keys -= keys % (self.page_size or 1)
            return replace(self, batch=1, seq_k=keys)
        return replace(self, batch=1, seq_q=min(self.seq_q, 256), seq_k=min(self.seq_k, 256))

    def __str__(self) -> str:
        if self.op == "decode":
            lengths = f"context {self.seq_k}" + (f" in pages of {self.page_size}" if self.page_size else "")
        else:
            lengths = f"length {self.seq_q}, {'causal' if self.causal else 'full'}"
        shape = f"batch {self.batch}, {lengths}, {self.heads}/{self.groups} heads of {self.head_size}"
        return f"{self.op} {self.dtype} {self.layout}, {shape}"


CASE_FIELDS = tuple(field.name for field in fields(Case))


@dataclass(frozen=True)
class Grid:
    """Cases as a product of choices; either the decode op alone, or none of it.

    Attributes:
        heads: pairs (h, g).
        lengths: s = t, or contexts of decode.
        batches: sequences; where empty, as many as make `tokens` (at least one).
        page_sizes: 0 for no pages; decode only.
    """

    ops: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    head_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...] = ()
    tokens: int = 4096
    dtypes: tuple[str, ...] = ("bf16",)
    layouts: tuple[str, ...] = ("strided",)
    masks: tuple[str, ...] = ("causal",)
    page_size: int = 0

    @property
    def decode(self) -> bool:
        return self.ops == ("decode",)

    def cases(self) -> Iterator[Case]:
        """Every case, lengths varying fastest."""
        for op in self.ops:
            for dtype in self.dtypes:
                for layout in self.layouts:
                    for mask in ("full",) if self.decode else self.masks:
                        for heads, groups in self.heads:
                            for size in self.head_sizes:
                                for batch, length in self._shapes():
                                    queries = 1 if self.decode else length
                                    yield Case(
                                        op, layout, dtype, batch, queries, length, heads, groups, size,
                                        mask == "causal", self.page_size,
                                    )  # fmt: skip

    def _shapes(self) -> list[tuple[int, int]]:
        if self.batches:
            return [(batch, length) for batch in self.batches for length in self.lengths]
        return [(max(1, self.tokens // length), length) for length in self.lengths]


@dataclass(frozen=True)
class Choices:
    """What the command line asks for instead of a preset's choices; None keeps the preset's.

    Attributes:
        ops, dtypes, layouts, masks, head_sizes, heads, groups: for every grid.
        seq_lengths, batch, tokens: for fwd, bwd and fwdbwd.
        decode_batches, decode_contexts, page_size: for decode.
    """

    ops: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    layouts: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None
    head_sizes: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    seq_lengths: tuple[int, ...] | None = None
    batch: int | None = None
    tokens: int | None = None
    decode_batches: tuple[int, ...] | None = None
    decode_contexts: tuple[int, ...] | None = None
    page_size: int | None = None

    def cases(self, grids: Iterable[Grid]) -> list[Case]:
        """The cases of the grids with these choices, each once.

        Raises:
            ValueError: naming the flag, its value and what would work.
        """
        adjusted = [self._adjust(grid) for grid in grids]
        cases = list(dict.fromkeys(case for grid in adjusted for case in grid.cases()))
        if self.page_size and self.page_size % 64:
            raise ValueError(f"--page-size {self.page_size}: the kernels take multiples of 64")
        for case in cases:
            if case.page_size and case.seq_k % case.page_size:
                raise ValueError(
                    f"--page-size {case.page_size}: does not divide the context {case.seq_k}; give a multiple"
                    f" of it in --decode-contexts"
                )
        return cases

    def _adjust(self, grid: Grid) -> Grid:
        ops = grid.ops
        if self.ops is not None:
            ops = tuple(op for op in self.ops if (op == "decode") == grid.decode)
        changes: dict[str, Any] = {"ops": ops, "heads": self._heads(grid)}
        for name in ("dtypes", "layouts", "masks", "head_sizes"):
            changes[name] = getattr(self, name)
        if grid.decode:
            changes |= {
                "lengths": self.decode_contexts,
                "batches": self.decode_batches,
                "page_size": self.page_size,
            }
        else:
            batches = (self.batch,) if self.batch else () if self.tokens else None
            changes |= {"lengths": self.seq_lengths, "batches": batches, "tokens": self.tokens}
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(grid, **given)

    def _heads(self, grid: Grid) -> tuple[tuple[int, int], ...] | None:
        if self.heads is None and self.groups is None:
            return None
        heads = self.heads if self.heads is not None else tuple(dict.fromkeys(h for h, _ in grid.heads))
        pairs = tuple((h, g) for h in heads for g in self.groups or (h,) if h % g == 0)
        if not pairs:
            groups = ",".join(map(str, self.groups or ()))
            raise ValueError(
                f"--groups {groups}: divides none of the heads {', '.join(map(str, heads))}; use 1"
            )
        return pairs


@dataclass(frozen=True)
class Preset:
    """Grids, and the seconds of measurement that a case is worth."""

    grids: tuple[Grid, ...]
    budget_seconds: float


_ALL = ("fwd", "bwd", "fwdbwd")
_MHA, _GQA = ((8, 8),), ((8, 2),)
_TRAINING = ("fwd", "fwdbwd")
_LENGTHS = (512, 1024, 2048, 4096)
_LONG = (*_LENGTHS, 8192, 16384)
_CPU_CONTEXTS, _CPU_BATCHES = (2048, 8192, 32768), (1, 8)
_GPU_CONTEXTS, _GPU_BATCHES = (2048, 8192, 32768, 131072), (1, 8, 32, 128)

PRESETS = {
    "quick": Preset(
        (
            Grid(_TRAINING, _MHA, (64,), (512, 1024), tokens=1024, layouts=LAYOUTS),
            Grid(("bwd",), _MHA, (64,), (1024,), tokens=1024),
            Grid(("fwd",), _GQA, (128,), (1024,), tokens=1024),
            Grid(("decode",), _MHA, (64,), (2048, 8192), (1, 8)),
        ),
        1.5,
    ),
    "cpu": Preset(
        (
            Grid(_TRAINING, _MHA, (64, 128), _LENGTHS, layouts=LAYOUTS),
            Grid(_TRAINING, _GQA, (128,), _LENGTHS, layouts=LAYOUTS),
            Grid(("fwd",), _MHA, (64, 128), _LENGTHS, dtypes=("fp32",)),
            Grid(("decode",), ((16, 16),), (64,), _CPU_CONTEXTS, _CPU_BATCHES),
            Grid(("decode",), _MHA, (128,), _CPU_CONTEXTS, _CPU_BATCHES),
        ),
        10.0,
    ),
    "gpu": Preset(
        (
            Grid(_ALL, ((16, 16), (16, 4)), (64, 128), _LONG, tokens=16384, layouts=LAYOUTS),
            Grid(("decode",), ((32, 32),), (64,), _GPU_CONTEXTS, _GPU_BATCHES),
            Grid(("decode",), ((32, 8), (32, 1)), (128,), _GPU_CONTEXTS, _GPU_BATCHES),
        ),
        3.0,
    ),
}
