"""Freed memory is used again within keep_freed_memory, and not after it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, torch
from megatron_sharedproj.cpu_memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.ones(1)
with keep_freed_memory():
    print(min(faults() for _ in range(8)))
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("own_setting", [False, True])
def test_freed_memory_is_used_again(own_setting: bool) -> None:
    """A tensor of 64 MiB has 16,384 pages; a user's own setting of malloc is respected."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if own_setting:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    out = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=environment, capture_output=True, text=True, check=True
    ).stdout
    within, after = (int(word) for word in out.split())
    assert within > 60_000 if own_setting else within < 1_000
    assert after > 16_000
