"""Associative recall learned by small causal transformers: accuracy by heads, form of attention and load.

A sequence is a list of key-value pairs, then keys that ask for their values (a form of Zoology's task, arXiv
2312.04927): one at the end (``ar``), or ``queries`` of them at random places among blanks (``mqar``). Only
queries are trained and scored. A model solves it in two steps: a value learns which key stands before it, and
a query finds the value that knows its key. The first attends by position and fetches content, the second
attends by content and fetches content: a tied key and value serves both uses with one vector per head.

Shape legend: b batch, s sequence, p pairs, q queries, d hidden size, V token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sharedproj.experiments.small_models import SmallConfig, SmallTransformer, count_parameters
from megatron_sharedproj.experiments.small_training import Schedule, train

TASKS = ("mqar", "ar")
BLANK = 0
IGNORED = -100  # a label that torch's cross-entropy leaves out
SOLVED = 0.99
_TRAIN, _VALIDATION, _TEST = range(3)  # streams of random numbers


@dataclass(frozen=True)
class RecallCell:
    """One training.

    Attributes:
        task: ``mqar`` or ``ar``.
        form: a key of small_models.FORMS; heads, hidden_size, layers, mlp_size: the model's shape.
        pairs: the load; keys: distinct keys, and as many distinct values, that sequences are drawn from.
        queries: keys that an mqar sequence asks for; length: its tokens.
        steps: at most; training ends where SOLVED is reached on the validation set.
        lrs: peak learning rates, tried one after the other, each from the same start, until one solves it.
        batch: sequences per step; checks: how often it is validated.
        validation, test: sequences in these sets.
    """

    task: str = "mqar"
    form: str = "qkv"
    heads: int = 1
    hidden_size: int = 64
    layers: int = 2
    mlp_size: int = 0
    pairs: int = 4
    keys: int = 16
    queries: int = 4
    length: int = 16
    steps: int = 6000
    lrs: Sequence[float] = (3e-3, 1e-3)
    batch: int = 32
    seed: int = 1
    checks: int = 40
    validation: int = 256
    test: int = 1024

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task}: unknown; choose from {', '.join(TASKS)}")
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("mlp_size", "seed") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{field.name} {value}: must be at least {least}")
        if not self.lrs or any(lr <= 0 for lr in self.lrs):
            raise ValueError(f"lrs {list(self.lrs)}: give at least one, all above 0")
        if self.pairs > self.keys:
            raise ValueError(f"pairs {self.pairs}: more than keys {self.keys}; give fewer pairs or more keys")
        if self.task == "ar":
            if self.queries != 1 or self.length != 2 * self.pairs + 1:
                raise ValueError(
                    f"length {self.length}, queries {self.queries}: ar has one query, behind the pairs; give "
                    f"queries 1 and length {2 * self.pairs + 1}"
                )
        elif self.queries > self.pairs or self.length < 2 * self.pairs + self.queries:
            raise ValueError(
                f"queries {self.queries}, length {self.length}: at most as many queries as pairs "
                f"({self.pairs}), and 2 * pairs + queries tokens or more"
            )

        self.shape()  # raises for what a model cannot have

    def shape(self) -> SmallConfig:
        """Of the transformer."""
        return SmallConfig(
            self.hidden_size, self.layers, self.heads, self.form, causal=True, mlp_size=self.mlp_size
        )

    @property
    def vocabulary(self) -> int:
        """V: the blank, keys, values."""
        return 1 + 2 * self.keys

    @property
    def chance(self) -> float:
        """Accuracy of choosing among the values of the context without finding the key."""
        return 1 / self.pairs


def draw(cell: RecallCell, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of a cell's task.

    Ids: 0 is the blank, then come the keys, then the values. The keys of a sequence are all different, and so
    are its values.

    Returns:
        tokens: int64 [count, s]; labels: int64 [count, s], the value at a query, IGNORED elsewhere.
    """

    def choose(of: int, number: int) -> Tensor:
        return torch.rand(count, of, generator=generator).topk(number).indices

    pairs, queries = cell.pairs, cell.queries
    names, values = 1 + choose(cell.keys, pairs), 1 + cell.keys + choose(cell.keys, pairs)
    asked = choose(pairs, queries)
    places = 2 * pairs + choose(cell.length - 2 * pairs, queries)
    tokens = torch.full((count, cell.length), BLANK)
    tokens[:, : 2 * pairs] = torch.stack([names, values], -1).flatten(1)
    tokens.scatter_(1, places, names.gather(1, asked))
    labels = torch.full_like(tokens, IGNORED).scatter_(1, places, values.gather(1, asked))
    return tokens, labels


class RecallModel(nn.Module):
    """Embeddings of tokens and positions, a small causal transformer, and a head tied to the token embedding.

    Tied as in Zoology's models. int64 [b, s] -> logits [b, s, V].
    """

    def __init__(self, cell: RecallCell):
        super().__init__()
        d = cell.hidden_size
        self.tokens, self.positions = nn.Embedding(cell.vocabulary, d), nn.Embedding(cell.length, d)
        self.transformer = SmallTransformer(cell.shape())
        for embedding in (self.tokens, self.positions):
            # Of the size of what torch's default linear layers add to them; beside it 0.02 would drown.
            nn.init.normal_(embedding.weight, std=0.5)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[b, s, d]."""
        return self.transformer(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])

    def head(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        return hidden @ self.tokens.weight.T

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def recall_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the queries, nats; only their logits are made."""
    asked = labels != IGNORED
    return nn.functional.cross_entropy(model.head(model.hidden(tokens)[asked]), labels[asked])


@torch.no_grad()
def score(model: RecallModel, tokens: Tensor, labels: Tensor, batch: int = 256) -> tuple[float, float]:
    """Share of queries whose likeliest token is the value, and their mean cross-entropy in nats."""
    model.eval()
    right, nats, count = 0, 0.0, 0
    for rows, wanted in zip(tokens.split(batch), labels.split(batch), strict=True):
        asked = wanted != IGNORED
        logits = model.head(model.hidden(rows)[asked])
        right += int((logits.argmax(-1) == wanted[asked]).sum())
        nats += nn.functional.cross_entropy(logits, wanted[asked], reduction="sum").item()
        count += int(asked.sum())
    model.train()
    return right / count, nats / count


class _Solved(Exception):
    """Ends a training."""


def run_cell(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train models from scratch until one solves the task, and test the best. Settings: fields of RecallCell.

    Returns:
        accuracy, loss (nats per query): on test sequences; chance; parameters;
        lr: of the model that was best on the validation set, whose figures these are;
        solved_at: the first step that was found to reach SOLVED there, or None; steps: that it ran;
        tries: of each learning rate that was tried, lr, steps and curve: [step, validation accuracy] pairs.
    Raises:
        ValueError: for settings that can't be, or a loss that is not finite.
    """
    cell = RecallCell(**settings)
    validation, test = (draw(cell, count, _stream(cell, part)) for part, count in (
        (_VALIDATION, cell.validation), (_TEST, cell.test),
    ))  # fmt: skip
    best: tuple[float, dict[str, Any]] | None = None
    tries = []
    for lr in cell.lrs:
        torch.manual_seed(cell.seed)
        model = RecallModel(cell)
        curve = fit(model, cell, lr, validation)
        step, reached = curve[-1]
        tries.append({"lr": lr, "steps": step, "curve": [list(point) for point in curve]})
        if best is None or reached > best[0]:
            accuracy, loss = score(model, *test)
            solved_at = step if reached >= SOLVED else None
            found = {"accuracy": accuracy, "loss": loss, "lr": lr, "solved_at": solved_at, "steps": step}
            best = reached, found
        if reached >= SOLVED:
            break
    assert best is not None
    return {**best[1], "chance": cell.chance, "parameters": count_parameters(model), "tries": tries}


def fit(
    model: RecallModel, cell: RecallCell, lr: float, validation: tuple[Tensor, Tensor]
) -> list[tuple[int, float]]:
    """Train; the validation accuracy after some numbers of steps, the last of which ended the training."""
    curve: list[tuple[int, float]] = []

    def check(step: int) -> None:
        curve.append((step, score(model, *validation)[0]))
        if curve[-1][1] >= SOLVED:
            raise _Solved

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        random, every = _stream(cell, _TRAIN), max(1, cell.steps // cell.checks)
        for step in range(cell.steps):
            if step and step % every == 0:
                check(step)
            yield draw(cell, cell.batch, random)

    try:
        train(model, batches(), recall_loss, Schedule(cell.steps, lr, cell.steps // 20))
        check(cell.steps)
    except _Solved:
        pass
    return curve


def _stream(cell: RecallCell, part: int) -> torch.Generator:
    """Random numbers of a seed for one part of its data: never those of another part or seed."""
    return torch.Generator().manual_seed(3 * cell.seed + part)
