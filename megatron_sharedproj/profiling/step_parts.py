"""Which part of a training step a moment belongs to: ranges for torch.profiler, and the times of its events.

The ranges are hooks and wrappers on one Trainer, put on for a profile and taken off after it; the model's
code has none. Backward has no ranges of its own: autograd gives each backward node the sequence number of
the forward operation that made it, and with it that operation's part.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch.profiler import record_function

PREFIX = "part: "
REST_OF_MODEL, BUFFERS, COMMUNICATION, REST = (
    "rest of the model",
    "gradient buffers",
    "gradient communication",
    "rest of the step",
)
CLIPPING, UPDATE, DATA, LOSS = "gradient checks and clipping", "optimizer update", "data", "loss"
# What a module does, by the last word of its name in Megatron's GPTModel.
_MODULES = {
    "embedding": "embedding",
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "final_layernorm": "norms",
    "q_layernorm": "norms",
    "k_layernorm": "norms",
    "linear_qkv": "projection",
    "core_attention": "attention core",
    "linear_proj": "output projection",
    "mlp": "MLP",
    "output_layer": "head",
}
MODEL_PARTS = (*dict.fromkeys(_MODULES.values()), LOSS, REST_OF_MODEL)
PARTS = (DATA, *MODEL_PARTS, BUFFERS, COMMUNICATION, CLIPPING, UPDATE, REST)

_BACKWARD = "autograd::engine::evaluate_function"  # how the profiler names a node of the backward pass
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm", "mkldnn::_linear")


@dataclass
class PartTime:
    """Seconds of one step in a part.

    On a GPU the time of its kernels, on a CPU of the calling thread; `host` is the latter on both.
    `products` is what matrix products take of it.
    """

    forward: float = 0.0
    backward: float = 0.0
    products: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass
class OperatorTime:
    """Seconds that one operator takes itself (not those that it calls), and its calls, in one step."""

    name: str
    seconds: float = 0.0
    calls: float = 0.0


class Ranged:
    """An iterator whose every `next` is a range of the part ``data``."""

    def __init__(self, inner: Iterator[Any]):
        self._inner = inner

    def __iter__(self) -> Ranged:
        return self

    def __next__(self) -> Any:
        with record_function(PREFIX + DATA):
            return next(self._inner)


def _wrap(stack: ExitStack, owner: Any, name: str, part: str) -> None:
    """Make calls of owner.name a range until the stack unwinds; nothing where there is no such name."""
    inner = getattr(owner, name, None)
    if inner is None:
        return

    @functools.wraps(inner)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return inner(*args, **kwargs)

    own = name in vars(owner)
    setattr(owner, name, ranged)
    stack.callback(setattr, owner, name, inner) if own else stack.callback(delattr, owner, name)


def _hook(stack: ExitStack, module: Any, part: str) -> None:
    """Make a module's forward a range until the stack unwinds."""
    opened: list[Any] = []

    def before(*unused: Any) -> None:
        opened.append(record_function(PREFIX + part).__enter__())

    def after(*unused: Any) -> None:
        opened.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _optimizers(optimizer: Any) -> list[Any]:
    """Megatron's optimizers under its chain of them."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


@contextmanager
def ranges(trainer: Any) -> Iterator[None]:
    """Ranges around every part of `trainer`'s steps (training.loop.Trainer)."""
    model, optimizer = trainer.model, trainer.optimizer
    with ExitStack() as stack:
        _hook(stack, model, REST_OF_MODEL)
        for name, module in model.module.named_modules():
            part = _MODULES.get(name.rpartition(".")[2])
            if part is not None:
                _hook(stack, module, part)
        _wrap(stack, model.module, "compute_language_model_loss", LOSS)
        _wrap(stack, trainer, "step", REST)
        _wrap(stack, model, "zero_grad_buffer", BUFFERS)
        _wrap(stack, optimizer, "zero_grad", BUFFERS)
        _wrap(stack, model.config, "finalize_model_grads_func", COMMUNICATION)
        for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
            for name in ("start_grad_sync", "finish_grad_sync", "start_param_sync", "finish_param_sync"):
                _wrap(stack, group, name, COMMUNICATION)
        _wrap(stack, trainer, "_gradients_are_finite", CLIPPING)
        # The optimizer's step is clipping and copies around the update, which torch's own optimizer does.
        _wrap(stack, optimizer, "step", CLIPPING)
        for each in _optimizers(optimizer):
            _wrap(stack, each.optimizer, "step", UPDATE)
        yield


class _Attribution:
    """The part and direction of each event: its innermost range's, or its forward operation's."""

    def __init__(self, events: Iterable[Any]):
        self._known: dict[int, tuple[str, bool]] = {}
        self._forward: dict[tuple[int, int], str] = {}
        # Operations without a gradient share the number of the next one that has: the last start is its own.
        for event in sorted(events, key=lambda event: event.time_range.start):
            if event.sequence_nr >= 0:
                part, backward = self.of(event)
                if not backward:
                    self._forward[event.thread, event.sequence_nr] = part
        self._known.clear()

    def of(self, event: Any) -> tuple[str, bool]:
        """Part, and whether in the backward pass."""
        known = self._known.get(id(event))
        if known is None:
            known = self._known[id(event)] = self._find(event)
        return known

    def _find(self, event: Any) -> tuple[str, bool]:
        above = self.of(event.cpu_parent) if event.cpu_parent is not None else (REST, False)
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX), above[1]
        if event.name.startswith(_BACKWARD):
            if "AccumulateGrad" in event.name:
                return BUFFERS, True
            return self._forward.get((event.fwd_thread, event.sequence_nr), REST_OF_MODEL), True
        return above


def _device_seconds(event: Any) -> float:
    # The range itself appears among the kernels of a GPU's trace, under its own name.
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) * 1e-6


def breakdown(
    events: Iterable[Any], steps: int, *, on_gpu: bool = False
) -> tuple[dict[str, PartTime], list[OperatorTime]]:
    """Times of one step from the events of a profile of several.

    Args:
        events: ``torch.profiler.profile.events()`` of steps taken under :func:`ranges`.
        steps: how many.
        on_gpu: count the time of kernels, not that of the thread that launches them.
    Returns:
        part -> seconds, in order of :data:`PARTS`; operators, the longest first.
    """
    calls = [event for event in events if not event.is_async and str(event.device_type).endswith("CPU")]
    roots = {event.thread for event in calls if event.name == PREFIX + REST}
    parts = {name: PartTime() for name in PARTS}
    operators: dict[str, OperatorTime] = defaultdict(lambda: OperatorTime(""))
    attribution = _Attribution(calls)
    for event in calls:
        part, backward = attribution.of(event)
        # Outside of the steps, or another thread's: on a CPU backward runs in the thread that asks for it.
        inside = event.thread in roots and _is_inside(event)
        host = event.self_cpu_time_total * 1e-6 / steps if inside else 0.0
        seconds = _device_seconds(event) / steps if on_gpu else host
        time = parts[part]
        time.host += host
        if backward:
            time.backward += seconds
        else:
            time.forward += seconds
        if event.name.startswith(_PRODUCTS):
            time.products += seconds
        if seconds and not event.name.startswith((PREFIX, _BACKWARD)):
            operator = operators[event.name]
            operator.name = event.name
            operator.seconds += seconds
            operator.calls += 1 / steps
    return parts, sorted(operators.values(), key=lambda operator: -operator.seconds)


def _is_inside(event: Any) -> bool:
    while event is not None:
        if event.name == PREFIX + REST:
            return True
        event = event.cpu_parent
    return False
