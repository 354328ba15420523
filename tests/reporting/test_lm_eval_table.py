"""Tables and the plot of lm-eval scores: what is compared, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.evaluation.lm_eval_record import Outcome, Plan, Score, make_record, write_record
from megatron_sharedproj.reporting.lm_eval_table import comparison_table, load_scores, p_value, score_table


def scores(acc: float, stderr: float = 0.02) -> list[Score]:
    found = [
        Score("piqa", shots, metric, acc + 0.01 * shots, stderr, chance=0.5, documents=100)
        for shots in (0, 5)
        for metric in ("acc", "acc_norm")
    ]
    return [*found, Score("wiki", 0, "bits_per_byte", 1.25 - acc / 10, None, documents=3)]


def record(path: Path, name: str, found: list[Score], **plan: Any) -> Path:
    settings = Plan(**{"tasks": ("piqa", "wiki"), "shots": (0, 5), "limit": 100, **plan})
    outcome = Outcome(scores=found)
    model = {"name": name, "path": f"runs/{name}"}
    made = make_record(outcome, settings, model, batch_size=8, command="evaluate.py", commit="abc")
    assert write_record(path, made, outcome) == [path]
    return path


def cells(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert set(lines[1]) == {"|", "-"} and len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def test_one_model(tmp_path: Path) -> None:
    head, first, *_, last = cells(score_table(scores(0.53)))
    assert head == ["task", "shots", "metric", "value", "stderr", "chance", "from chance"]
    assert first == ["piqa", "0", "acc", "0.5300", "0.0200", "0.5000", "+1.5 stderr"]
    assert last == ["wiki", "0", "bits_per_byte", "1.1970", "-", "-", "-"]
    special = Score("five", 0, "exact_match", 0.4, 0.0, 0.25, filter="strict", is_group=True)
    assert cells(score_table([special]))[1][:3] == ["five (group)", "0", "exact_match (strict)"]
    assert cells(score_table([special]))[1][-1] == "-"  # no error known: no distance in errors


def test_models_side_by_side(tmp_path: Path) -> None:
    files = [
        record(tmp_path / f"{name}.json", name, scores(acc))
        for name, acc in (("qkv", 0.55), ("k_eq_v", 0.56), ("mqa", 0.48))
    ]
    rows = cells(comparison_table(load_scores(files)))
    assert rows[0] == [
        "task", "shots", "metric", "chance", "qkv", "k_eq_v", "mqa", "k_eq_v - qkv", "mqa - qkv",
    ]  # fmt: skip
    assert len(rows) == 6
    assert rows[1][3:7] == ["0.5000", "0.5500 +- 0.0200", "0.5600 +- 0.0200", "0.4800 +- 0.0200"]
    # z = 0.01 / (0.02 * sqrt 2) = 0.354 and 2.475: p from a table of the normal distribution
    assert rows[1][7:] == ["+0.0100 (p 0.72)", "-0.0700 (p 0.01) *"]
    assert rows[5][3:] == ["-", "1.1950", "1.1940", "1.2020", "-0.0010", "+0.0070"]


def test_p_value() -> None:
    first = {"value": 0.5, "stderr": 0.03}
    assert p_value(first, {"value": 0.5 + 1.96 * 0.05, "stderr": 0.04}) == pytest.approx(0.05, abs=1e-4)
    assert p_value(first, first) == 1.0
    assert p_value(first, {"value": 0.6, "stderr": None}) is None
    sure = {"value": 0.5, "stderr": 0.0}
    assert p_value(sure, sure) == 1.0 and p_value(sure, {"value": 0.4, "stderr": 0.0}) == 0.0


def test_labels_tell_the_models_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one, two = record(tmp_path / "a.json", "m", scores(0.5)), record(tmp_path / "b.json", "m", scores(0.6))
    same = record(tmp_path / "x" / "a.json", "m", scores(0.6))
    assert [model.label for model in load_scores([one, two])] == ["a", "b"]
    assert [model.label for model in load_scores([one, same])] == [str(one), str(same)]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"tasks": ("piqa",)}, "was run with --tasks piqa, .*a.json with piqa,wiki"),
        ({"shots": (0,)}, "was run with --num-fewshot 0, .*with 0,5; run both with the same"),
        ({"limit": None}, "was run with --limit None, .*with 100"),
        ({"seed": 7}, "was run with --seed 7, .*with 1234"),
    ],
)
def test_different_runs_are_refused(tmp_path: Path, plan: dict[str, Any], message: str) -> None:
    first = record(tmp_path / "a.json", "a", scores(0.5))
    with pytest.raises(ValueError, match=message):
        load_scores([first, record(tmp_path / "b.json", "b", scores(0.5), **plan)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    good = record(tmp_path / "a.json", "a", scores(0.5))
    short = record(tmp_path / "short.json", "b", scores(0.5)[:-1])
    counts = json.loads(good.read_text())
    counts["scores"][0]["documents"] = 99
    contents = {
        "none.json": None,
        "half.json": good.read_text()[:300],
        "list.json": "[1, 2]",
        "other.json": '{"packed": {"perplexity": 3.0}}',
        "counts.json": json.dumps(counts),
    }
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_text(content)
    cases = {
        "none.json": "none.json: no such file",
        "half.json": "half.json: not JSON",
        "list.json": "list.json: not a result of",
        "other.json": "other.json: not a result of",
        "counts.json": "counts.json: piqa has 99 documents, 100 in .*a.json",
        short.name: "only one has bits_per_byte of wiki",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_scores([good, tmp_path / name])
    with pytest.raises(ValueError, match="give two or more files"):
        load_scores([good])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from megatron_sharedproj.reporting.lm_eval_plot import comparison_figure, plot_comparison

    files = [record(tmp_path / f"{n}.json", n, scores(acc)) for n, acc in (("qkv", 0.55), ("mqa", 0.48))]
    models = load_scores(files)
    figure = comparison_figure(models)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [(axes.get_title(), axes.get_ylabel()) for axes in panels] == [
        ("0-shot", "acc"), ("0-shot", "acc_norm"), ("5-shot", "acc"), ("5-shot", "acc_norm"),
    ]  # fmt: skip
    for axes, value in zip(panels, (0.55, 0.55, 0.6, 0.6), strict=True):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["piqa"]
        points = [container for container in axes.containers if container.has_yerr]
        assert [container.get_label() for container in points] == ["qkv", "mqa"]
        segment = points[0].lines[2][0].get_segments()[0]
        assert [y for _, y in segment] == pytest.approx([value - 0.02, value + 0.02])
        guessing = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
        assert [list(line.get_ydata()) for line in guessing] == [[0.5, 0.5]]
    plot_comparison(models, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    rolling = [record(tmp_path / f"r{n}.json", str(n), scores(0.5)[-1:]) for n in (1, 2)]
    with pytest.raises(ValueError, match="--output: no accuracy among the scores"):
        plot_comparison(load_scores(rolling), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
