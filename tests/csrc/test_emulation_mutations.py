"""The emulation must notice broken kernels: each mutation of the sources has to fail in the way it should.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from emulator import COMPILER, NO_COMPILER, Emulator, Refused, build, read_sources
from oracle import exact

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

# One kernel, dtype and head size instead of all: a mutant compiles in half a second.
FORWARD_UNIT = """
#include "shared_kv_forward.cuh"
namespace sharedproj::cuda {
const char* forward(const ForwardParams& params, void* stream) {
  return launch_forward<bf16_t, %d>(params, stream);
}
const char* decode(const DecodeParams&, void*) { return "left out"; }
int32_t decode_num_splits(const DecodeParams&) { return 0; }
size_t decode_workspace_bytes(const DecodeParams&) { return 0; }
"""
DECODE_UNIT = """
#include "shared_kv_decode.cuh"
namespace sharedproj::cuda {
const char* forward(const ForwardParams&, void*) { return "left out"; }
const char* decode(const DecodeParams& params, void* stream) {
  return launch_decode<bf16_t, %d>(params, stream);
}
int32_t decode_num_splits(const DecodeParams& params) { return choose_num_splits(params); }
size_t decode_workspace_bytes(const DecodeParams& params) { return decode_workspace(params); }
"""
UNIT_END = """
const char* backward(const BackwardParams&, void*) { return "left out"; }
size_t backward_workspace_bytes(const BackwardParams&) { return 0; }
}  // namespace sharedproj::cuda
"""


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    caught_by: str  # wrong, conflict, or a part of the emulation's message
    e: int = 64


def parameters(mutations: list[Mutation]) -> list[object]:
    """Wrong arithmetic is what the kernels' own tests are for: most of it waits for the slow tests."""
    arithmetic = [mutation for mutation in mutations if mutation.caught_by == "wrong"]
    return [
        pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each in arithmetic[3:] else [])
        for each in mutations
    ]


def forward(name: str, caught_by: str, *changes: tuple[str, str], e: int = 64) -> Mutation:
    return Mutation(name, "shared_kv_forward.cuh", changes, caught_by, e)


def decode(name: str, caught_by: str, *changes: tuple[str, str], e: int = 64) -> Mutation:
    return Mutation(name, "shared_kv_decode.cuh", changes, caught_by, e)


FORWARD = [
    forward("no barrier after the wait", "race", ("    sync_block();  // this tile has landed", "    //")),
    forward(
        "wait leaves one group more", "race", ("cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>")
    ),
    forward(
        "stage overwritten while read",
        "race",
        ("int next_stage = stage == 0 ? kStages - 1 : stage - 1;", "int next_stage = stage;"),
    ),
    forward("no barrier before out without keys", "race", ("  if (key_tiles == 0)\n    sync_block();", "")),
    forward("copies under way at the end", "cp.async still under way", ("  cp_async_wait<0>();", "")),
    forward("rows exchanged without sync_warp", "race between lanes", ("  sync_warp();\n", "")),
    forward(
        "barrier that one warp skips",
        "deadlock",
        ("  if (key_tiles == 0)\n    sync_block();", "  if (warp_index() != 1) sync_block();"),
    ),
    forward(
        "collective that one lane skips",
        "different collectives",
        (
            "        largest = fmaxf(largest, shuffle_xor(largest, 2));",
            "        if (lane_index() != 5) largest = fmaxf(largest, shuffle_xor(largest, 2));",
        ),
    ),
    forward(
        "causal mask one key late",
        "wrong",
        ("const int diagonal = t - s + 1;", "const int diagonal = t - s + 2;"),
    ),
    forward(
        "causal mask one key early",
        "wrong",
        ("const int diagonal = t - s + 1;", "const int diagonal = t - s;"),
    ),
    forward("top-left causal mask", "wrong", ("const int diagonal = t - s + 1;", "const int diagonal = 1;")),
    forward("mask begins one tile late", "wrong", ("if (tile >= first_masked)", "if (tile > first_masked)")),
    forward("no ragged mask", "wrong", ("min(t, row + diagonal) : t)", "row + diagonal : t + kKeys)")),
    forward("no scale", "wrong", ("params.problem.scale * kLog2E", "kLog2E")),
    forward("sum not rescaled", "wrong", ("row_sum[m][half] *= rescale;", "")),
    forward("out not rescaled", "wrong", ("out[m][n][half * 2] *= rescale;", "")),
    forward(
        "maximum over half a row", "wrong", ("        largest = fmaxf(largest, shuffle_xor(largest, 2));", "")
    ),
    forward(
        "lse without the maximum",
        "wrong",
        ("(row_max[m][half] + log2_fast(sum)) * kLn2", "log2_fast(sum) * kLn2"),
    ),
    forward(
        "group of the wrong head",
        "wrong",
        ("block.head / (problem.heads / problem.groups)", "block.head % problem.groups"),
    ),
    forward(
        "writes a row behind the end",
        "outside its output",
        ("    if (row_start + row < s) {", "    if (row_start + row <= s) {"),
    ),
    forward("reads keys behind the end", "reads outside", ("t - tile * kKeys,", "kKeys,")),
    forward(
        "reads queries behind the end",
        "reads outside",
        ("s - row_start,\n", "kRows,\n"),
    ),
    forward(
        "too little shared memory",
        "shared memory access",
        ("kSharedBytes = (kRows + kStages", "kSharedBytes = (kRows + (kStages - 1)"),
    ),
    forward(
        "operands of the second product swapped",
        "wrong",
        ("out[m][n], a[m], b[0], b[1]", "out[m][n], a[m], b[0], b[2]"),
    ),
]
TILE = [
    Mutation(
        "no swizzle",
        "shared_kv_tile.cuh",
        (("chunk ^ (row & 7)", "chunk"), ("(lane / 16 ^ lane % 8) * 8 ^ column", "lane / 16 * 8 + column")),
        "conflict",
    ),
    Mutation(
        "no swizzle at 80", "shared_kv_tile.cuh", (("chunk ^ ((row >> 2) & 1)", "chunk"),), "conflict", 80
    ),
    Mutation(
        "swizzle on one side only", "shared_kv_tile.cuh", (("chunk ^ (row & 7)", "chunk"),), "wrong", 128
    ),
]
DECODE = [
    decode(
        "wait leaves one group more",
        "wrong",
        ("cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
    ),
    decode("no sync_warp after the wait", "race between lanes", ("    sync_warp();\n", "")),
    decode(
        "no barrier after the query",
        "race",
        ("  cp_async_wait<kStages - 1>();\n  sync_block();", "  cp_async_wait<kStages - 1>();\n"),
    ),
    decode(
        "no barrier before the merge",
        "race",
        ("  sync_block();\n#pragma unroll\n  for (int m", "#pragma unroll\n  for (int m"),
    ),
    decode("no barrier in the merge", "race", ("  sync_block();\n\n  // A warp takes", "  // A warp takes")),
    decode(
        "merge rows not staggered", "conflict", ("kMergeStride = kHeadSize + 8", "kMergeStride = kHeadSize")
    ),
    decode(
        "merge without the other warps' maxima", "wrong", ("exp2_fast(row_max[m][half] - largest)", "1.f")
    ),
    decode(
        "keys behind the length",
        "wrong",
        ("min(length, r / heads_per_group + length - s + 1)", "length + kDecodeKeys"),
    ),
    decode(
        "queries see later keys", "wrong", ("min(length, r / heads_per_group + length - s + 1)", "length")
    ),
    decode("mask begins late", "wrong", ("start + 16 > unmasked", "start > unmasked")),
    decode(
        "splits overlap",
        "wrong",
        (
            "first_tile = split * tiles_per_split;",
            "first_tile = split > 0 ? split * tiles_per_split - 1 : 0;",
        ),
    ),
    decode(
        "combination without weights",
        "wrong",
        ("exp2_fast((plan.partial_lse[partial_row] - shift) * kDecodeLog2E) * inverse", "inverse"),
    ),
    decode(
        "combination without normalisation",
        "wrong",
        (
            "exp2_fast((plan.partial_lse[partial_row] - shift) * kDecodeLog2E) * inverse",
            "exp2_fast((plan.partial_lse[partial_row] - shift) * kDecodeLog2E)",
        ),
    ),
    decode("lse of the first split", "wrong", ("shift + log2_fast(sum) * kDecodeLn2", "shift")),
    decode("page of another position", "wrong", ("+ position / params.page_size", "")),
    decode("start of the page only", "wrong", ("in_page * params.key_strides.seq", "0")),
    decode(
        "heads in another order",
        "wrong",
        ("group * heads_per_group + r % heads_per_group", "r % heads_per_group * params.groups + group"),
    ),
]


def load(sources: dict[str, str], unit: str, e: int) -> Emulator:
    return Emulator(build({**sources, "unit.cu": unit % e + UNIT_END}, "unit.cu"))


def sources_without_backward() -> dict[str, str]:
    """Changes in the backward kernels then leave the mutants' objects as they are."""
    return {
        name: text for name, text in read_sources().items() if "backward" not in name and name[-2:] != "cu"
    }


def differs(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    (out, lse), (exact_out, exact_lse) = result, expected
    return not (
        torch.allclose(out.double(), exact_out, atol=0.02, rtol=0.02)
        and torch.allclose(lse.double(), exact_lse, atol=1e-4, rtol=0)
    )


def forward_findings(kernels: Emulator, e: int) -> set[str]:
    findings: set[str] = set()
    for s, t, causal in ((150, 150, True), (40, 280, False), (90, 60, True), (30, 0, False)):
        random = torch.Generator().manual_seed(s)
        query = 2 * torch.randn(1, s, 4, e, generator=random).bfloat16()
        key = torch.randn(1, t, 2, e, generator=random).bfloat16()
        results = []
        for seed in range(3):
            try:
                results.append(kernels.forward(query, key, causal=causal, seed=seed))
            except (Refused, AssertionError) as error:
                findings.add(str(error))
                continue
            if differs(results[-1], exact(query, key, causal=causal)):
                findings.add("wrong")
            if kernels.bank_conflicts():
                findings.add("conflict")
    return findings


def decode_findings(kernels: Emulator, e: int) -> set[str]:
    findings: set[str] = set()
    random = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, 2, 4, e, generator=random).bfloat16()
    key = torch.randn(2, 640, 2, e, generator=random).bfloat16()
    lengths = torch.tensor([600, 70], dtype=torch.int32)
    pages, table = key.view(10, 128, 2, e), torch.arange(10, dtype=torch.int32).view(2, 5)
    parts = [exact(query[i : i + 1], key[i : i + 1, : lengths[i]], causal=True) for i in range(2)]
    expected = (torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]))
    for num_splits in (1, 3):
        for seed in range(3):
            try:
                result = kernels.decode(
                    query, pages, seqlens=lengths, block_table=table, num_splits=num_splits, seed=seed
                )
            except (Refused, AssertionError) as error:
                findings.add(str(error))
                continue
            if differs(result, expected):
                findings.add("wrong")
            if kernels.bank_conflicts():
                findings.add("conflict")
    return findings


@pytest.mark.parametrize("e", [64, pytest.param(80, marks=pytest.mark.slow), 128])
def test_unchanged_sources_have_no_findings(e: int) -> None:
    sources = sources_without_backward()
    assert forward_findings(load(sources, FORWARD_UNIT, e), e) == set()
    assert decode_findings(load(sources, DECODE_UNIT, e), e) == set()


def test_heads_in_sections_give_the_same() -> None:
    """Sections of heads that share the L2 cache: here a section holds the heads of one group only."""
    sources = sources_without_backward()
    before = "kSectionBytes = 16 << 20"
    assert before in sources["shared_kv_forward.cuh"]
    small = sources["shared_kv_forward.cuh"].replace(before, "kSectionBytes = 16 << 10")
    kernels = load({**sources, "shared_kv_forward.cuh": small}, FORWARD_UNIT, 64)
    assert forward_findings(kernels, 64) == set()


def mutate(mutation: Mutation, unit: str) -> Emulator:
    sources = sources_without_backward()
    for before, after in mutation.changes:
        assert before in sources[mutation.file], f"{mutation.file} no longer contains {before!r}"
        sources[mutation.file] = sources[mutation.file].replace(before, after)
    return load(sources, unit, mutation.e)


@pytest.mark.parametrize("mutation", parameters(FORWARD + TILE))
def test_forward_mutations_are_caught(mutation: Mutation) -> None:
    findings = forward_findings(mutate(mutation, FORWARD_UNIT), mutation.e)
    assert any(mutation.caught_by in finding for finding in findings), findings


@pytest.mark.parametrize("mutation", parameters(DECODE))
def test_decode_mutations_are_caught(mutation: Mutation) -> None:
    findings = decode_findings(mutate(mutation, DECODE_UNIT), mutation.e)
    assert any(mutation.caught_by in finding for finding in findings), findings
