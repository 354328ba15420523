"""The synthetic tasks: what is asked, of which lists, by which model, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from megatron_sharedproj.experiments.small_models import count_parameters
from megatron_sharedproj.experiments.synthetic import (
    FULL,
    REDUCED,
    SYNTHETIC_FORMS,
    TASKS,
    Cell,
    Grid,
    blind_accuracy,
    build_model,
    cells_of,
    evaluate,
    make_lists,
    run_cell,
    seconds_of,
)
from megatron_sharedproj.torch_layers.positional_term import PositionalTerm

SMALL = Cell("reverse", "qkv", 16, 1, 2, 6, seed=1, train_lists=300, test_lists=50, batch_size=32)


def test_answers() -> None:
    lists = torch.tensor([[4, 3, 9, 8, 1, 7], [0, 0, 5, 5, 0, 2]])
    answers = {
        "reverse": [[7, 1, 8, 9, 3, 4], [2, 0, 5, 5, 0, 0]],
        "sort": [[1, 3, 4, 7, 8, 9], [0, 0, 0, 2, 5, 5]],
        "sub": [[5, 6, 0, 1, 8, 2], [9, 9, 4, 4, 9, 7]],
        "swap": [[8, 1, 7, 4, 3, 9], [5, 0, 2, 0, 0, 5]],
        "copy": lists.tolist(),
    }
    assert {task: answer(lists).tolist() for task, answer in TASKS.items()} == answers


def test_lists_are_the_seeds_and_no_test_list_was_trained_on() -> None:
    cell = replace(
        SMALL, length=5, train_lists=10_000, test_lists=2_000
    )  # of 100,000: chance would repeat some
    training, tests = make_lists(cell)
    assert training.shape == (10_000, 5) and tests.shape == (2_000, 5)
    assert sorted(training.unique().tolist()) == list(range(10))
    assert not {tuple(row) for row in training.tolist()} & {tuple(row) for row in tests.tolist()}
    other_form = replace(cell, form="q_eq_k+", heads=4, layers=2, hidden_size=32, task="sort")
    for same, mine in zip(make_lists(other_form), (training, tests), strict=True):
        assert torch.equal(same, mine)
    assert not torch.equal(make_lists(replace(cell, seed=2))[0], training)
    counts = training.flatten().bincount(minlength=10) / training.numel()
    assert (counts - 0.1).abs().max() < 0.005


def test_weights_are_the_seeds_and_the_callers_random_state_stays() -> None:
    torch.manual_seed(9)
    state = torch.get_rng_state()
    one, two, other = build_model(SMALL), build_model(SMALL), build_model(replace(SMALL, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.positions, other.positions)


def test_starts_of_positions_and_of_the_plus_forms() -> None:
    wide = replace(SMALL, hidden_size=256, length=64)
    assert build_model(wide).positions.std().item() == pytest.approx(1.0, abs=0.05)
    assert build_model(replace(wide, position_std=0.1)).positions.std().item() == pytest.approx(0.1, abs=0.01)
    assert not build_model(replace(wide, position_std=0.0)).positions.any()
    for form in ("q_eq_k+", "q_eq_k_eq_v+"):
        terms = {
            std: [
                module.weight.detach()
                for module in build_model(replace(SMALL, form=form, layers=20, term_std=std)).modules()
                if isinstance(module, PositionalTerm)
            ]
            for std in (0.0, 0.02)
        }
        assert all((weight == 0.1).all() for weight in terms[0.0])
        assert torch.cat(terms[0.02]).std().item() == pytest.approx(0.02, rel=0.25)
        assert torch.cat(terms[0.02]).mean().abs().item() < 0.006


def test_the_model_is_an_encoder_over_digit_and_position() -> None:
    model = build_model(SMALL)
    lists = torch.tensor([[3, 1, 4, 1, 5, 9]])
    table = model.embedding.weight.T + model.embedding.bias
    plain = model.head(model.body(table[lists] + model.positions))
    torch.testing.assert_close(model(lists), plain)
    # No mask: the first answer depends on the last digit.
    assert not torch.allclose(model(torch.tensor([[3, 1, 4, 1, 5, 2]]))[0, 0], plain[0, 0])


def test_steps_and_their_warm_up() -> None:
    paper = Cell("sort", "qkv", 64, 2, 2, 16, seed=0)
    assert (paper.steps, paper.schedule.warmup, paper.schedule.lr, paper.schedule.clip) == (158, 7, 1e-3, 5.0)
    assert replace(paper, warmup=0.0).schedule.warmup == 0
    assert replace(SMALL, epochs=1, batch_size=300).schedule.warmup == 0
    assert SMALL.steps == 20 and SMALL.schedule.warmup == 1


def test_a_cell_learns_and_repeats_itself() -> None:
    settings = asdict(replace(SMALL, task="sub", epochs=10, lr=1e-2))
    one = run_cell(settings)
    assert one == run_cell(settings)
    assert one["token_accuracy"] == one["sequence_accuracy"] == 1.0
    assert one["test_loss"] < 0.2 and one["train_loss"] < 0.2 and one["steps"] == 100
    assert one["parameters"] == count_parameters(build_model(SMALL))


def test_another_place_is_found_by_its_position() -> None:
    """Without positions an answer cannot depend on the place: one digit for all of a list."""
    settings = replace(SMALL, hidden_size=32, train_lists=1000, epochs=15, lr=5e-3)
    assert run_cell(asdict(settings))["token_accuracy"] > 0.9
    blank = build_model(replace(settings, position_std=0.0))
    logits = blank(torch.tensor([[1, 2, 3, 1, 2, 3]]))
    torch.testing.assert_close(logits[:, :3], logits[:, 3:])


@pytest.mark.parametrize(
    ("form", "accuracy"), [("qkv", 0.4188), ("q_eq_k", 0.1716), ("qk_eq_v", 0.2701), ("q_eq_k_eq_v+", 0.1820)]
)
def test_the_authors_re_run_comes_out(form: str, accuracy: float) -> None:
    """Their synthetic_results_shard0.csv: reverse, size 32, 2 layers, 2 heads, length 16, seed 0."""
    found = run_cell(asdict(Cell("reverse", form, 32, 2, 2, 16, seed=0)))
    assert found["token_accuracy"] == pytest.approx(accuracy, abs=0.01)


def test_accuracies_count_positions_and_whole_lists() -> None:
    class Echo(torch.nn.Module):
        def forward(self, lists: torch.Tensor) -> torch.Tensor:
            return 5.0 * torch.nn.functional.one_hot(lists, 10).float()

    lists = torch.tensor([[1, 2], [3, 4]] * 400)  # more than one batch
    answers = torch.tensor([[1, 2], [3, 5]] * 400)
    found = evaluate(Echo(), lists, answers)
    wrong, right = math.log(9 + math.exp(5)), math.log(9 + math.exp(5)) - 5
    assert found == {
        "token_accuracy": 0.75,
        "sequence_accuracy": 0.5,
        "test_loss": pytest.approx((3 * right + wrong) / 4, rel=1e-5),
    }


@pytest.mark.parametrize("length", [1, 2, 16])
def test_a_guess_by_position(length: int) -> None:
    lists = torch.randint(0, 10, (100_000, length), generator=torch.Generator().manual_seed(0))
    ordered = lists.sort(1).values
    best = sum(column.bincount(minlength=10).max().item() for column in ordered.T) / ordered.numel()
    assert blind_accuracy("sort", length) == pytest.approx(best, abs=0.004)
    assert blind_accuracy("reverse", length) == 0.1


def test_the_grids() -> None:
    full = cells_of((FULL,), tuple(TASKS), SYNTHETIC_FORMS, (0, 1, 2))
    assert len(full) == 5 * 6 * 36 * 3 == len(set(full))
    reduced = cells_of(REDUCED, tuple(TASKS), SYNTHETIC_FORMS, (0, 1, 2))
    assert set(reduced) < set(full) and [cell.seed for cell in reduced] == sorted(c.seed for c in reduced)
    assert sum(seconds_of(asdict(cell)) for cell in reduced) < 45 * 60
    twice = cells_of((Grid(), Grid()), ("copy",), ("qkv",), (3,), epochs=1)
    assert [(cell.heads, cell.seed, cell.epochs) for cell in twice] == [(2, 3, 1), (4, 3, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "add"}, "--tasks add: unknown; choose from reverse, "),
        ({"form": "mqa"}, "--forms mqa: unknown; choose from qkv, "),
        ({"heads": 3}, "--heads 3: must divide --hidden-sizes 16"),
        ({"task": "swap", "length": 7}, "--lengths 7: swap needs an even one"),
        ({"length": 2}, "--lengths 2: too few lists of that length for 300 to train on and 50 others"),
        ({"seed": -1}, "--seeds -1: must be 0 or more"),
        ({"warmup": 1.0}, r"--warmup 1.0: must be in \[0, 1\)"),
        ({"position_std": math.nan}, "--position-std nan: must be 0 or more"),
        ({"term_std": -0.1}, "--term-std -0.1: must be 0 or more"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
