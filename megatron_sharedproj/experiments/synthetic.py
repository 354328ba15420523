"""The paper's five synthetic tasks: lists of digits, one answer per position, read by a small encoder.

Paper: "Do Transformers Need Three Projections?" (arXiv 2606.04032), Table 1 and its set-up. What that leaves
open is as in the authors' later re-run (synthetic_tasks.py of their repository): batches of 128, warm-up
over 5% of the steps, positions that start as N(0, 1), the term of a + form as N(0, 0.02), other weights as
PyTorch starts them. Lists and weights are drawn in its order too: seed by seed its figures come out.

What a task asks of attention: sub and copy nothing, the MLP sees all it needs. sort asks for how often each
digit occurs, which an even average over the list tells, and for the own position. reverse and swap ask for
one other place, found by position alone; i reads j and j reads i, so that symmetric scores S = K K^T could
serve, but S_ij <= max(S_ii, S_jj): one of the two looks at itself no less than at the other.

Shape legend: n lists, b batch, s length of a list, d hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sharedproj.experiments.small_models import (
    FORMS,
    SmallConfig,
    SmallTransformer,
    count_parameters,
)
from megatron_sharedproj.experiments.small_training import Batch, Schedule, train
from megatron_sharedproj.torch_layers.positional_term import PositionalTerm

DIGITS = 10
# task -> answers [n, s] of lists [n, s]
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse": lambda lists: lists.flip(1),
    "sort": lambda lists: lists.sort(1).values,
    "sub": lambda lists: DIGITS - 1 - lists,
    "swap": lambda lists: lists.roll(lists.shape[1] // 2, 1),
    "copy": lambda lists: lists.clone(),
}
SYNTHETIC_FORMS = tuple(form for form, (_, shared) in FORMS.items() if not shared)
_EVALUATED_AT_ONCE = 500
_POSITIONS_DRAWN = 128  # whatever the length, as in the authors' code


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        task: of TASKS; form: of SYNTHETIC_FORMS; length: s.
        seed: of lists, their order and the weights; forms and shapes of one seed see the same lists.
        warmup: share of the steps with a rising learning rate.
        position_std: standard deviation of the positions at the start; term_std: of a + form's w, 0 for w as
            the layer starts it (positional_term.py: even, scores keep their size).
        train_lists, test_lists: how many; no test list is among the training lists.
    Raises:
        ValueError: naming the flag of tools/synthetic_experiment.py that can't be.
    """

    task: str
    form: str
    hidden_size: int
    layers: int
    heads: int
    length: int
    seed: int
    epochs: int = 2
    batch_size: int = 128
    lr: float = 1e-3
    warmup: float = 0.05
    position_std: float = 1.0
    term_std: float = 0.02
    train_lists: int = 10_000
    test_lists: int = 2_000

    def __post_init__(self) -> None:
        for name, known in (("task", tuple(TASKS)), ("form", SYNTHETIC_FORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name}s {getattr(self, name)}: unknown; choose from {', '.join(known)}")
        if self.seed < 0:
            raise ValueError(f"--seeds {self.seed}: must be 0 or more")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"--heads {self.heads}: must divide --hidden-sizes {self.hidden_size}; change one"
            )
        if self.task == "swap" and self.length % 2:
            raise ValueError(f"--lengths {self.length}: swap needs an even one; change it, or leave swap out")
        if DIGITS**self.length < 2 * (self.train_lists + self.test_lists):
            raise ValueError(
                f"--lengths {self.length}: too few lists of that length for {self.train_lists:,} to train on "
                f"and {self.test_lists:,} others; give a longer one"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup {self.warmup}: must be in [0, 1), a share of the steps")
        for name in ("position_std", "term_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")

    @property
    def steps(self) -> int:
        """Optimizer steps; the last batch of an epoch may be a smaller one."""
        return self.epochs * math.ceil(self.train_lists / self.batch_size)

    @property
    def schedule(self) -> Schedule:
        """A warm-up of one step at least, unless there is none."""
        warmup = max(1, int(self.warmup * self.steps)) if self.warmup else 0
        return Schedule(self.steps, self.lr, min(warmup, self.steps - 1))


@dataclass(frozen=True)
class Grid:
    """Every combination of some shapes, for some tasks."""

    hidden_sizes: tuple[int, ...] = (64,)
    layers: tuple[int, ...] = (2,)
    heads: tuple[int, ...] = (2, 4)
    lengths: tuple[int, ...] = (16,)
    tasks: tuple[str, ...] = tuple(TASKS)


FULL = Grid((32, 64, 256), (2, 4), (2, 4), (16, 64, 128))
# What a core does in less than an hour; sub and copy are 1.000 for every form at size 64 (authors' re-run).
REDUCED = (
    Grid(hidden_sizes=(32,), heads=(4,)),
    Grid(hidden_sizes=(64,)),
    Grid(hidden_sizes=(64,), heads=(4,), lengths=(64,), tasks=("reverse", "sort", "swap")),
)


def cells_of(
    grids: Sequence[Grid], tasks: Sequence[str], forms: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[Cell]:
    """The cells of some grids, each once, seed by seed.

    Args:
        settings: Cell's, for all of them.
    Raises:
        ValueError: as Cell does.
    """
    return list(
        dict.fromkeys(
            Cell(task, form, hidden_size, layers, heads, length, seed, **settings)
            for seed in seeds
            for grid in grids
            for hidden_size, layers, heads, length in itertools.product(
                grid.hidden_sizes, grid.layers, grid.heads, grid.lengths
            )
            for task in tasks
            if task in grid.tasks
            for form in forms
        )
    )


def seconds_of(settings: Mapping[str, Any]) -> float:
    """About how long a cell takes on one core (measured on an AMD EPYC)."""
    cell = Cell(**settings)
    tokens = cell.length * (cell.epochs * cell.train_lists + cell.test_lists / 3)
    of_token = 7.1e-4 * cell.hidden_size**2 + 0.053 * cell.hidden_size  # microseconds
    return cell.layers * (4e-3 * cell.steps + 1e-6 * of_token * tokens)


class DigitEncoder(nn.Module):
    """Digits [b, s] -> logits [b, s, 10]: one-hot digits through a linear map, learned positions, encoder."""

    def __init__(self, config: SmallConfig, length: int):
        super().__init__()
        self.embedding = nn.Linear(DIGITS, config.hidden_size)
        self.positions = nn.Parameter(torch.randn(length, config.hidden_size))
        self.body = SmallTransformer(config)
        self.head = nn.Linear(config.hidden_size, DIGITS)

    def forward(self, lists: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(lists, DIGITS).to(self.positions.dtype)
        return self.head(self.body(self.embedding(one_hot) + self.positions))


def build_model(cell: Cell) -> DigitEncoder:
    """The model of a cell; the caller's random state stays as it is."""
    config = SmallConfig(cell.hidden_size, cell.layers, cell.heads, cell.form)
    with torch.random.fork_rng(devices=[]):
        model = DigitEncoder(config, cell.length)
        torch.manual_seed(cell.seed)
        model.embedding.reset_parameters()
        drawn = torch.randn(max(_POSITIONS_DRAWN, cell.length), cell.hidden_size)[: cell.length]
        model.positions.data = cell.position_std * drawn
        for module in model.body.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, PositionalTerm) and cell.term_std:
                nn.init.normal_(module.weight, std=cell.term_std)
        model.head.reset_parameters()
    return model


def make_lists(cell: Cell, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Training and test lists, int64 [n, s]; no list is in both.

    Args:
        generator: draws them; by default a new one of the cell's seed.
    """
    generator = generator or torch.Generator().manual_seed(cell.seed)
    training = torch.randint(0, DIGITS, (cell.train_lists, cell.length), generator=generator)
    known = {row.tobytes() for row in training.numpy()}
    found = list[Tensor]()
    while len(found) < cell.test_lists:
        drawn = torch.randint(0, DIGITS, (cell.test_lists, cell.length), generator=generator)
        found += [row for row in drawn if row.numpy().tobytes() not in known]
    return training, torch.stack(found[: cell.test_lists])


def _batches(size: int, lists: Tensor, answers: Tensor, generator: torch.Generator) -> Iterator[Batch]:
    while True:
        for part in torch.randperm(len(lists), generator=generator).split(size):
            yield lists[part], answers[part]


def _loss(model: nn.Module, lists: Tensor, answers: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(lists).flatten(0, 1), answers.flatten())


def run_cell(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train and test one cell.

    Args:
        settings: of a Cell.
    Returns:
        token_accuracy and sequence_accuracy (lists that are right as a whole) on the test lists, test_loss
        (nats per position), train_loss (mean of the last 5% of the steps), parameters, steps.
    Raises:
        ValueError: for settings that can't be, or a loss that is not finite.
    """
    cell = Cell(**settings)
    generator = torch.Generator().manual_seed(cell.seed)
    training, tests = make_lists(cell, generator)
    answer, model = TASKS[cell.task], build_model(cell)
    batches = _batches(cell.batch_size, training, answer(training), generator)
    losses = train(model, batches, _loss, cell.schedule)
    last = losses[-max(1, cell.steps // 20) :]
    return {
        **evaluate(model, tests, answer(tests)),
        "train_loss": sum(last) / len(last),
        "parameters": count_parameters(model),
        "steps": cell.steps,
    }


@torch.inference_mode()
def evaluate(model: nn.Module, lists: Tensor, answers: Tensor) -> dict[str, float]:
    """Accuracy by position and by list, and the mean cross-entropy, of lists and answers [n, s]."""
    model.eval()
    parts = (model(part) for part in lists.split(_EVALUATED_AT_ONCE))
    logits = torch.cat(list(parts))
    right = logits.argmax(-1) == answers
    return {
        "token_accuracy": right.double().mean().item(),
        "sequence_accuracy": right.all(1).double().mean().item(),
        "test_loss": nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).item(),
    }


def blind_accuracy(task: str, length: int) -> float:
    """Token accuracy of the best guess from the position alone, without a look at the list.

    Of a sorted list of uniform digits, position i (from 0) is at most k if more than i digits are.
    """
    if task != "sort":
        return 1 / DIGITS
    total = 0.0
    for place in range(length):
        at_most = [0.0, *(_more_than(place, length, (k + 1) / DIGITS) for k in range(DIGITS))]
        total += max(upper - lower for lower, upper in itertools.pairwise(at_most))
    return total / length


def _more_than(place: int, length: int, share: float) -> float:
    """P(more than `place` of `length` draws hit), each with probability `share`."""
    return sum(
        math.comb(length, hits) * share**hits * (1 - share) ** (length - hits)
        for hits in range(place + 1, length + 1)
    )
