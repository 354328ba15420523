"""Every layout trains as one process does: losses and gradient norms of 20 steps, and across a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from layouts_worker import (
    BATCH,
    DEEP,
    FEW_GROUPS,
    LAYOUTS,
    MODELS,
    SAVED_AT,
    SCHEMES,
    STEPS,
    TIED,
    WITH_SCHEMES,
    launch,
)
from megatron_sharedproj.formulas_memory import in_flight

# fp32 sums in another order: the largest difference seen over all of these was 2.2e-6 of the value (a
# gradient norm of Q-MQA under TP2xPP2).
TOLERANCE = 5e-6
QUICK = ["TP2", "TP2+SP", "DP2", "DP2+overlap", "TP2xDP2", "CP2"]
PIPELINES = ["PP2", "PP2 interleaved", "TP2xPP2", "PP2xDP2", "PP2 interleaved xDP2"]
FEW = ["TP2 gathering rows", "TP4 few groups", "TP2 few groups"]
SHARDED = ["PP2 interleaved xDP2 sharded", "TP2xDP2 sharded", "one sharded"]
# Layout -> those whose checkpoints went on under it.
CARRIED_DEEP = {"PP2": ["one"], "TP2xPP2": ["PP2 interleaved"], "deep gathered": ["TP2xPP2"]}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    layouts = ["TP1", *QUICK, *FEW, "gathered", "one", *PIPELINES, "deep gathered", "masked", "TP2xCP2+SP"]
    layouts += ["documents", "PP2 documents", *SHARDED]
    return launch(tmp_path_factory.mktemp("layouts"), layouts)


@pytest.mark.parametrize("model", WITH_SCHEMES)
def test_one_process_learns(losses: dict[str, Any], model: str) -> None:
    first, last = losses["TP1"][model][0][0], losses["TP1"][model][-1][0]
    assert len(losses["TP1"][model]) == STEPS
    assert last < 0.8 * first


def assert_equal(found: list[list[float]], expected: list[list[float]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", QUICK)
def test_layout_equals_one_process(losses: dict[str, Any], layout: str, model: str) -> None:
    assert_equal(losses[layout][model], losses["TP1"][model])


@pytest.mark.parametrize("model", SCHEMES)
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "CP2"])
def test_rotary_schemes_equal_one_process(losses: dict[str, Any], layout: str, model: str) -> None:
    assert_equal(losses[layout][model], losses["TP1"][model])


@pytest.mark.parametrize("model", DEEP)
@pytest.mark.parametrize("layout", PIPELINES)
def test_pipeline_equals_one_process(losses: dict[str, Any], layout: str, model: str) -> None:
    assert_equal(losses[layout][model], losses["one"][model])


def test_every_stage_knows_where_documents_end(losses: dict[str, Any]) -> None:
    assert_equal(losses["PP2 documents"]["documents"], losses["documents"]["documents"])


@pytest.mark.parametrize("layout", PIPELINES)
def test_every_rank_knows_the_validation_loss(losses: dict[str, Any], layout: str) -> None:
    loss, perplexity = losses[layout]["deep qk_eq_v"][STEPS]
    assert math.exp(loss) == pytest.approx(perplexity)
    assert loss == pytest.approx(losses["one"]["deep qk_eq_v"][STEPS][0], rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["PP2", "PP2 interleaved", "PP2xDP2"])
def test_a_seeds_weights_are_the_same_on_any_stages(losses: dict[str, Any], layout: str) -> None:
    for model, weights in losses["one"]["weights"].items():
        assert len(weights) > 4 * 7  # four layers
        assert losses[layout]["weights"][model] == weights


@pytest.mark.parametrize("layout, chunks", [("PP2", 1), ("PP2 interleaved", 2), ("TP2xPP2", 1)])
def test_as_many_micro_batches_wait_as_memory_is_counted_for(
    losses: dict[str, Any], layout: str, chunks: int
) -> None:
    ranks = LAYOUTS[layout].ranks // 2
    expected = [in_flight(2, stage, chunks, BATCH) for stage in (0, 1) for _ in range(ranks)]
    assert [tuple(rank) for rank in losses[layout]["waiting"]] == expected


@pytest.mark.parametrize("model", WITH_SCHEMES)
def test_checkpoint_of_one_process_goes_on_under_tp2(losses: dict[str, Any], model: str) -> None:
    assert_equal(losses["TP2"][f"{model} from TP1"], losses["TP1"][model][SAVED_AT:])


def test_context_parallel_ranks_share_the_scored_tokens(losses: dict[str, Any]) -> None:
    """With --eod-mask-loss a rank's part of a sequence has fewer scored tokens than another's."""
    assert_equal(losses["TP2xCP2+SP"]["masked"], losses["masked"]["masked"])


@pytest.mark.parametrize("model", ["qk_eq_v", "Q-MQA"])
def test_checkpoint_of_one_process_goes_on_under_cp2(losses: dict[str, Any], model: str) -> None:
    assert_equal(losses["CP2"][f"{model} from TP1"], losses["TP1"][model][SAVED_AT:])


@pytest.mark.parametrize("model", FEW_GROUPS)
def test_ranks_with_the_same_keys_and_values_equal_one_process(losses: dict[str, Any], model: str) -> None:
    """With a checkpoint's way from one rank to four, from two to four, from four to two and to one."""
    expected = losses["TP1"][model]
    assert_equal(losses["TP4 few groups"][model], expected)
    carried = {"TP4 few groups": ["TP1", "TP2xDP2"], "TP2 few groups": ["TP4 few groups"]}
    if model in ("Q-MQA", "Q-GQA-2"):
        carried["gathered"] = ["TP4 few groups"]
    for layout, sources in carried.items():
        for source in sources:
            assert_equal(losses[layout][f"{model} from {source}"], expected[SAVED_AT:])


def test_a_linear_that_gathers_its_rows_writes_the_same_checkpoints(losses: dict[str, Any]) -> None:
    """Transformer Engine's, and all before keys and values were copied."""
    assert_equal(losses["TP2 gathering rows"]["Q-MQA"], losses["TP1"]["Q-MQA"])
    resumed = losses["TP4 few groups"]["Q-MQA from TP2 gathering rows"]
    assert_equal(resumed, losses["TP1"]["Q-MQA"][SAVED_AT:])


@pytest.mark.parametrize("model", ["qk_eq_v", "Q-MQA"])
def test_checkpoint_of_four_processes_goes_on_in_one(losses: dict[str, Any], model: str) -> None:
    assert_equal(losses["gathered"][f"{model} from TP2xDP2"], losses["TP1"][model][SAVED_AT:])


@pytest.mark.parametrize("model", ["deep qk_eq_v", "deep Q-MQA"])
def test_checkpoints_go_on_under_other_stages(losses: dict[str, Any], model: str) -> None:
    for layout, sources in CARRIED_DEEP.items():
        for source in sources:
            assert_equal(losses[layout][f"{model} from {source}"], losses["one"][model][SAVED_AT:])


@pytest.mark.parametrize("model", TIED)
def test_the_distributed_optimizer_goes_on_under_other_layouts(losses: dict[str, Any], model: str) -> None:
    expected = losses["one"][model]
    for layout, source in zip(SHARDED, [None, *SHARDED], strict=False):
        if layout != "one sharded":
            assert_equal(losses[layout][model], expected)
        if source:
            assert_equal(losses[layout][f"{model} from {source}"], expected[SAVED_AT:])


@pytest.mark.parametrize("model", ["deep qk_eq_v", "deep Q-MQA", "dropout"])
def test_resume_of_tp2_x_pp2_is_exact(losses: dict[str, Any], model: str) -> None:
    """Bit for bit, the dropout masks of every rank included."""
    resumed = losses["TP2xPP2"][f"{model} from TP2xPP2"]
    assert len(resumed) >= STEPS - SAVED_AT
    assert resumed == losses["TP2xPP2"][model][SAVED_AT:]


def test_random_streams(losses: dict[str, Any]) -> None:
    """Residual dropout is equal on the tensor-parallel ranks of a stage; attention dropout never is."""
    same = {"TP2": [[0, 1]], "DP2": [[0], [1]], "TP2xDP2": [[0, 1], [2, 3]], "TP2xPP2": [[0, 1], [2, 3]]}
    for layout, groups in {**same, "CP2": [[0], [1]], "PP2xDP2": [[0], [1], [2], [3]]}.items():
        rows = losses[layout]["streams"]
        defaults = [{rows[rank][0] for rank in group} for group in groups]
        assert all(len(values) == 1 for values in defaults)
        assert len(set.union(*defaults)) == len(groups)
        assert len({row[1] for row in rows}) == len(rows)


@pytest.mark.slow
def test_four_tensor_parallel_ranks(tmp_path: Path) -> None:
    found = launch(tmp_path, ["TP1", "TP4"])
    for model in MODELS:
        assert_equal(found["TP4"][model], found["TP1"][model])
        assert_equal(found["TP4"][f"{model} from TP1"], found["TP1"][model][SAVED_AT:])


@pytest.mark.slow
def test_products_of_context_parallelism(tmp_path: Path) -> None:
    found = launch(tmp_path, ["TP1", "CP4", "one", "PP2xCP2"])
    for model in MODELS:
        assert_equal(found["CP4"][model], found["TP1"][model])
    for model in DEEP:
        assert_equal(found["PP2xCP2"][model], found["one"][model])


@pytest.mark.slow
def test_products_of_pipelines(tmp_path: Path) -> None:
    """With sequence parallelism and recompute, four stages, and checkpoints from 4 ranks to 4, 2 and 1."""
    products = ["TP2xPP2+SP", "TP2xPP2 interleaved", "PP4"]
    found = launch(tmp_path, ["one", "TP2xPP2", *products, "deep TP2", "deep gathered"])
    resumed = 0
    for layout in products:
        for model in DEEP:
            assert_equal(found[layout][model], found["one"][model])
    for histories in found.values():
        for name, history in histories.items():
            model, _, source = name.partition(" from ")
            if source and model in DEEP:
                assert_equal(history, found["one"][model][SAVED_AT:])
                resumed += 1
    assert resumed == len(DEEP) + 2 * (1 + 2 + 1 + 1)
