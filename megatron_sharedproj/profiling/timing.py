"""Times of calls that run in turn, on a CPU and on a GPU alike. All times are seconds, all sizes bytes."""

from __future__ import annotations

import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.mkldnn import to_mkldnn

Call = Callable[[], Any]

_DEFAULT_CACHE = 32 << 20  # where the system does not tell


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median, the 10th and 90th percentile of `repeats` measurements."""

    median: float
    p10: float
    p90: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))


@dataclass(frozen=True)
class Operation:
    """A call that is timed.

    Attributes:
        call: what runs.
        count: how many of the operation one call does; its time is divided by it.
    """

    call: Call
    count: int = 1


class Machine:
    """What the measurements need to know of a device: the CPU, and the base of the GPU's.

    Attributes:
        warm_up: calls before the first measured one.
        least: repeats that a case's budget is spent on first; most: repeats that are enough.
    """

    device = torch.device("cpu")
    warm_up, least, most = 2, 5, 50

    @property
    def name(self) -> str:
        """The processor's name."""
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability; None on a CPU."""
        return None

    def cache_bytes(self) -> int:
        """Size of all last-level caches together."""
        caches: dict[tuple[str, ...], int] = {}
        for cpu in Path("/sys/devices/system/cpu").glob("cpu[0-9]*"):
            for folder in cpu.glob("cache/index*"):
                try:
                    level, size, shared = (
                        (folder / file).read_text().strip() for file in ("level", "size", "shared_cpu_list")
                    )
                except OSError:
                    continue
                caches[level, shared] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
        last = max((level for level, _ in caches), default="")
        return sum(size for (level, _), size in caches.items() if level == last) or _DEFAULT_CACHE

    def free_bytes(self) -> int:
        """Memory that can be allocated now."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def seconds(self, call: Call) -> float:
        """Time of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until everything queued has run."""

    def release(self) -> None:
        """Give memory that no tensor uses back, so that free_bytes sees it."""

    def rotated(self, calls: Sequence[Call]) -> Operation:
        """One operation that goes through calls on different buffers, so that none finds its data cached."""
        turn = itertools.cycle(calls)
        return Operation(lambda: next(turn)())

    def peak_bytes(self, call: Call) -> int | None:
        """Most memory that a call allocates beyond what is allocated before it; None where not counted."""
        return None

    def products(self, size: int, dtype: torch.dtype) -> Iterable[tuple[str, Call]]:
        """Candidates for the highest rate of a product of two size x size matrices: a name, the call."""
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        yield "matrix product", partial(torch.mm, a, b, out=torch.empty_like(a))
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            # On AMD processors MKL's float32 product has half this rate.
            linear = to_mkldnn(torch.nn.Linear(size, size, bias=False).requires_grad_(False))
            yield "oneDNN product", partial(linear, a.to_mkldnn())

    def readers(self, size: int) -> Iterable[tuple[str, int, Call]]:
        """Candidates for the highest memory rate over `size` bytes: a name, the bytes moved, the call."""
        x = torch.empty(size // 4).uniform_()
        rows, halves, words = x.view(-1, 4096), x.view(2, -1), x.view(torch.int64)
        yield "row sums", size, lambda: rows.sum(1)
        yield "row maxima", size, lambda: rows.amax(1)
        yield "sums of two halves", size, lambda: halves.sum(1)
        yield "int64 sum", size, lambda: words.sum()


class CudaMachine(Machine):
    """The current GPU: CUDA events, behind a read of memory that empties the L2 cache."""

    warm_up, least, most = 20, 50, 200

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        # Read, not written: dirty lines would be written back during the measurement. The read also keeps the
        # GPU busy until the call is queued, so that its launch is not counted.
        self._lead = torch.zeros(
            max(4 * self.cache_bytes(), 1 << 30) // 8, dtype=torch.int64, device=self.device
        )

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def capability(self) -> tuple[int, int] | None:
        return torch.cuda.get_device_capability(self.device)

    def cache_bytes(self) -> int:
        return self._properties.L2_cache_size

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def seconds(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._lead.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def rotated(self, calls: Sequence[Call]) -> Operation:
        try:
            return Operation(_captured(calls), len(calls))
        except RuntimeError:  # an implementation that cannot be captured is launched call by call
            self.wait()
            return super().rotated(calls)

    def peak_bytes(self, call: Call) -> int | None:
        call()  # libraries keep what they allocate in their first call
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def products(self, size: int, dtype: torch.dtype) -> Iterable[tuple[str, Call]]:
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        yield "matrix product", partial(torch.mm, a, b, out=torch.empty_like(a))

    def readers(self, size: int) -> Iterable[tuple[str, int, Call]]:
        source = torch.empty(size // 4, device=self.device).uniform_()
        target = torch.empty_like(source)
        yield "device copy, read and written", 2 * size, lambda: target.copy_(source)


def _captured(calls: Sequence[Call]) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces here rather than while captured
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def get_machine(device: str) -> Machine:
    """The machine of `device`, "cpu" or "cuda".

    Raises:
        ValueError: for "cuda" where torch sees no GPU.
    """
    if device == "cpu":
        return Machine()
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} sees no GPU; use --device cpu")
    return CudaMachine()


def measure(operations: Mapping[str, Operation], machine: Machine, budget: float) -> dict[str, Times]:
    """Time operations side by side: each once per round, so that drift of the machine hits all alike.

    The order within a round is random, so that none always follows the one that leaves the caches cold.

    An operation takes part until it has `machine.most` repeats or has used its equal share of the budget; a
    slow one until it has `machine.least` repeats or the whole budget is used. Each is measured at least once.

    Args:
        operations: name -> operation.
        budget: seconds for all of them, warm-up aside.
    Returns:
        name -> times of one operation, in the same order.
    """
    share = budget / max(1, len(operations))
    for operation in operations.values():
        start = time.perf_counter()
        for _ in range(machine.warm_up):
            operation.call()
            if time.perf_counter() - start > share / 4:
                break
        machine.wait()
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in operations}
    start = time.perf_counter()
    while True:
        elapsed = time.perf_counter() - start
        wanted = [
            name
            for name, taken in samples.items()
            if not taken
            or (len(taken) < machine.most and sum(taken) < share)
            or (len(taken) < machine.least and elapsed < budget)
        ]
        if not wanted:
            break
        order.shuffle(wanted)
        for name in wanted:
            samples[name].append(machine.seconds(operations[name].call))
    return {
        name: Times.of([seconds / operations[name].count for seconds in taken])
        for name, taken in samples.items()
    }
