"""GPUs by name."""

from __future__ import annotations

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.profiling.hardware import GIB, GPUS, find_gpu


@pytest.mark.parametrize(
    "name, found",
    [
        ("A100-40GB", "A100-40GB"),
        ("a100-40gb", "A100-40GB"),
        ("A100 80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-80GB-PCIe"),
        ("NVIDIA H100 NVL", "H100-94GB-NVL"),
        ("H100", "H100-80GB"),
        ("H200", "H200-141GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
    ],
)
def test_names_of_drivers_and_of_the_table(name: str, found: str) -> None:
    assert find_gpu(name) is GPUS[found]


@pytest.mark.parametrize("name", GPUS)
def test_the_table_is_one_with_the_mfus(name: str) -> None:
    gpu = GPUS[name]
    assert gpu.peak == formulas.peak_flops(name.replace("-", " "))
    memory = next(word for word in name.split("-") if word.endswith("GB"))
    # What processes get is a little less than the name says.
    assert 0.9 * int(memory[:-2]) * 1e9 < gpu.memory < int(memory[:-2]) * GIB
    assert 300e9 < gpu.bandwidth < 10e12


def test_a_name_of_several_lists_them() -> None:
    with pytest.raises(
        ValueError, match="--gpu A100: several are named so; choose one of A100-40GB, .*A100-80GB"
    ):
        find_gpu("A100")


@pytest.mark.parametrize("name, close", [("A101", "A100-40GB"), ("H10O", "H100-80GB"), ("L40", "L40S-48GB")])
def test_an_unknown_name_lists_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"--gpu {name}: unknown; did you mean .*{close}.*--memory-gib"):
        find_gpu(name)


@pytest.mark.parametrize("name", ["", "NVIDIA", "toaster"])
def test_a_name_like_none_lists_all(name: str) -> None:
    with pytest.raises(ValueError, match=f"--gpu {name}: unknown; known: A100-40GB, .*V100-32GB"):
        find_gpu(name)
