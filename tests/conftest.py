"""Shared fixtures: one thread, and a process group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Before torch is imported: small tensors gain nothing from threads, and the machine is shared.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def parallel_state() -> Iterator[Any]:
    """Megatron's parallel state over this one process; yields its module."""
    import torch

    from megatron_sharedproj import distributed
    from megatron_sharedproj.device import get_device

    torch.set_num_threads(1)
    before = {name: os.environ.get(name) for name in _LAUNCH}
    distributed.initialize(get_device(), seed=1)
    # A training that a later test starts must not take itself for a rank of this group.
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from megatron.core import parallel_state as state

    yield state
    distributed.finalize()
