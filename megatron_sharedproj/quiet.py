"""Keeps other libraries' routine warnings out of a user's terminal."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Drop warnings that no user of this package can act on.

    Megatron-Core warns about each optional GPU library that is absent (our log says which path runs);
    torch's checkpoint code warns about Megatron-Core's ShardedTensor, and that one process is no group.
    """
    warnings.filterwarnings("ignore", module="megatron")
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch\.distributed")
    # Megatron-Core 0.19 logs at each start that GPTModel will be replaced one day.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
