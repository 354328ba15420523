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
    for name in (
        # Megatron-Core 0.19 logs at each start that GPTModel will be replaced one day.
        "megatron.core.models.gpt.gpt_model",
        # A CUDA build of torch where there is no GPU; env.py and the trainer say what is used.
        "torch.utils.cpp_extension",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # 0.19 with the distributed optimizer: a layout that it computes by itself where it is not given.
    data_parallel = logging.getLogger("megatron.core.distributed.distributed_data_parallel")
    data_parallel.addFilter(_no_layout_warning)


def _no_layout_warning(record: logging.LogRecord) -> bool:
    return "full_param_layout" not in record.getMessage()
