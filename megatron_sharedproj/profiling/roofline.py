"""The machine's ceilings, measured: what a matrix product and a pass over memory reach.

Rates are FLOP/s and bytes/s.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megatron_sharedproj.profiling.timing import Call, Machine

_LARGEST_PRODUCT = 8192
_ENOUGH_SECONDS = 0.02  # a matrix product this long gains nothing from being larger
_LEAST_BYTES = 256 << 20
_REPEATS = 9


@dataclass(frozen=True)
class Roofline:
    """What the machine was measured to reach.

    Attributes:
        flops: FLOP/s of a large matrix product, by dtype; bandwidth: bytes/s of memory.
        how: in words, the operations that reached them.
    """

    flops: Mapping[torch.dtype, float]
    bandwidth: float
    how: str

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The shortest time for that many FLOPs and bytes."""
        return max(flops / self.flops[dtype], moved / self.bandwidth)


def _typical(call: Call, machine: Machine) -> float:
    """The median, as of the cases that are held against it: a shared machine's best moments are nobody's."""
    call()
    return statistics.median(machine.seconds(call) for _ in range(_REPEATS))


def _product_rate(dtype: torch.dtype, machine: Machine) -> tuple[float, str]:
    best: dict[str, float] = {}
    size, slow = 1024, False
    while not slow and size <= _LARGEST_PRODUCT:
        for name, call in machine.products(size, dtype):
            seconds = _typical(call, machine)
            best[name] = max(best.get(name, 0.0), 2 * size**3 / seconds)
            slow = slow or seconds > _ENOUGH_SECONDS
        size *= 2
    name = max(best, key=lambda name: best[name])
    return best[name], name


def measure_bandwidth(machine: Machine) -> tuple[float, str]:
    """Bytes/s of the fastest pass over at least 256 MiB of memory, and the operation that reached it."""
    size = max(_LEAST_BYTES, 1 << (4 * machine.cache_bytes() - 1).bit_length())
    return max((moved / _typical(call, machine), name) for name, moved, call in machine.readers(size))


def measure_roofline(dtypes: Iterable[torch.dtype], machine: Machine) -> Roofline:
    """The fastest of several matrix products in each dtype, and of passes over at least 256 MiB of memory."""
    flops, how = {}, []
    for dtype in dict.fromkeys(dtypes):
        flops[dtype], name = _product_rate(dtype, machine)
        how.append(f"{flops[dtype] / 1e12:.4g} TFLOP/s ({str(dtype).removeprefix('torch.')} {name})")
    bandwidth, name = measure_bandwidth(machine)
    return Roofline(flops, bandwidth, ", ".join([*how, f"{bandwidth / 1e9:.4g} GB/s ({name})"]))
