"""Second moments of the inputs of each attention's projection, on real tokens.

Shape legend: n sequences, s sequence length, b batch, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj.retrofit.least_squares import Moments


class _Reached(Exception):
    """The forward pass has come as far as it is needed."""


class _Inputs:
    """A layer's arguments, of a batch, so that layers run one after the other."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs

    def run(self, layer: Any) -> None:
        """Run a layer: its output is the next one's input."""
        hidden = layer(*self.args, **self.kwargs)
        self.replace(hidden[0] if isinstance(hidden, tuple) else hidden)

    def replace(self, hidden: Tensor) -> None:
        if "hidden_states" in self.kwargs:
            self.kwargs = {**self.kwargs, "hidden_states": hidden}
        else:
            self.args = (hidden, *self.args[1:])


def calibration_rows(tokens: Any, seq_length: int, prefix: str) -> Tensor:
    """Whole sequences [n, s] of a token stream.

    Raises:
        ValueError: if there is not one.
    """
    rows = len(tokens) // seq_length
    if rows < 1:
        raise ValueError(
            f"--calibration-data {prefix}: {len(tokens)} tokens (--calibration-tokens) are less than one "
            f"sequence of {seq_length}; give more"
        )
    return torch.from_numpy(tokens[: rows * seq_length].astype("int64")).view(rows, seq_length)


@torch.no_grad()
def calibrate(
    model: Any,
    rows: Tensor,
    each: Callable[[int, Moments], None],
    *,
    sequential: bool = True,
    batch_size: int = 8,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Go through a model's layers, and hand over the moments of each attention's inputs.

    All hidden states [n, s, d] are kept, so that every layer runs once or twice, not all layers before it.

    Args:
        model: GPTModel of one process, in evaluation mode.
        rows: [n, s] token ids.
        each: called with a layer's index and its moments; may change that layer's weights.
        sequential: later layers see the activations behind a changed layer, not those of the source.
        say: told how many layers are done.
    """
    device = next(model.parameters()).device
    batches = [_first_inputs(model, part.to(device)) for part in rows.split(batch_size)]
    layers = model.decoder.layers
    for index, layer in enumerate(layers):
        sums = _Sums(model.config.hidden_size, device)
        hook = layer.self_attention.linear_qkv.register_forward_pre_hook(
            lambda module, inputs, sums=sums: sums.add(inputs[0], stop=sequential)
        )
        try:
            for inputs in batches:
                try:
                    inputs.run(layer)
                except _Reached:
                    pass
        finally:
            hook.remove()
        each(index, sums.moments())
        if sequential:
            for inputs in batches:
                inputs.run(layer)
        say(index + 1, len(layers))


class _Sums:
    """Running sums of x x^T and x in fp64."""

    def __init__(self, size: int, device: torch.device):
        self.second = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.first = torch.zeros(size, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x: Tensor, *, stop: bool) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        self.second += x.mT @ x
        self.first += x.sum(0)
        self.count += len(x)
        if stop:
            raise _Reached

    def moments(self) -> Moments:
        return Moments((self.second / self.count).cpu(), (self.first / self.count).cpu(), self.count)


def _first_inputs(model: Any, tokens: Tensor) -> _Inputs:
    """What the first layer is called with."""
    found: list[_Inputs] = []

    def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_Inputs(args, kwargs))
        raise _Reached

    hook = model.decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    try:
        model(tokens, positions, None)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
