"""The tests must notice a broken backward: each mutation of its sources has to fail in the way it should.

Shape legend: b sequences, s query length, t key length, h query heads, g groups, e head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_emulated_backward import gradients, make

from emulator import COMPILER, NO_COMPILER, Emulator, Refused, build, read_sources

pytestmark = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

# One dtype and head size instead of all: a mutant compiles in seconds.
UNIT = """
#include "shared_kv_attention.h"
#include "shared_kv_backward.cuh"

namespace sharedproj::cuda {
const char* forward(const ForwardParams&, void*) { return "left out"; }
const char* decode(const DecodeParams&, void*) { return "left out"; }
const char* backward(const BackwardParams& params, void* stream) {
  return launch_backward<bf16_t, %d>(params, stream);
}
size_t backward_workspace_bytes(const BackwardParams& params) {
  return plan_backward(params).workspace_bytes();
}
int32_t decode_num_splits(const DecodeParams&) { return 1; }
size_t decode_workspace_bytes(const DecodeParams&) { return 0; }
}  // namespace sharedproj::cuda
"""
KEYS, TILES, QUERIES = (f"shared_kv_backward{part}.cuh" for part in ("", "_tiles", "_query"))


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str
    caught_by: str  # wrong, nan, conflict, or a part of the emulation's message
    e: int = 64


MUTATIONS = [
    Mutation(
        "no barrier before grad_query", KEYS, "      sync_block();  // the score tile", "      //", "race"
    ),
    Mutation("no barrier after the wait", KEYS, "    sync_block();  // this step's", "    //", "race"),
    Mutation("next step in the stage that is read", KEYS, "(step + 1) % 2", "step % 2", "race"),
    Mutation("no delta", TILES, "terms.y = p.scale * (sum - ", "terms.y = p.scale * (0.f - ", "wrong"),
    Mutation("no gradient of lse", TILES, "p.grad_lse[index]", "0.f", "wrong"),
    Mutation("causal mask one key late", KEYS, "i % 2 + diagonal : ", "i % 2 + diagonal + 1 : ", "wrong"),
    Mutation(
        "mask begins one tile late",
        KEYS,
        "key_start + kKeyRows - 1 > query_start",
        "key_start > query_start",
        "wrong",
    ),
    Mutation(
        "first query tile skipped",
        KEYS,
        "(key_start - diagonal) / kQueryRows *",
        "(key_start - diagonal + kQueryRows - 1) / kQueryRows *",
        "wrong",
    ),
    Mutation("dS without scale", KEYS, "y = y * p.scale -", "y = y -", "wrong"),
    Mutation("rows without keys keep their lse", TILES, "if (lse != -INFINITY)", "if (true)", "nan"),
    Mutation("scores not swizzled", TILES, "chunk ^ (row & 7))", "chunk)", "conflict"),
    Mutation("scores not swizzled at 32 columns", TILES, "chunk ^ (row >> 1 & 3)", "chunk", "conflict", 128),
    Mutation("columns of two warps swapped", KEYS, "turn * 128", "(turn ^ 1) * 128", "wrong", 80),
    Mutation(
        "deterministic: causal mask one key late", QUERIES, "8 + diagonal : ", "8 + diagonal + 1 : ", "wrong"
    ),
    Mutation(
        "deterministic: last key tile left out", QUERIES, "(key_end + kKeyRows - 1)", "key_end", "wrong"
    ),
    Mutation("deterministic: no barrier", QUERIES, "    sync_block();", "    //", "race"),
]


def load(sources: dict[str, str], e: int) -> Emulator:
    return Emulator(build({**sources, "unit.cu": UNIT % e}, "unit.cu"))


def backward_sources() -> dict[str, str]:
    """Changes in the other kernels then leave the mutants' objects as they are."""
    others = ("forward", "decode", "attention.cu")
    return {name: text for name, text in read_sources().items() if not any(each in name for each in others)}


def findings(kernels: Emulator, e: int) -> set[str]:
    found: set[str] = set()
    for s, t, causal in ((150, 150, True), (40, 200, False), (90, 60, True)):
        case = make((1, s, t, 4, 2, e), causal=causal, grad_lse=True)
        if s > t:
            case.grad_lse[..., : s - t] = torch.nan
        expected = gradients(case, torch.float64)
        for deterministic in (False, True):
            for seed in range(2):
                try:
                    results = case.run(kernels, deterministic, seed)
                except (Refused, AssertionError) as error:
                    found.add(str(error))
                    continue
                for result, exact in zip(results, expected, strict=True):
                    if result.isnan().any():
                        found.add("nan")
                    elif not torch.allclose(result.double(), exact, atol=0.05, rtol=0.03):
                        found.add("wrong")
                if kernels.bank_conflicts():
                    found.add("conflict")
    return found


@pytest.mark.parametrize("e", [64, 80, 128])
def test_unchanged_sources_have_no_findings(e: int) -> None:
    assert findings(load(backward_sources(), e), e) == set()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutations_are_caught(mutation: Mutation) -> None:
    sources = backward_sources()
    assert mutation.before in sources[mutation.file], (
        f"{mutation.file} no longer contains {mutation.before!r}"
    )
    sources[mutation.file] = sources[mutation.file].replace(mutation.before, mutation.after)
    found = findings(load(sources, mutation.e), mutation.e)
    assert any(mutation.caught_by in each for each in found), found
