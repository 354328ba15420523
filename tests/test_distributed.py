"""Process groups."""

from __future__ import annotations

import datetime
from typing import Any

import torch


def test_every_group_has_the_runs_timeout(parallel_state: Any) -> None:
    """Megatron-Core gives its own groups 30 minutes where it is not told."""
    groups = (
        None,
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_context_parallel_group(),
        parallel_state.get_embedding_group(),
    )
    for group in groups:
        backend = (group or torch.distributed.group.WORLD)._get_backend(torch.device("cpu"))
        assert backend.options._timeout == datetime.timedelta(minutes=10)
