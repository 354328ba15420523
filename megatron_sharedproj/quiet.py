"""Keeps other libraries' routine warnings out of a user's terminal."""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """Drop warnings that no user of this package can act on.

    Megatron-Core warns about each optional GPU library that is absent (our log says which path runs);
    torch's checkpoint code warns about the ShardedTensor that Megatron-Core gives it.
    """
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
