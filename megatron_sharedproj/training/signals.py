"""SIGTERM, SIGINT and SIGUSR1 as a flag that the loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A stop signal arrived where there is nothing to save."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context manager: remembers the first stop signal; a second SIGINT interrupts as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def any_rank(self, device: torch.device) -> bool:
        """Whether any rank got a signal; collective, so that all ranks stop at the same step."""
        flag = torch.tensor([int(self.received is not None)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def raise_if_any(self, device: torch.device) -> None:
        """Raises Stopped on all ranks if any got a signal; collective."""
        if self.any_rank(device):
            raise Stopped(self.received or signal.SIGTERM)
