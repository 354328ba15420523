"""The attention benchmark: what it counts, what it computes, how it times, and the plot of its rows.

Shape legend: b batch, s query length, t key length, h query heads, g groups (key/value heads), e head size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sharedproj.ops import extension
from megatron_sharedproj.profiling import attention_bench as bench
from megatron_sharedproj.profiling import timing
from megatron_sharedproj.profiling.attention_cases import DTYPES, PRESETS, Case, Choices
from megatron_sharedproj.profiling.attention_results import COLUMNS, commit, environment, row_of
from megatron_sharedproj.profiling.roofline import Roofline
from megatron_sharedproj.profiling.timing import Machine, Operation, Times, get_machine, measure
from megatron_sharedproj.reporting.attention_plot import attention_figure

FORWARD = Case("fwd", "strided", "fp32", 2, 48, 48, 4, 2, 16, True)
DECODE = Case("decode", "strided", "fp32", 2, 1, 192, 4, 2, 16, False)
ROOFLINE = Roofline(dict.fromkeys(DTYPES.values(), 1e11), 1e10, "assumed")
CPU = torch.device("cpu")


class Small(Machine):
    """A machine with little memory."""

    def free_bytes(self) -> int:
        return 1000


def runnable(case: Case) -> list[str]:
    return [name for name in bench.IMPLEMENTATIONS if not bench.refusal(case, name, Machine())]


@pytest.mark.parametrize(
    "case, flops, one, two",
    [
        # Query and output 4096 elements each, a key 2048, times 4 bytes.
        (replace(FORWARD, batch=1, seq_q=64, seq_k=64), 524288, 40960, 49152),
        (replace(FORWARD, batch=1, seq_q=64, seq_k=64, causal=False), 1048576, 40960, 49152),
        (replace(FORWARD, batch=1, seq_q=64, seq_k=64, op="bwd"), 1310720, 81920, 98304),
        (replace(FORWARD, batch=1, seq_q=64, seq_k=64, op="fwdbwd"), 1835008, 122880, 147456),
        # Two caches of 192 tokens, 2 groups of 16; queries and outputs of 4 heads.
        (DECODE, 98304, 49152 + 1024, 98304 + 1024),
        (replace(DECODE, dtype="bf16"), 98304, 24576 + 512, 49152 + 512),
    ],
)
def test_flops_and_bytes(case: Case, flops: float, one: int, two: int) -> None:
    assert (case.flops(), case.bytes(separate=False), case.bytes(separate=True)) == (flops, one, two)


@pytest.mark.parametrize("groups", [4, 2])
def test_strided_inputs_are_views_of_a_fused_projection(groups: int) -> None:
    made = bench.make_inputs(replace(FORWARD, groups=groups), CPU)
    for separate, inputs in made.items():
        per_group = 4 // groups + (2 if separate else 1)
        assert inputs.tied is not separate
        assert inputs.query.shape == inputs.grad_out.shape == (48, 2, 4, 16)
        for tensor in inputs.tensors[1:]:
            assert tensor.shape == (48, 2, groups, 16)
            assert tensor.stride(2) == per_group * 16
        # With several heads per group the model's reshape copies the query; so does this.
        shared = inputs.query.untyped_storage().data_ptr() == inputs.key.untyped_storage().data_ptr()
        assert shared is (groups == 4)


def test_contiguous_inputs_are_in_the_order_of_sdpa() -> None:
    for inputs in bench.make_inputs(replace(FORWARD, layout="contiguous"), CPU).values():
        assert all(x.permute(1, 2, 0, 3).is_contiguous() for x in (*inputs.tensors, inputs.grad_out))


def test_decode_reads_one_cache_or_two() -> None:
    made = bench.make_inputs(DECODE, CPU)
    assert made[False].tied and not made[True].tied
    assert made[True].key is made[False].key
    assert all(cache.transpose(0, 1).is_contiguous() for cache in made[True].tensors)
    paged = bench.make_inputs(replace(DECODE, page_size=64), CPU)[True]
    for pages, cache in zip(paged.pages, paged.tensors[1:], strict=True):
        assert torch.equal(pages[paged.table.long()].flatten(1, 2), cache.transpose(0, 1))


CASES = [
    replace(FORWARD, op=op, layout=layout, groups=groups, causal=causal)
    for op in ("fwd", "bwd", "fwdbwd")
    for layout in ("strided", "contiguous")
    for groups, causal in ((4, True), (2, False), (1, True))
] + [
    replace(DECODE, layout=layout, groups=groups, page_size=page_size)
    for layout in ("strided", "contiguous")
    for groups, page_size in ((4, 0), (2, 64))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_computes_the_case(case: Case) -> None:
    torch.manual_seed(0)
    found = bench.errors(case, runnable(case), CPU)
    assert {"sdpa_alias", "sdpa_separate", "reference"} <= set(found)
    for name, (error, ratio) in found.items():
        # A wrong layout, mask, value or gradient is off by more than 0.01.
        assert error < 1e-4, name
        assert 0 < ratio < 100
    assert found["reference"][1] == 1


def test_errors_see_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncausal(case: Case, inputs: bench.Inputs) -> torch.Tensor:
        return bench._sdpa(replace(case, causal=False), inputs)

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "wrong", bench.Implementation(uncausal))
    assert bench.errors(FORWARD, ["wrong"], CPU)["wrong"][0] > 0.01


def test_what_cannot_run_is_left_out_with_the_reason() -> None:
    case = replace(FORWARD, dtype="fp16")
    results, skipped = bench.run_case(case, list(bench.IMPLEMENTATIONS), Machine(), ROOFLINE, 0.01)
    assert [r.implementation for r in results] == ["sdpa_alias", "sdpa_separate", "reference"]
    reason = extension.MISSING or "float16 on a CPU"
    assert list(skipped) == ["extension", "extension_separate"]
    assert all(reason in why for why in skipped.values())
    huge = replace(FORWARD, batch=64, seq_q=1 << 20, seq_k=1 << 20)
    assert "scores and expanded keys need" in bench.refusal(huge, "reference", Machine())
    results, skipped = bench.run_case(FORWARD, ["sdpa_alias"], Small(), ROOFLINE, 0.01)
    assert not results and "the inputs need" in skipped["sdpa_alias"]


@pytest.mark.parametrize("case", [FORWARD, replace(FORWARD, op="fwdbwd"), DECODE], ids=str)
def test_results_are_consistent(case: Case) -> None:
    results, skipped = bench.run_case(case, runnable(case), Machine(), ROOFLINE, 0.2)
    times = {result.implementation: result.times.median for result in results}
    assert list(times) == runnable(case) and not skipped
    run = environment(Machine(), Path("/"))
    for result in results:
        row = row_of(result, run)
        assert tuple(sorted(row)) == tuple(sorted(COLUMNS))
        median = float(row["ms_median"])
        assert 0 < float(row["ms_p10"]) <= median <= float(row["ms_p90"])
        for base in bench.BASELINES:
            assert float(row[f"ratio_vs_{base}"]) == pytest.approx(1e3 * times[base] / median, rel=1e-3)
        separate = result.implementation.endswith("separate")
        floor = max(case.flops() / 1e11, case.bytes(separate) / 1e10)
        assert float(row["percent_of_roofline"]) == pytest.approx(100e3 * floor / median, rel=1e-3)
        assert float(row["tflops"]) == pytest.approx(case.flops() / median / 1e9, rel=1e-3)
        assert float(row["gbps_algorithmic"]) == pytest.approx(case.bytes(separate) / median / 1e6, rel=1e-3)
        assert int(row["bytes"]) == case.bytes(separate)
        assert row["causal"] == ("false" if case.op == "decode" else "true")
        assert row["peak_memory_mb"] == row["cuda"] == ""


def test_no_ratio_without_its_baseline() -> None:
    (result,), _ = bench.run_case(FORWARD, ["reference"], Machine(), ROOFLINE, 0.01)
    row = row_of(result, environment(Machine(), Path("/")))
    assert row["ratio_vs_sdpa_separate"] == row["ratio_vs_sdpa_alias"] == ""


def test_commit_outside_a_repository_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) == ""


def test_times() -> None:
    assert Times.of([float(x) for x in range(11, 0, -1)]) == Times(6.0, 2.0, 10.0, 11)
    assert Times.of([3.0]) == Times(3.0, 3.0, 3.0, 1)


class Clock:
    """Time that passes only in sleep: a busy machine changes no count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_operations_run_in_turn_within_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = Clock(monkeypatch)

    def call(name: str, seconds: float) -> Operation:
        return Operation(lambda: (order.append(name), clock.sleep(seconds)))

    machine = Machine()
    times = measure({"slow": call("slow", 0.02), "fast": call("fast", 0.0)}, machine, 0.2)
    measured = order[2 * machine.warm_up :]
    assert times["fast"].repeats == machine.most == measured.count("fast")
    # A share of 0.1 s holds 5 calls of 0.02 s, which is the least number too.
    assert times["slow"].repeats == measured.count("slow") == machine.least
    rounds = [set(measured[i : i + 2]) for i in range(0, 2 * times["slow"].repeats, 2)]
    assert all(r == {"slow", "fast"} for r in rounds)
    assert times["slow"].median == pytest.approx(0.02)
    assert times["fast"].median == 0.0


def test_the_budget_ends_a_measurement_and_many_calls_in_one_are_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    times = measure({"graph": Operation(lambda: clock.sleep(0.02), count=4)}, Machine(), 1e-6)
    assert times["graph"] == Times(0.005, 0.005, 0.005, 1)


def test_decode_goes_through_more_memory_than_the_caches_hold() -> None:
    machine = Machine()
    small = replace(DECODE, seq_k=4096, heads=8, groups=8, head_size=64)
    copies = bench._copies(small, machine)
    assert copies * small.key_bytes() >= 4 * machine.cache_bytes() or copies == 512
    assert bench._copies(replace(small, batch=1 << 20), machine) == 1
    assert bench._copies(replace(small, op="fwd"), machine) == 1
    done: list[int] = []
    rotated = machine.rotated([lambda i=i: done.append(i) for i in range(3)])
    for _ in range(4):
        rotated.call()
    assert (done, rotated.count) == ([0, 1, 2, 0], 1)


def test_roofline_is_the_larger_of_both_bounds() -> None:
    assert ROOFLINE.seconds(2e11, 1e10, torch.float32) == 2.0
    assert ROOFLINE.seconds(1e11, 3e10, torch.bfloat16) == 3.0


def test_presets_hold_what_they_promise() -> None:
    cases = {name: Choices().cases(preset.grids) for name, preset in PRESETS.items()}
    for preset in cases.values():
        assert len(set(preset)) == len(preset)
        assert {case.op for case in preset} >= {"fwd", "fwdbwd", "decode"}
    decode = {(c.batch, c.seq_k, c.heads, c.groups, c.head_size) for c in cases["cpu"] if c.op == "decode"}
    assert decode == {
        (b, t, h, h, e) for b in (1, 8) for t in (2048, 8192, 32768) for h, e in ((16, 64), (8, 128))
    }
    prefill = [case for case in cases["gpu"] if case.op == "fwd"]
    assert {case.seq_q for case in prefill} == {512, 1024, 2048, 4096, 8192, 16384}
    assert {case.batch * case.seq_q for case in prefill} == {16384}
    assert {(c.heads, c.groups, c.head_size) for c in prefill} == {
        (16, g, e) for g in (16, 4) for e in (64, 128)
    }
    gpu_decode = [case for case in cases["gpu"] if case.op == "decode"]
    assert len(gpu_decode) == 4 * 4 * 3


def test_choices_replace_the_presets() -> None:
    grids = PRESETS["quick"].grids
    choices = Choices(
        ops=("fwd",), dtypes=("fp32",), layouts=("strided",), head_sizes=(32,), seq_lengths=(8, 16)
    )
    cases = replace(choices, heads=(6,), groups=(4, 3, 1), batch=2, masks=("causal", "full")).cases(grids)
    assert {(c.op, c.dtype, c.layout, c.head_size, c.batch, c.heads) for c in cases} == {
        ("fwd", "fp32", "strided", 32, 2, 6)
    }
    assert {(c.seq_q, c.groups, c.causal) for c in cases} == {
        (s, g, mask) for s in (8, 16) for g in (3, 1) for mask in (True, False)
    }
    assert {c.batch * c.seq_q for c in replace(choices, tokens=64).cases(grids)} == {64}
    decode = Choices(ops=("decode",), decode_batches=(3,), decode_contexts=(128,), page_size=64).cases(grids)
    assert [(c.op, c.batch, c.seq_q, c.seq_k, c.page_size) for c in decode] == [("decode", 3, 1, 128, 64)]


def rows_of(*cases: Case) -> list[dict[str, str]]:
    run = environment(Machine(), Path("/"))
    names = ["sdpa_alias", "sdpa_separate", "reference"]
    found: list[dict[str, str]] = []
    for case in cases:
        results, _ = bench.run_case(case, names, Machine(), ROOFLINE, 0.01)
        found += [row_of(result, run) for result in results]
    return found


def test_plot_has_a_panel_per_kind_of_case() -> None:
    cases = (FORWARD, replace(FORWARD, seq_q=96, seq_k=96), DECODE)
    rows = rows_of(*cases)
    # A baseline stands in for the extension, which need not be built here.
    rows += [{**row, "implementation": "extension"} for row in rows if row["implementation"] == "sdpa_alias"]
    drawn = [axes for axes in attention_figure(rows).axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == [
        "forward, fp32, 4/2 heads of 16\nstrided",
        "decode, fp32, 4/2 heads of 16\nstrided, batch 2",
    ]
    forward, decode = drawn
    assert [len(axes.get_lines()) for axes in drawn] == [5, 5]
    assert list(forward.get_lines()[0].get_xdata()) == [48, 96]
    alias = [row for row in rows if row["implementation"] == "extension"]
    assert list(forward.get_lines()[0].get_ydata()) == [float(row["tflops"]) for row in alias[:2]]
    assert list(decode.get_lines()[0].get_ydata()) == [float(alias[2]["ms_median"])]
    ratios = [f"{float(row['ratio_vs_sdpa_separate']):.3g}x" for row in alias[:2]]
    assert [text.get_text() for text in forward.texts] == ratios
    floors = [ROOFLINE.seconds(case.flops(), case.bytes(separate=False), case.torch_dtype) for case in cases]
    rates = [case.flops() / floor / 1e12 for case, floor in zip(cases[:2], floors, strict=False)]
    assert list(forward.get_lines()[-1].get_ydata()) == pytest.approx(rates, rel=1e-3)
    assert list(decode.get_lines()[-1].get_ydata()) == pytest.approx([1e3 * floors[2]], rel=1e-3)
    figure = attention_figure([*rows, *({**row, "implementation": "extension_separate"} for row in alias)])
    figure.canvas.draw()
    assert figure.legends[0].get_window_extent().width < figure.bbox.width
    with pytest.raises(ValueError, match="no row to plot"):
        attention_figure([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("op", ["fwd", "bwd", "fwdbwd", "decode"])
def test_the_same_on_a_gpu(op: str) -> None:
    machine = get_machine("cuda")
    shape = (8, 1, 8192) if op == "decode" else (4, 1024, 1024)
    case = Case(op, "strided", "bf16", *shape, 16, 4, 64, op != "decode")
    names = [name for name in bench.IMPLEMENTATIONS if not bench.refusal(case, name, machine)]
    results, skipped = bench.run_case(case, names, machine, ROOFLINE, 2.0)
    assert [result.implementation for result in results] == names and not skipped
    for result in results:
        assert result.times.repeats >= machine.least
        assert result.peak_bytes > 0
        assert result.error < 0.1
        assert result.times.median < 1.0
