"""Attention side by side: the extension, SDPA with one and with two tensors, and the reference.

Every implementation of a case is timed in the same rounds, and held to an exact result on a reduced shape.

Shape legend: b batch, s query length, t key length, h query heads, g groups (key/value heads), e head size.
Query [s, b, h, e] and key/value [t, b, g, e] are views of what was allocated in the case's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.ops import paths
from megatron_sharedproj.ops.reference import attention_reference
from megatron_sharedproj.profiling.attention_cases import Case
from megatron_sharedproj.profiling.roofline import Roofline
from megatron_sharedproj.profiling.timing import Call, Machine, Operation, Times, measure

_ROTATED_CACHES = 4  # decode goes through buffers of this many times the last-level cache
_MOST_BUFFERS = 512


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case.

    Attributes:
        query: [s, b, h, e]; key, value: [t, b, g, e], one tensor object where they are tied.
        grad_out: [s, b, h, e], in the order in which a model of that layout gives it.
        pages: key and value as pages [p, page size, g, e] (one where tied), empty where not paged.
        table: int32 [b, pages of a sequence], which page holds which keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    pages: tuple[Tensor, ...] = ()
    table: Tensor | None = None

    @property
    def tied(self) -> bool:
        return self.value is self.key

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.query, self.key) if self.tied else (self.query, self.key, self.value)

    def leaves(self) -> Inputs:
        """The same memory as leaves that require gradients."""
        return self._with([tensor.detach().requires_grad_() for tensor in self.tensors])

    def exact(self) -> Inputs:
        """In float64."""
        return replace(self._with([x.double() for x in self.tensors]), grad_out=self.grad_out.double())

    def _with(self, tensors: list[Tensor]) -> Inputs:
        return replace(self, query=tensors[0], key=tensors[1], value=tensors[-1])


def make_inputs(case: Case, device: torch.device) -> dict[bool, Inputs]:
    """Inputs with key and value one tensor (under False) and two (under True); decode's share the key."""
    shape = {"device": device, "dtype": case.torch_dtype}
    b, s, t, h, g, e = case.batch, case.seq_q, case.seq_k, case.heads, case.groups, case.head_size
    if case.layout == "contiguous":
        query, grad = (torch.randn(b, h, s, e, **shape).permute(2, 0, 1, 3) for _ in range(2))
        key, value = (torch.randn(b, g, t, e, **shape).permute(2, 0, 1, 3) for _ in range(2))
    elif case.op == "decode":
        query, grad = (torch.randn(b, s, h, e, **shape).transpose(0, 1) for _ in range(2))
        key, value = (torch.randn(b, t, g, e, **shape).transpose(0, 1) for _ in range(2))
    else:
        grad = torch.randn(s, b, h, e, **shape)
        made = {}
        for separate in (False, True):
            rows = [h // g * e, e, e] if separate else [h // g * e, e]
            parts = torch.randn(s, b, g, sum(rows), **shape).split(rows, dim=-1)
            views = [part.reshape(s, b, -1, e) for part in parts]
            made[separate] = Inputs(views[0], views[1], views[-1], grad)
        return made
    if not case.page_size:
        return {False: Inputs(query, key, key, grad), True: Inputs(query, key, value, grad)}
    table = torch.randperm(b * t // case.page_size, device=device).view(b, -1)
    pages = []
    for cache in (key, value):
        rows = cache.transpose(0, 1).reshape(-1, case.page_size, g, e)
        pages.append(torch.empty_like(rows).index_copy_(0, table.flatten(), rows))
    return {
        False: Inputs(query, key, key, grad, (pages[0],), table.int()),
        True: Inputs(query, key, value, grad, tuple(pages), table.int()),
    }


def _extension(case: Case, inputs: Inputs) -> Tensor:
    query, key, value = (x.transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value))
    if case.op == "decode":
        caches = inputs.pages or (key, value)
        value = None if inputs.tied else caches[1]
        out, _ = torch.ops.megatron_sharedproj.attention_decode(
            query, caches[0], value, case.scale, block_table=inputs.table
        )
    else:
        value = None if inputs.tied else value
        out, _ = torch.ops.megatron_sharedproj.attention(query, key, value, case.causal, case.scale)
    return out.transpose(0, 1)


def _sdpa_arguments(case: Case, inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    key = inputs.key.permute(1, 2, 0, 3)
    value = key if inputs.tied else inputs.value.permute(1, 2, 0, 3)
    options = {"is_causal": case.causal, "scale": case.scale, "enable_gqa": case.heads != case.groups}
    return (inputs.query.permute(1, 2, 0, 3), key, value), options


def _sdpa(case: Case, inputs: Inputs) -> Tensor:
    tensors, options = _sdpa_arguments(case, inputs)
    return torch.nn.functional.scaled_dot_product_attention(*tensors, **options).permute(2, 0, 1, 3)


def _reference(case: Case, inputs: Inputs) -> Tensor:
    return attention_reference(inputs.query, inputs.key, inputs.value, causal=case.causal, scale=case.scale)


@dataclass(frozen=True)
class Implementation:
    """How one computes the output [s, b, h, e]; separate: from two tensors; kernel: with the extension."""

    forward: Callable[[Case, Inputs], Tensor]
    separate: bool = False
    kernel: bool = False


IMPLEMENTATIONS = {
    "extension": Implementation(_extension, kernel=True),
    "extension_separate": Implementation(_extension, separate=True, kernel=True),
    "sdpa_alias": Implementation(_sdpa),
    "sdpa_separate": Implementation(_sdpa, separate=True),
    "reference": Implementation(_reference),
}
BASELINES = ("sdpa_separate", "sdpa_alias")


def sdpa_backend(case: Case, device: torch.device) -> str:
    """Which of SDPA's kernels torch chooses for the reduced case, "" where this torch does not say."""
    choice = getattr(torch, "_fused_sdp_choice", None)  # there is no public way to ask
    if choice is None:
        return ""
    made = make_inputs(case.reduced(), device)[False]
    inputs = made.leaves() if case.training else made
    tensors, options = _sdpa_arguments(case, inputs)
    return str(torch.nn.attention.SDPBackend(choice(*tensors, **options)).name).lower()


def operation(case: Case, implementation: str, inputs: Inputs) -> Call:
    """A call that computes the case once.

    Returns:
        the call, whose result is (out,) or the gradients of inputs.tensors.
    """
    forward = IMPLEMENTATIONS[implementation].forward
    if not case.training:

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(case, inputs),)

        return call
    leaves = inputs.leaves()
    if case.op == "bwd":
        out = forward(case, leaves)
        return lambda: torch.autograd.grad(out, leaves.tensors, leaves.grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(forward(case, leaves), leaves.tensors, leaves.grad_out)


def refusal(case: Case, implementation: str, machine: Machine) -> str:
    """Why an implementation is left out of a case, "" if it is not."""
    chosen = IMPLEMENTATIONS[implementation]
    if chosen.kernel:
        request = paths.Request(
            device=machine.device.type,
            dtype=case.torch_dtype,
            head_size=case.head_size,
            tied=not chosen.separate,
            queries=case.seq_q,
            keys=case.seq_k,
            causal=case.causal,
            training=case.training,
            capability=machine.capability,
        )
        return paths.refusal(request)
    if chosen.forward is _reference:
        # Scores, masked scores and weights, each with a gradient; key and value expanded to all heads.
        scores = case.batch * case.heads * case.seq_q * case.seq_k * case.torch_dtype.itemsize
        need = 6 * scores + 2 * case.key_bytes() * (case.heads // case.groups)
        return _too_much(need, machine, "its scores and expanded keys")
    return ""


def _too_much(need: int, machine: Machine, what: str) -> str:
    machine.release()
    free = machine.free_bytes()
    if need <= 0.8 * free:
        return ""
    return f"{what} need {need / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free"


def errors(
    case: Case, implementations: Sequence[str], device: torch.device
) -> dict[str, tuple[float, float]]:
    """Largest error against float64 on the reduced case, and its ratio to plain PyTorch's in the same dtype.

    Errors are the output's, or the gradients' where the case has a backward.
    """
    reduced = case.reduced()
    inputs = make_inputs(reduced, device)
    found = {}
    for name in implementations:
        own = inputs[IMPLEMENTATIONS[name].separate]
        expected = operation(reduced, "reference", own.exact())()
        error, plain = (
            max((x.double() - y).abs().max().item() for x, y in zip(got, expected, strict=True))
            for got in (operation(reduced, which, own)() for which in (name, "reference"))
        )
        found[name] = (error, error / plain if plain else float("nan"))
    return found


@dataclass(frozen=True)
class Result:
    """One implementation of a case, measured.

    Attributes:
        times: seconds of one operation.
        bytes: what had to be moved; floor: seconds that the machine's roofline allows.
        ratios: time of each baseline / this time, without those that were not measured.
        error, error_ratio: see :func:`errors`.
        peak_bytes: memory beyond the inputs, None on a CPU.
    """

    case: Case
    implementation: str
    times: Times
    bytes: int
    floor: float
    ratios: dict[str, float]
    error: float
    error_ratio: float
    peak_bytes: int | None

    @property
    def tflops(self) -> float:
        return self.case.flops() / self.times.median / 1e12

    @property
    def gbps(self) -> float:
        return self.bytes / self.times.median / 1e9

    @property
    def percent_of_roofline(self) -> float:
        return 100 * self.floor / self.times.median


def run_case(
    case: Case, implementations: Sequence[str], machine: Machine, roofline: Roofline, budget: float
) -> tuple[list[Result], dict[str, str]]:
    """Measure a case.

    Args:
        implementations: names in IMPLEMENTATIONS, in the order of the results.
        budget: seconds of measurement for all of them together.
    Returns:
        the results, and why each of the others was left out.
    """
    skipped = {name: refusal(case, name, machine) for name in implementations}
    runnable = [name for name in implementations if not skipped[name]]
    copies = _copies(case, machine)
    # A separate training pair has tensors of its own; paged caches exist twice.
    size = copies * (4 * case.query_bytes() + (4 if case.page_size else 3) * case.key_bytes())
    too_much = _too_much(size, machine, "the inputs")
    if too_much:
        return [], {name: skipped[name] or too_much for name in implementations}
    sets = [make_inputs(case, machine.device) for _ in range(copies)]
    operations: dict[str, Operation] = {}
    peaks: dict[str, int | None] = {}
    for index, name in enumerate(runnable):
        # Each begins with another buffer: none reads what the one before it has just left in a cache.
        first = index * copies // len(runnable)
        own = [made[IMPLEMENTATIONS[name].separate] for made in sets[first:] + sets[:first]]
        try:
            calls = [operation(case, name, inputs) for inputs in own]
            peaks[name] = machine.peak_bytes(calls[0])
            operations[name] = machine.rotated(calls) if case.op == "decode" else Operation(calls[0])
        except torch.OutOfMemoryError as error:
            skipped[name] = str(error).partition("\n")[0]
    found = errors(case, list(operations), machine.device)
    times = measure(operations, machine, budget)
    results = []
    for name, measured in times.items():
        moved = case.bytes(IMPLEMENTATIONS[name].separate)
        results.append(
            Result(
                case=case,
                implementation=name,
                times=measured,
                bytes=moved,
                floor=roofline.seconds(case.flops(), moved, case.torch_dtype),
                ratios={base: times[base].median / measured.median for base in BASELINES if base in times},
                error=found[name][0],
                error_ratio=found[name][1],
                peak_bytes=peaks[name],
            )
        )
    return results, {name: why for name, why in skipped.items() if why}


def _copies(case: Case, machine: Machine) -> int:
    cache = _ROTATED_CACHES * machine.cache_bytes()
    if case.op != "decode" or case.key_bytes() >= cache:
        return 1
    return min(_MOST_BUFFERS, max(len(IMPLEMENTATIONS), -(-cache // case.key_bytes())))
