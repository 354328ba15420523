"""Rows, tables, orders and the plot of the synthetic tasks, from results that are made up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.experiments.synthetic import SYNTHETIC_FORMS, TASKS
from megatron_sharedproj.experiments.synthetic_results import (
    PAPER,
    RERUN,
    notes_of,
    order_of,
    read_rerun,
    rows_of,
    sections_of,
    told_apart,
)
from megatron_sharedproj.profiling.tables import Section


def record(accuracy: float, task: str, form: str, heads: int, seed: int, length: int = 16) -> dict[str, Any]:
    settings = {
        "task": task, "form": form, "hidden_size": 64, "layers": 2, "heads": heads, "length": length,
        "seed": seed,
    }  # fmt: skip
    result = {
        "token_accuracy": accuracy, "sequence_accuracy": 0.5, "test_loss": 1.0, "parameters": 1000 + heads,
        "steps": 158,
    }  # fmt: skip
    return {"settings": settings, "result": result, "seconds": 2.0, "commit": "abc", "device": "a CPU"}


def records(
    values: dict[str, tuple[float, ...]], tasks: tuple[str, ...] = tuple(TASKS)
) -> list[dict[str, Any]]:
    """Of each form, the accuracies of seeds 0, 1, ..., with 2 heads a hundredth less than with 4."""
    return [
        record(value + offset, task, form, heads, seed)
        for task in tasks
        for form, seeds in values.items()
        for seed, value in enumerate(seeds)
        for heads, offset in ((2, -0.005), (4, 0.005))
    ]


def test_the_papers_means_are_those_it_prints() -> None:
    printed = {"qkv": 0.851, "q_eq_k": 0.854, "q_eq_k+": 0.870, "qk_eq_v": 0.850, "q_eq_k_eq_v": 0.780,
               "q_eq_k_eq_v+": 0.823}  # fmt: skip
    again = {"qkv": 0.758, "q_eq_k": 0.724, "q_eq_k+": 0.761, "qk_eq_v": 0.751, "q_eq_k_eq_v": 0.651,
             "q_eq_k_eq_v+": 0.700}  # fmt: skip
    for table, means in ((PAPER, printed), (RERUN, again)):
        assert tuple(table) == SYNTHETIC_FORMS
        for form, mean in means.items():
            assert table[form]["mean"] == pytest.approx(mean, abs=0.00101)


def test_rows_average_over_heads_and_deviate_over_seeds() -> None:
    rerun = {("sort", "qkv", 64, 2, heads, 16): value for heads, value in ((2, 0.6), (4, 0.8))}
    found = rows_of(records({"qkv": (0.2, 0.4), "qk_eq_v": (0.9, 0.9)}), rerun)
    assert [row["task"] for row in found] == [task for task in (*TASKS, "mean") for _ in range(2)]
    sort = next(row for row in found if (row["task"], row["form"]) == ("sort", "qkv"))
    assert sort["token_accuracy_by_seed"] == pytest.approx([0.2, 0.4])
    assert sort["token_accuracy"] == pytest.approx(0.3)
    assert sort["token_accuracy_deviation"] == pytest.approx(math.sqrt(0.02))
    assert (sort["cells"], sort["heads"], sort["seeds"], sort["seconds"]) == (4, [2, 4], [0, 1], 8.0)
    assert sort["rerun_same_cells"] == pytest.approx(0.7) and sort["paper"] == 0.971
    assert found[0]["rerun_same_cells"] is None
    mean = found[-2]
    assert (mean["form"], mean["cells"], mean["paper"]) == ("qkv", 20, PAPER["qkv"]["mean"])
    assert mean["token_accuracy_by_seed"] == pytest.approx([0.2, 0.4])


def test_no_mean_where_a_task_is_missing() -> None:
    found = rows_of(records({"qkv": (0.2, 0.4)}, tasks=("sort", "copy")))
    assert [row["task"] for row in found] == ["sort", "copy"]
    single = rows_of(records({"qkv": (0.2,)}, tasks=("sort",)))
    assert math.isnan(single[0]["token_accuracy_deviation"])
    assert notes_of(single)[-1] == "one seed: no order of the forms follows"


def test_tables_have_a_column_for_each_shape_and_the_papers_beside() -> None:
    some = records({"qkv": (0.2, 0.4), "q_eq_k+": (0.5, 0.5)}, tasks=("reverse",))
    some += [record(0.7, "reverse", "qkv", 4, seed, length=64) for seed in (0, 1)]
    rerun = {("reverse", "qkv", 64, 2, 4, 64): 0.123}
    (section,) = sections_of(rows_of(some, rerun))
    assert section.title == "REVERSE"
    titles = [column.title for column in section.columns]
    assert titles == ["form", "d 64, length 16", "d 64, length 64", "their re-run", "the paper, its grid",
                      "their re-run, its grid"]  # fmt: skip
    assert lines(section) == [
        ["QKV", "0.300 +- 0.141", "0.700 +- 0.000", "0.123", "0.698", "0.529"],
        ["(Q=K)+", "0.500 +- 0.000", "-", "-", "0.718", "0.522"],
        ["a guess by position", "0.100", "0.100", "-", "-", "-"],
    ]


def lines(section: Section) -> list[list[str]]:
    return [[column.text(row) for column in section.columns] for row in section.rows]


def test_forms_are_told_apart_where_no_seed_overlaps() -> None:
    assert told_apart([0.5, 0.6], [0.4, 0.499])
    assert not told_apart([0.5, 0.6], [0.4, 0.501])
    assert not told_apart([0.50004, 0.6], [0.4, 0.5])  # level at three digits


def test_the_order_says_where_the_seeds_allow_one_and_whether_it_is_the_papers() -> None:
    values = {"qkv": (0.9, 0.91), "qk_eq_v": (0.89, 0.92), "q_eq_k_eq_v": (0.93, 0.94), "q_eq_k": (0.1, 0.2)}
    here = rows_of(records(values, tasks=("reverse",)))
    assert order_of(here) == (
        "Q=K=V > QKV ~ K=V > Q=K; 5 of 6 pairs told apart: "
        "0 as in the paper, 3 against it, 2 within 0.02 there"
    )
    values["q_eq_k_eq_v"] = (0.8, 0.85)
    here = rows_of(records(values, tasks=("reverse",)))
    assert order_of(here) == (
        "QKV ~ K=V > Q=K=V > Q=K; 5 of 6 pairs told apart: "
        "2 as in the paper, 1 against it, 2 within 0.02 there"
    )
    level = rows_of(records(values, tasks=("copy",)))
    assert order_of(level).endswith("5 of 6 pairs told apart: 0 as in the paper, 5 within 0.02 there")
    alike = rows_of(records({"qkv": (0.9, 0.91), "qk_eq_v": (0.89, 0.92)}, tasks=("copy",)))
    assert order_of(alike) == "no form is told from another"


def test_notes_say_what_was_averaged_and_how_often_chance_gives_an_order() -> None:
    three = {"qkv": (0.9, 0.91, 0.92), "q_eq_k": (0.1, 0.2, 0.3)}
    notes = notes_of(rows_of(records(three, tasks=("swap",))))
    assert "over 3 seed(s); 158 steps" in notes[0]
    assert notes[1] == "d 64, length 16: averages over layers 2 and heads 2/4"
    assert "by chance 10% of the pairs" in notes[3]
    assert notes[-1].startswith("swap, d 64, length 16: QKV > Q=K; 1 of 1 pairs told apart: 0 as in")


HEADER = "variant,task,n_embd,n_layer,n_head,seq_len,seed,accuracy\n"


def test_the_re_runs_files(tmp_path: Path) -> None:
    one, two = tmp_path / "0.csv", tmp_path / "1.csv"
    one.write_text(HEADER + "Q!=K=V,REVERSE,32,2,4,16,0,0.25\nQKV,SORT,64,2,4,16,0,1.0\n")
    two.write_text(HEADER + "Q!=K=V,REVERSE,32,2,4,16,1,0.75\n")
    assert read_rerun([one, two]) == {
        ("reverse", "qk_eq_v", 32, 2, 4, 16): 0.5,
        ("sort", "qkv", 64, 2, 4, 16): 1.0,
    }
    assert read_rerun([]) == {}


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", HEADER + "QKV,SORT,64\n", HEADER + "GQA,SORT,64,2,4,16,0,1\n"]
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "0.csv").write_text(text)
    with pytest.raises(ValueError, match=r"--rerun .*0\.csv: not a file of the re-run's results; give syn"):
        read_rerun([tmp_path / "0.csv"])
    with pytest.raises(ValueError, match=r"--rerun .*no\.csv: No such file"):
        read_rerun([tmp_path / "no.csv"])


def test_the_plot_has_ours_with_bars_and_the_papers_hollow() -> None:
    pytest.importorskip("matplotlib")
    from megatron_sharedproj.reporting.synthetic_plot import synthetic_figure

    some = records({form: (0.2, 0.4) for form in SYNTHETIC_FORMS})
    some += [record(0.7, "reverse", "qkv", 4, 0, length=64)]
    rows = rows_of(some, {("reverse", "qkv", 64, 2, 4, 64): 0.123})
    figure = synthetic_figure(rows)
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == (
        "d 64, length 16",
        "d 64, length 64",
    )
    assert [label.get_text() for label in first.get_xticklabels()] == [*TASKS, "mean"]
    hollow = [line for line in first.lines if line.get_marker() == "D"]
    assert sorted(line.get_ydata()[0] for line in hollow) == sorted(
        PAPER[form][task] for form in SYNTHETIC_FORMS for task in (*TASKS, "mean")
    )
    assert {line.get_markerfacecolor() for line in hollow} == {"none"}
    assert len(first.containers) == 36 and len(second.containers) == 1
    assert [line.get_ydata()[0] for line in second.lines if line.get_marker() == "_"] == [0.123]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (
        "mean, bar: standard deviation of 2 seeds" in labels
        and "the authors' re-run, the same cells" in labels
    )
