"""Reading a comparison: figures of good runs, words for bad ones; changes and order by plain arithmetic."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj import formulas
from megatron_sharedproj.reporting.comparison_report.reading import Comparison, read_comparison
from megatron_sharedproj.reporting.comparison_report.statistics import (
    changes,
    ordering,
    padded_tokens,
    paired,
    paper_changes,
    shown_when_padded,
)
from megatron_sharedproj.reporting.comparison_report.summary import summary

Writer = Callable[..., Path]
# Of the fixture: the baseline's loss by seed, and how far K=V is above it.
BASE, ABOVE = {1234: 4.30, 1235: 4.34, 1236: 4.27}, {1234: 0.020, 1235: 0.022, 1236: 0.018}


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run_of(comparison: Comparison, name: str) -> Any:
    return next(run for _, run in comparison.runs() if run.name == name)


def test_figures_of_a_whole_comparison(write_comparison: Writer) -> None:
    comparison = read_comparison(write_comparison())
    assert [family.key for family in comparison.families] == ["architecture", "parameters"]
    assert [model.name for model in comparison.families[1].models] == ["qkv", "qk_eq_v_matched"]
    assert all(run.status == "finished" and not run.problems for _, run in comparison.runs())
    model = next(model for model in comparison.models if model.name == "qk_eq_v")
    for seed, value in model.values("packed_perplexity").items():
        assert value == pytest.approx(math.exp(BASE[seed] + ABOVE[seed]))
    assert model.values("padded_loss")[1235] == pytest.approx(0.4 * 4.362)
    assert model.values("validation_loss")[1234] == pytest.approx(4.32 + 3 * math.exp(-5))
    assert model.values("train_tokens_per_second") == {1234: 1025.0, 1235: 1035.0, 1236: 1045.0}
    assert model.values("recall_stderr")[1234] == pytest.approx(math.sqrt(2 * 0.02**2) / 2)
    assert model.config is not None
    assert model.parameters == formulas.parameters(model.config)["total"]
    assert comparison.baseline.cache_bytes == 2 * model.cache_bytes == 2 * 2 * 64 * 2 * 2 // 2
    assert padded_tokens(comparison) == (2000, 800)


def test_what_padding_leaves_of_a_difference(write_comparison: Writer) -> None:
    """Of every pair, also of models that the seeds do not tell from the baseline."""
    comparison = read_comparison(write_comparison())
    shown = shown_when_padded(comparison)
    assert shown is not None and shown.pairs == 3 * (len(comparison.models) - 1)
    assert (shown.share, shown.lowest, shown.highest) == pytest.approx((0.4, 0.4, 0.4))
    folder = write_comparison("other")
    edit(folder / "runs/qk_eq_v_1234/perplexity.json", lambda c: c["padded"].update(loss=3.0))
    changed = shown_when_padded(read_comparison(folder))
    assert changed is not None and changed.share != pytest.approx(0.4) and changed.pairs == shown.pairs
    for run in (folder / "runs").iterdir():
        if (run / "perplexity.json").exists():
            edit(run / "perplexity.json", lambda c: c["padded"].update(real_tokens=2000))
    assert shown_when_padded(read_comparison(folder)) is None


def test_paired_changes_by_hand(write_comparison: Writer) -> None:
    comparison = read_comparison(write_comparison())
    found = changes(comparison.families[0], "packed_perplexity")
    expected = {seed: 100 * math.expm1(above) for seed, above in ABOVE.items()}
    change = found["qk_eq_v"]
    assert dict(change.by_seed) == pytest.approx(expected)
    mean = sum(expected.values()) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in expected.values()) / 2)
    half = 4.302652729911275 * deviation / math.sqrt(3)
    assert (change.estimate.low, change.estimate.high) == pytest.approx((mean - half, mean + half))
    assert [found[name].verdict for name in ("qk_eq_v", "q_eq_k_eq_v", "qkv_g1")] == [
        "higher", "higher", "not told apart",
    ]  # fmt: skip
    ordered = sorted(one.estimate.p_value for one in found.values())
    assert found["qkv_g1"].adjusted == pytest.approx(max(ordered[2], 2 * ordered[1], 3 * ordered[0]))
    recall = paired(comparison.models[1], comparison.baseline, "recall", percent=False)
    assert recall is not None and recall.estimate.mean == pytest.approx(-0.02 / 3)


def test_order_and_what_is_too_close(write_comparison: Writer) -> None:
    comparison = read_comparison(write_comparison())
    found = ordering(comparison.families[0], "packed_perplexity")
    assert found is not None and found.seeds == (1234, 1235, 1236) and found.left_out == ()
    assert [model.name for model in found.models] == ["qkv", "qkv_g1", "qk_eq_v", "q_eq_k_eq_v"]
    assert found.mean_ranks == pytest.approx({"qkv": 4 / 3, "qkv_g1": 5 / 3, "qk_eq_v": 3, "q_eq_k_eq_v": 4})
    open_pairs = [(p.low.name, p.high.name, p.agreeing) for p in found.pairs if not p.change.estimate.sign]
    assert open_pairs == [("qkv", "qkv_g1", 2)]
    assert len(found.pairs) == 6


def test_order_uses_the_seeds_that_all_have(write_comparison: Writer) -> None:
    missing = ["qk_eq_v_1236", "qkv_g1_1234", "qkv_g1_1235", "qkv_g1_1236"]
    comparison = read_comparison(write_comparison(missing=missing))
    found = ordering(comparison.families[0], "packed_perplexity")
    assert found is not None and found.seeds == (1234, 1235)
    assert [model.name for model in found.models] == ["qkv", "qk_eq_v", "q_eq_k_eq_v"]
    assert [model.name for model in found.left_out] == ["qkv_g1"]


def test_one_seed_has_no_deviation_and_concludes_nothing(write_comparison: Writer) -> None:
    comparison = read_comparison(write_comparison(seeds=(1234,)))
    change = changes(comparison.families[0], "packed_perplexity")["q_eq_k_eq_v"]
    assert change.verdict == "one seed" and change.adjusted is None
    text = " ".join(summary(comparison))
    assert "nothing is concluded" in text and "+-" not in text and "nan" not in text
    assert "told apart above" not in text


def test_paper_changes_of_each_kind(write_comparison: Writer) -> None:
    models = {model.name: model for model in read_comparison(write_comparison()).models}
    assert paper_changes(models["qk_eq_v"]) == pytest.approx(
        {
            "300M": 100 * (5.27 / 5.11 - 1),
            "1.2B": 100 * (5.128 / 5.004 - 1),
            "300M, real tokens": 100 * (21.28 / 20.82 - 1),
        }
    )
    assert set(paper_changes(models["qkv_g1"])) == {"300M", "1.2B"}
    assert paper_changes(models["qkv"]) == {}


def _stop(folder: Path) -> None:
    log = folder / "runs/qk_eq_v_1234/log.jsonl"
    lines = [line for line in log.read_text().splitlines(True) if json.loads(line)["iteration"] <= 20]
    log.write_text("".join(lines))


def _other_text(folder: Path) -> None:
    edit(folder / "runs/qk_eq_v_1234/perplexity.json", lambda r: r["packed"].update(tokens=99))


def _diverged(folder: Path) -> None:
    edit(folder / "runs/qk_eq_v_1234/perplexity.json", lambda r: r["packed"].update(loss=math.nan))


def _other_step(folder: Path) -> None:
    name = "runs/qk_eq_v_1234/iter_0000020"
    edit(folder / "runs/qk_eq_v_1234/perplexity.json", lambda r: r.update(checkpoint=name))


@pytest.mark.parametrize(
    "damage, status, words",
    [
        (_stop, "unfinished", "stopped at step 20 of 40"),
        (_other_text, "not evaluated", "packed: measured on 99 tokens in rows of 64, others on 1500 tokens"),
        (_diverged, "not evaluated", "perplexity.json can't be used (packed_loss is nan)"),
        (_other_step, "not evaluated", "perplexity.json is of step 20, not 40; evaluate again"),
        ("perplexity.json", "not evaluated", "not readable as JSON"),
        ("recall.json", "finished", "recall.json can't be used"),
        ("log.jsonl", "damaged", "log.jsonl:1: not a record of the trainer"),
        ("run_config.json", "damaged", "not a readable run configuration"),
    ],
)
def test_a_bad_run_is_named_and_the_other_seeds_count(
    write_comparison: Writer, damage: str | Callable[[Path], None], status: str, words: str
) -> None:
    folder = write_comparison()
    if isinstance(damage, str):
        (folder / "runs/qk_eq_v_1234" / damage).write_text('{"half": \n' if "log" not in damage else "{}\n")
    else:
        damage(folder)
    comparison = read_comparison(folder)
    run = run_of(comparison, "qk_eq_v_1234")
    assert run.status == status and any(words in problem for problem in run.problems), run.problems
    change = changes(comparison.families[0], "packed_perplexity")["qk_eq_v"]
    assert change.estimate.count == (3 if status == "finished" else 2)
    assert all(other.status == "finished" for _, other in comparison.runs() if other is not run)


def test_settings_that_make_it_unfair_are_named(write_comparison: Writer) -> None:
    folder = write_comparison()
    edit(folder / "runs/qk_eq_v_1234/run_config.json", lambda c: c["train"].update(lr=0.1))
    edit(folder / "runs/qk_eq_v_1235/run_config.json", lambda c: c["train"].update(clip_grad=2.0))
    edit(folder / "comparison.json", lambda c: c["models"][1]["flags"].extend(["--clip-grad", "2.0"]))
    edit(folder / "runs/qkv_g1_1235/run_config.json", lambda c: c["train"].update(seed=7))
    edit(folder / "runs/q_eq_k_eq_v_1236/run_config.json", lambda c: c["data"].update(data_protocol="padded"))
    comparison = read_comparison(folder)
    assert run_of(comparison, "qk_eq_v_1234").problems == ["train.lr is 0.1, qkv_1234's is 0.003"]
    assert run_of(comparison, "qk_eq_v_1235").problems == []  # the model's own flag
    assert run_of(comparison, "qkv_g1_1235").problems == ["its configuration says seed 7"]
    assert "trained with --data-protocol padded" in run_of(comparison, "q_eq_k_eq_v_1236").problems


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(baseline="none"), "baseline 'none' is not among the models qkv, qk_eq_v"),
        (lambda c: c.update(models=3), "models is 3, not a list"),
        (lambda c: c.pop("title"), "title is None, not a str"),
        (lambda c: c.update(protocol="rolling"), "protocol 'rolling'; must be one of packed, padded"),
        (lambda c: c["models"][0].update(runs={"x": "runs/a"}), "runs has 'x': 'runs/a'"),
        (lambda c: c["models"].append(c["models"][0]), "two models have the same name"),
    ],
)
def test_a_bad_comparison_file_is_an_error(
    write_comparison: Writer, change: Callable[[Any], None], message: str
) -> None:
    folder = write_comparison(seeds=(1234,))
    edit(folder / "comparison.json", change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_comparison(folder)
    assert str(error.value).startswith(str(folder / "comparison.json"))


def test_no_comparison_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no comparison.json there; give a folder of .*compare_variants"):
        read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text("[")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_comparison(tmp_path)


def test_paths_are_made_portable(write_comparison: Writer) -> None:
    comparison = read_comparison(write_comparison())
    folder = comparison.folder
    text = f"/x/y/tools/report.py {folder} {folder}/runs/a --out {folder}2 /data/z"
    assert comparison.portable(text) == f"tools/report.py comparison runs/a --out {folder}2 /data/z"
