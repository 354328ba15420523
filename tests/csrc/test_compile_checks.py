"""What nvcc made of the CUDA kernels, read from the build's own object: registers, spills, instructions.

The build (setup.py, modes nvcc and cuda) keeps ptxas's report and the object below build/; nothing is
compiled here. HMMA is the tensor-core product, LDSM the shared-memory matrix load, LDGSTS the asynchronous
copy, LDL and STL the traffic of spilled registers.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"extension-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
REPORT, OBJECT = BUILD / "shared_kv_attention.o.log", BUILD / "shared_kv_attention.o"
HEAD_SIZES = (64, 80, 128)
TYPES = {"__half": "F16", "__nv_bfloat16": "BF16"}

# Registers of a thread at which the kernel still has the blocks per multiprocessor that it is planned for.
TWO_BLOCKS_OF_128, EIGHT_BLOCKS_OF_256 = 255, 40
BUDGETS = {
    "forward_kernel": TWO_BLOCKS_OF_128,
    "backward_key_kernel": TWO_BLOCKS_OF_128,
    "backward_query_kernel": TWO_BLOCKS_OF_128,
    "backward_row_terms_kernel": EIGHT_BLOCKS_OF_256,
    "fragments_to_rows_kernel": EIGHT_BLOCKS_OF_256,
    "decode_kernel": TWO_BLOCKS_OF_128,
    "decode_combine_kernel": EIGHT_BLOCKS_OF_256,
}


def forward_products(e: int) -> int:
    """32 query rows of a warp, 64 keys: scores (at e 128 unrolled by 4 of 8 steps) and output."""
    steps = 4 if e == 128 else e // 16
    return 2 * (64 // 8) * steps + 2 * (e // 8) * (64 // 16)


def backward_key_products(e: int) -> int:
    """32 keys of a warp, 64 (e 64) or 32 queries; the two score products are unrolled by 2 of e/16 steps."""
    queries = 64 if e == 64 else 32
    steps = e // 16
    scores = 2 * 2 * (queries // 8) * (2 + steps % 2)
    keys = 2 * 2 * (e // 8) * (queries // 16)
    query = (queries // 16) * (e // 8) * (128 // 16) // 4
    return scores + keys + query


def backward_query_products(e: int) -> int:
    """16 query rows of a warp, 64 keys: scores, their gradient, and the query's gradient."""
    return 3 * (64 // 8) * (e // 16)


def decode_products(e: int, row_tiles: int) -> int:
    """16 keys of a warp: scores and output of one or two tiles of 16 query rows."""
    return row_tiles * ((16 // 8) * (e // 16) + e // 8)


def expected_kernels() -> dict[str, int]:
    """Every kernel by its name in the object, with its tensor-core products."""
    kernels = {}
    for element in TYPES:
        for e in HEAD_SIZES:
            kernels[f"forward_kernel<{element}, {e}>"] = forward_products(e)
            kernels[f"backward_key_kernel<{element}, {e}>"] = backward_key_products(e)
            kernels[f"backward_query_kernel<{element}, {e}>"] = backward_query_products(e)
            kernels[f"backward_row_terms_kernel<{element}, {e}>"] = 0
            kernels[f"fragments_to_rows_kernel<{element}, {e}>"] = 0
            kernels[f"decode_combine_kernel<{element}, {e}>"] = 0
            for row_tiles in (1, 2):
                kernels[f"decode_kernel<{element}, {e}, {row_tiles}>"] = decode_products(e, row_tiles)
    return kernels


def short_names(mangled: list[str]) -> list[str]:
    plain = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [
        re.sub(r"^(?:void )?sharedproj::cuda::", "", line).split("(")[0] for line in plain.stdout.splitlines()
    ]


@pytest.fixture(scope="module")
def report() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> stack, spill and register figures of ptxas."""
    if not REPORT.exists():
        pytest.skip("no device code in the build (mode cpu: nvcc was not found)")
    entry = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = entry.findall(REPORT.read_text())
    names = short_names([match[0] for match in found])
    return {
        (match[1], name): dict(
            zip(("stack", "stores", "loads", "registers"), map(int, match[2:]), strict=True)
        )
        for name, match in zip(names, found, strict=True)
    }


def test_every_kernel_is_built_for_every_architecture(report: Any) -> None:
    architectures = {architecture for architecture, _ in report}
    assert architectures
    assert set(report) == {(a, kernel) for a in architectures for kernel in expected_kernels()}


def test_no_register_spills(report: Any) -> None:
    spilled = {
        key: figures
        for key, figures in report.items()
        if figures["stack"] or figures["stores"] or figures["loads"]
    }
    assert not spilled


def test_registers_stay_in_budget(report: Any) -> None:
    over = {
        key: figures["registers"]
        for key, figures in report.items()
        if figures["registers"] > BUDGETS[key[1].split("<")[0]]
    }
    assert not over


def disassembler() -> str:
    for folder in map(Path, sys.path):
        for found in folder.glob("nvidia/*/bin/cuobjdump"):
            return str(found)
    return shutil.which("cuobjdump") or ""


@functools.cache
def instructions(architecture: str) -> dict[str, Counter[str]]:
    """kernel -> how often each SASS instruction occurs."""
    tool = disassembler()
    # cuobjdump looks for nvdisasm on the PATH.
    listing = subprocess.run(
        [tool, "-sass", "-arch", architecture, str(OBJECT)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{Path(tool).parent}:/usr/bin:/bin"},
    ).stdout
    parts = re.split(r"Function : (\S+)", listing)[1:]
    names, bodies = short_names(parts[::2]), parts[1::2]
    opcode = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", re.MULTILINE)
    return {name: Counter(opcode.findall(body)) for name, body in zip(names, bodies, strict=True)}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def listing(request: Any) -> dict[str, Counter[str]]:
    if not OBJECT.exists():
        pytest.skip("no device code in the build (mode cpu: nvcc was not found)")
    if not disassembler():
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if f"for '{request.param}'" not in REPORT.read_text():
        pytest.skip(f"the build has no device code for {request.param}")
    return instructions(request.param)


def count(counter: Counter[str], prefix: str) -> int:
    return sum(n for opcode, n in counter.items() if opcode.startswith(prefix))


def test_tensor_core_instructions_are_as_the_formula_says(listing: Any) -> None:
    found, wanted = {}, {}
    for kernel, products in expected_kernels().items():
        element = next(name for key, name in TYPES.items() if key in kernel)
        wanted[kernel] = products
        found[kernel] = count(listing[kernel], "HMMA.16816.F32" + (".BF16" if element == "BF16" else ""))
        assert count(listing[kernel], "HMMA") == found[kernel]
    assert found == wanted


def test_no_local_memory_traffic(listing: Any) -> None:
    touched = {k: c for k, c in listing.items() if count(c, "LDL") or count(c, "STL")}
    assert not touched


def test_tiles_come_by_asynchronous_copies_and_matrix_loads(listing: Any) -> None:
    for kernel, products in expected_kernels().items():
        assert (count(listing[kernel], "LDGSTS.E") > 0) == (products > 0), kernel
        # One tile in both roles: plain loads for the scores, transposed ones for the output.
        assert (count(listing[kernel], "LDSM.16.M88.4") > 0) == (products > 0), kernel
        assert (count(listing[kernel], "LDSM.16.MT88.4") > 0) == (products > 0), kernel


def test_only_the_splitting_kernels_use_atomics(listing: Any) -> None:
    users = {k for k, c in listing.items() if count(c, "RED") or count(c, "ATOM")}
    assert users == {k for k in expected_kernels() if k.startswith("backward_key_kernel")}
