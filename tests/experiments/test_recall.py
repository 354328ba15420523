"""Associative recall: its data, its training, its sweep's rows and what they say, and its command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sharedproj.experiments.recall import (
    IGNORED,
    RecallCell,
    RecallModel,
    draw,
    fit,
    recall_loss,
    run_cell,
    score,
)
from megatron_sharedproj.experiments.recall_results import (
    FULL,
    FULL_TRAINING,
    Grid,
    cells_of,
    columns_of,
    cost_of,
    notes_of,
    rows_of,
    settings_of,
    verdicts,
)
from scripts import load

TINY = {
    "hidden_size": 16, "heads": 2, "pairs": 2, "keys": 4, "queries": 2, "length": 8, "steps": 4, "batch": 4,
    "validation": 16, "test": 16, "checks": 2, "mlp_size": 16,
}  # fmt: skip


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("task", "queries", "length"), [("mqar", 3, 30), ("mqar", 5, 15), ("mqar", 1, 11), ("ar", 1, 11)]
)
def test_every_query_asks_for_a_pair_of_its_sequence(task: str, queries: int, length: int) -> None:
    cell = RecallCell(task=task, pairs=5, keys=9, queries=queries, length=length)
    tokens, labels = draw(cell, 50, stream(0))
    assert tokens.shape == labels.shape == (50, length) and tokens.dtype == labels.dtype == torch.int64
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5 and all(1 <= key <= 9 for key in pairs)
        assert len(set(pairs.values())) == 5 and all(10 <= value <= 18 for value in pairs.values())
        asked = {place for place, label in enumerate(wanted) if label != IGNORED}
        assert len(asked) == queries and min(asked) >= 10
        assert len({row[place] for place in asked}) == queries
        for place in range(10, length):
            if place in asked:
                assert wanted[place] == pairs[row[place]]
            else:
                assert row[place] == 0
    assert cell.vocabulary == 19 and cell.chance == 0.2


def test_queries_stand_everywhere() -> None:
    cell = RecallCell(pairs=2, keys=4, queries=2, length=8)
    _, labels = draw(cell, 300, stream(1))
    assert (labels != IGNORED).any(0).tolist() == [False] * 4 + [True] * 4


def test_data_are_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, validation and test sets of a seed and of another are all drawn from streams of their own."""
    from megatron_sharedproj.experiments import recall

    drawn: list[tuple[int, torch.Tensor]] = []

    def record(cell: RecallCell, count: int, generator: torch.Generator) -> Any:
        found = draw(cell, count, generator)
        drawn.append((generator.initial_seed(), found[0]))
        return found

    monkeypatch.setattr(recall, "draw", record)
    streams = {}
    for seed in (1, 2):
        drawn.clear()
        run_cell({**TINY, "seed": seed, "keys": 40})
        streams[seed] = {number for number, _ in drawn}
        assert len(streams[seed]) == 3
        first = list(drawn)
        drawn.clear()
        run_cell({**TINY, "seed": seed, "keys": 40})
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, drawn, strict=True))
    assert not streams[1] & streams[2]


@pytest.mark.parametrize("form", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v", "mqa", "q_mqa"])
def test_model_is_causal_and_has_its_forms_parameters(form: str) -> None:
    torch.manual_seed(0)
    cell = RecallCell(**{**TINY, "form": form})
    model = RecallModel(cell)
    tokens, _ = draw(cell, 3, stream(2))
    logits = model(tokens)
    assert logits.shape == (3, 8, 9)
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5])
    d, e, ids = 16, 8, 9
    projected = {
        "qkv": 3 * d, "q_eq_k": 2 * d, "qk_eq_v": 2 * d, "q_eq_k_eq_v": d, "mqa": d + 2 * e, "q_mqa": d + e,
    }[form]  # fmt: skip
    block = (d + 1) * projected + (d + 1) * d + 2 * (d * d + d) + 4 * d
    expected = ids * d + 8 * d + 2 * block + 2 * d
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_loss_score_and_gradients_equal_the_whole_softmax() -> None:
    torch.manual_seed(0)
    cell = RecallCell(**TINY)
    model = RecallModel(cell)
    tokens, labels = draw(cell, 20, stream(3))
    loss = recall_loss(model, tokens, labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    nats, right, count = torch.zeros(()), 0, 0
    for row, wanted in zip(tokens, labels, strict=True):
        log_probs = model(row[None])[0].log_softmax(-1)
        for place in range(8):
            if wanted[place] != IGNORED:
                nats = nats - log_probs[place, wanted[place]]
                right += int(log_probs[place].argmax() == wanted[place])
                count += 1
    torch.testing.assert_close(loss, nats / count)
    for mine, reference in zip(
        gradients, torch.autograd.grad(nats / count, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-4)
    for batch in (7, 64):
        accuracy, value = score(model, tokens, labels, batch)
        assert accuracy == right / count and value == pytest.approx(loss.item(), rel=1e-5)
    assert model.training


def test_a_cell_is_repeatable_and_reports_what_it_ran() -> None:
    settings = {**TINY, "lrs": [1e-3, 3e-3], "steps": 6}
    one, two = run_cell(settings), run_cell(settings)
    assert one == two == json.loads(json.dumps(one))
    assert [entry["lr"] for entry in one["tries"]] == [1e-3, 3e-3]  # none solved it
    assert one["solved_at"] is None and one["steps"] == 6 and one["chance"] == 0.5
    for entry in one["tries"]:
        assert [step for step, _ in entry["curve"]] == [3, 6]
    best = max(one["tries"], key=lambda entry: entry["curve"][-1][1])
    assert one["lr"] == best["lr"]
    assert run_cell({**settings, "seed": 2}) != one


def test_training_ends_when_the_task_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: what was tried first and solved is not tried again, and the figures are that model's."""
    from megatron_sharedproj.experiments import recall

    monkeypatch.setattr(recall, "SOLVED", 0.2)
    found = run_cell({**TINY, "keys": 3, "steps": 60, "lrs": [3e-3, 1e-3], "checks": 20, "validation": 200})
    (only,) = found["tries"]
    assert found["lr"] == only["lr"] == 3e-3
    assert found["solved_at"] == found["steps"] == only["steps"] < 60 and found["solved_at"] % 3 == 0
    assert [reached >= 0.2 for _, reached in only["curve"]] == [False] * (len(only["curve"]) - 1) + [True]


def test_one_layer_cannot_and_two_can() -> None:
    """A value has to know its key first. Two pairs of few keys: some seconds."""
    cell = RecallCell(
        heads=1, hidden_size=32, mlp_size=32, pairs=2, keys=6, queries=2, length=8, steps=700, lrs=(5e-3,)
    )
    torch.manual_seed(0)
    curve = fit(RecallModel(cell), cell, 5e-3, draw(cell, 200, stream(9)))
    assert curve[-1][1] >= 0.9 and curve[0][1] < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sort"}, "task sort: unknown; choose from mqar, ar"),
        ({"form": "xyz"}, "form xyz: unknown"),
        ({"heads": 3}, "hidden_size 16: not divisible by num_heads 3"),
        ({"form": "q_eq_k+"}, "the . forms"),
        ({"pairs": 5}, "pairs 5: more than keys 4"),
        ({"queries": 3}, "queries 3, length 8: at most as many queries as pairs"),
        ({"length": 5}, "queries 2, length 5"),
        (
            {"task": "ar"},
            "length 8, queries 2: ar has one query, behind the pairs; give queries 1 and length 5",
        ),
        ({"steps": 0}, "steps 0: must be at least 1"),
        ({"lrs": []}, r"lrs \[\]: give at least one"),
        ({"lrs": [0.0]}, r"lrs \[0.0\]: give at least one, all above 0"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_cell({**TINY, **changes})


def record(form: str, seed: int, accuracy: float, heads: int = 4, **changes: Any) -> dict[str, Any]:
    """As run_sweep leaves one."""
    settings = settings_of(RecallCell(form=form, heads=heads, seed=seed, **changes))
    result = {
        "accuracy": accuracy, "loss": 1.0, "chance": 0.25, "parameters": 1000, "lr": 1e-3,
        "solved_at": 100 * seed if accuracy > 0.9 else None, "steps": 300,
        "tries": [{"lr": 3e-3, "steps": 300, "curve": [[150, 0.1], [300, 0.2 * seed]]}],
    }  # fmt: skip
    notes = {"seconds": 2.0, "commit": "abc", "date": f"2026-11-0{seed}", "device": "cpu", "torch": "2"}
    return {"settings": settings, "result": result, **notes}


def test_grids() -> None:
    cells = cells_of(
        Grid(tasks=("mqar", "ar"), loads=((4, 16), (8, 32)), heads=(1, 2), seeds=(1, 2)), steps=50
    )
    assert len(cells) == 2 * 2 * 2 * 2 * 3
    assert {cell.seed for cell in cells[:24]} == {1}  # seed by seed
    assert {(c.task, c.pairs, c.queries, c.length) for c in cells} == {
        ("mqar", 4, 4, 16), ("mqar", 8, 8, 32), ("ar", 4, 1, 9), ("ar", 8, 1, 17),
    }  # fmt: skip
    settings = [settings_of(cell) for cell in cells]
    assert len({json.dumps(one) for one in settings}) == len(cells)
    assert all(RecallCell(**json.loads(json.dumps(one))).steps == 50 for one in settings)
    assert len(cells_of(FULL, **FULL_TRAINING)) == 2 * 4 * 5 * 6 * 5
    assert cost_of(settings_of(RecallCell(steps=200))) == 2 * cost_of(settings_of(RecallCell(steps=100)))


def test_rows_are_means_over_seeds_in_the_order_of_forms() -> None:
    rows = rows_of(
        [record("q_mqa", 1, 0.5), record("qkv", 2, 1.0), record("qkv", 1, 0.96), record("qkv", 3, 0.5)]
    )
    assert [row["form"] for row in rows] == ["qkv", "q_mqa"]
    first = rows[0]
    assert first["seeds"] == [1, 2, 3] and first["accuracy_by_seed"] == [0.96, 1.0, 0.5]
    assert first["accuracy"] == pytest.approx(0.82)
    assert (
        first["solved"] == 2 and first["solved_at"] == 150 and first["solved_at_by_seed"] == [100, 200, None]
    )
    assert first["first_lr_by_seed"] == pytest.approx([0.2, 0.4, 0.6])
    assert first["head_size"] == 16 and first["seconds"] == 6.0 and first["date"] == "2026-11-03"
    assert rows[1]["solved"] == 0 and rows[1]["solved_at"] is None
    texts = [column.text(first) for column in columns_of(rows)]
    assert "0.820 +- 0.278" in texts and "QKV" in texts and "150" in texts


@pytest.mark.parametrize(
    ("plain", "tied", "word"),
    [
        ((1.0, 0.99), (0.35, 0.3), "confirms"),
        ((1.0, 0.99), (0.99, 0.95), "refutes"),
        ((1.0, 0.99), (0.99, 0.35), "leaves open"),
        ((1.0, 0.99), (0.8, 0.8), "leaves open"),
        ((1.0, 0.5), (0.3, 0.3), "cannot test"),
        ((0.3, 0.3), (0.99, 0.99), "cannot test"),
    ],
)
def test_the_verdict_comes_from_the_data(plain: Any, tied: Any, word: str) -> None:
    records = [record("qkv", seed, value) for seed, value in enumerate(plain, 1)]
    records += [record("qk_eq_v", seed, value) for seed, value in enumerate(tied, 1)]
    # Another number of heads says nothing on the claim.
    records += [record("qk_eq_v", 1, 0.0, heads=2), record("qkv", 1, 1.0, heads=2)]
    (found,) = verdicts(rows_of(records))
    assert found["word"] == word and word in found["text"] and "4 pairs of 16 keys" in found["text"]
    assert found["text"] in notes_of(rows_of(records))


def test_no_verdict_without_both_forms() -> None:
    assert verdicts(rows_of([record("qkv", 1, 1.0), record("q_mqa", 1, 0.2)])) == []


def test_tool_runs_resumes_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    tool = load("tools/recall_experiment.py")
    words = [
        "--folder", str(tmp_path / "sweep"), "--loads", "2:4", "--heads", "4", "--forms", "qkv,qk_eq_v",
        "--seeds", "1,2", "--hidden-size", "16", "--steps", "3", "--lrs", "1e-3", "--batch", "4",
    ]  # fmt: skip
    assert tool.main([*words, "--plot", str(tmp_path / "recall.png")]) == 0
    printed = capsys.readouterr().out
    assert "4 cells" in printed and "K=V" in printed and "cannot test the published collapse" in printed
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert tool.main([*words, "--output", str(tmp_path / "recall.csv")]) == 0
    assert "4 of 4 cells are done already" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "results.jsonl").read_text().splitlines() == lines
    assert len((tmp_path / "recall.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loads", "4"], "'4' is not a load; give PAIRS:KEYS, like 4:16"),
        (["--loads", "8:4"], "pairs 8: more than keys 4"),
        (["--heads", "3"], "hidden_size 64: not divisible by num_heads 3"),
        (["--forms", "q_eq_k+"], "'q_eq_k+' is unknown"),
        (["--tasks", "sort"], "'sort' is unknown; choose from mqar, ar"),
        (["--plot", "recall.svg"], "--plot recall.svg: must be a file name that ends in .png"),
        (["--output", "no/x.csv"], "--output no/x.csv: no is not a folder"),
    ],
)
def test_tool_mistakes_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load("tools/recall_experiment.py")
    try:
        code = tool.main(["--folder", str(tmp_path / "sweep"), *words])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()
