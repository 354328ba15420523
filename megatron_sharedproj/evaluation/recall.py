"""How well a trained language model recalls what its context pairs: a probe that perplexity does not replace.

A prompt is a list of pairs of words, then some of the keys again, each followed by its value:

    List: house green, water gold, public true, water gold, house green

with every word one token of the model's own vocabulary. At each repeated key (multi-query associative
recall, as in Zoology, arXiv 2312.04927) the next-token distribution is asked two things: which of the values
in the context is likeliest (chance: 1 / pairs), and whether the right one is the first choice of all tokens.
Words are drawn at random: only the context knows the pairs.

Shape legend: n prompts, p pairs in a prompt, q queries in a prompt, s tokens, b batch, V padded vocabulary,
v the tokenizer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor

from megatron_sharedproj.inference.loading import LoadedModel

INTRODUCTION = "List:"
KEY, VALUE = "KEY", "VALUE"
DEFAULT_PAIRS, DEFAULT_KEYS = (4, 8, 16, 32), (64, 256)
_SHORTEST_WORD = 4


@dataclass(frozen=True)
class RecallPlan:
    """What is asked.

    Attributes:
        pairs: loads, each the number of pairs in a prompt; (): those of DEFAULT_PAIRS that fit.
        keys: numbers of distinct keys (and of values) that prompts are drawn from; (): those of DEFAULT_KEYS
            that the vocabulary has, or all its words.
        sequences: prompts for each load and number of keys; queries: in each, at most one of a key.
        pattern: how a pair is written.
        seed: of the choice of words.
    """

    pairs: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    sequences: int = 128
    queries: int = 4
    pattern: str = f"{KEY} {VALUE},"
    seed: int = 1234

    def check(self) -> None:
        """Raise ValueError naming the flag that cannot be."""
        for name in ("sequences", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("pairs", "keys"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or any(value < 2 for value in values):
                raise ValueError(f"--{name} {','.join(map(str, values))}: give different numbers from 2 on")
        head, found, tail = self.pattern.partition(f" {VALUE}")
        again = KEY in head[len(KEY) :] + tail or VALUE in tail
        if not found or not head.startswith(KEY) or again or tail[:1].isalnum():
            raise ValueError(
                f"--pattern {self.pattern!r}: must start with {KEY}, and have {VALUE} once, as a word; "
                f"for example {RecallPlan.pattern!r} or 'KEY is VALUE.'"
            )
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")


@dataclass(frozen=True)
class Prompts:
    """The prompts of one load and number of keys.

    Attributes:
        keys: pool that they were drawn from; pairs: p.
        texts: n of them, up to the last value; starts: of each value that is asked for, one list per prompt
            (a text up to there is a context whose continuation is " VALUE").
        choices: the values of each prompt in the order of its pairs.
        answers: int64 [n, q], which of them is right.
    """

    pairs: int
    keys: int
    texts: list[str]
    starts: list[list[int]]
    choices: list[list[str]]
    answers: NDArray[np.int64]


def find_words(tokenizer: Any) -> list[str]:
    """Lower-case words, some only stems, that are one token after a space, by rising id.

    In a BPE that is by falling frequency, more or less.

    Raises:
        ValueError: where there are fewer than 4.
    """
    spellings = sorted(
        {
            text
            for index in range(tokenizer.vocab_size)
            if len(text := tokenizer.decode([index]).strip()) >= _SHORTEST_WORD
            and text.isascii()
            and text.isalpha()
            and text.islower()
        }
    )
    found = []
    if spellings:
        before, *encoded = tokenizer.encode_batch(
            [INTRODUCTION, *(f"{INTRODUCTION} {word}" for word in spellings)]
        )
        for word, ids in zip(spellings, encoded, strict=True):
            if len(ids) == len(before) + 1 and ids[:-1] == before:
                found.append((ids[-1], word))
    if len(found) < 4:
        raise ValueError(
            f"--tokenizer-model: {tokenizer.name} has {len(found)} words of one token; the probe needs "
            "a vocabulary of words, as of a BPE that was trained on text"
        )
    return [word for _, word in sorted(found)]


def make_prompts(words: Sequence[str], pairs: int, keys: int, plan: RecallPlan) -> Prompts:
    """Draw prompts: the same for the same words and plan.

    Keys and values are different words: the 1st, 3rd, ... word is a key, the 2nd, 4th, ... a value.
    """
    random = np.random.default_rng([plan.seed, pairs, keys])
    pools = (words[0 : 2 * keys : 2], words[1 : 2 * keys : 2])
    count = min(plan.queries, pairs)
    texts, starts, choices, answers = [], [], [], []
    for _ in range(plan.sequences):
        names, values = ([pool[i] for i in random.choice(keys, pairs, replace=False)] for pool in pools)
        asked = random.choice(pairs, count, replace=False)
        text, ends = INTRODUCTION, []
        for place in [*range(pairs), *asked]:
            head, _, tail = plan.pattern.partition(f" {VALUE}")
            text += " " + head.replace(KEY, names[place])
            ends.append(len(text))
            text += f" {values[place]}{tail}"
        texts.append(text[: len(text) - len(tail)])
        starts.append(ends[pairs:])
        choices.append(values)
        answers.append(asked)
    return Prompts(pairs, keys, texts, starts, choices, np.stack(answers))


def all_prompts(tokenizer: Any, plan: RecallPlan, seq_length: int) -> list[Prompts]:
    """The prompts of a plan, by load and number of keys.

    Args:
        seq_length: tokens that a prompt may have.
    Raises:
        ValueError: naming the flag, for a load that does not fit or more keys than the vocabulary has.
    """
    plan.check()
    words = find_words(tokenizer)
    most = len(words) // 2
    introduction = len(tokenizer.encode(INTRODUCTION))
    pair = plan.pattern.replace(KEY, words[0]).replace(VALUE, words[1])
    width = len(tokenizer.encode(f"{INTRODUCTION} {pair}")) - introduction

    def fits(load: int) -> bool:
        return introduction + width * (load + min(plan.queries, load)) <= seq_length

    pools = plan.keys or tuple(keys for keys in DEFAULT_KEYS if keys <= most) or (most,)
    loads = plan.pairs or tuple(load for load in DEFAULT_PAIRS if fits(load) and load <= min(pools))
    for keys in pools:
        if keys > most:
            raise ValueError(
                f"--keys {keys}: the vocabulary has {most} words for keys and as many for values"
            )
    for load in loads or (DEFAULT_PAIRS[0],):
        if not fits(load):
            raise ValueError(
                f"--pairs {load}: {width} tokens a pair, with --queries {plan.queries}, do not fit into "
                f"{seq_length} tokens; give less, or a higher --seq-length"
            )
        if load > min(pools):
            raise ValueError(f"--pairs {load}: more than --keys {min(pools)}; give fewer pairs or more keys")
    return [make_prompts(words, load, keys, plan) for keys in pools for load in loads]


def encode_prompts(
    tokenizer: Any, prompts: Prompts
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Token rows of prompts.

    Returns:
        tokens: int64 [n, s], without the last value; places: int64 [n, q], whose next token is asked for;
        values: int64 [n, p], ids of the choices.
    Raises:
        ValueError: where a word is not one token there, as after a pattern that no space follows.
    """
    n, q = prompts.answers.shape
    before = [text[:end] for text, ends in zip(prompts.texts, prompts.starts, strict=True) for end in ends]
    places = np.array([len(ids) - 1 for ids in tokenizer.encode_batch(before)]).reshape(n, q)
    rows = tokenizer.encode_batch(prompts.texts)
    flat = [f"{INTRODUCTION} {value}" for values in prompts.choices for value in values]
    values = np.array([ids[-1] for ids in tokenizer.encode_batch(flat)]).reshape(n, prompts.pairs)
    right = np.take_along_axis(values, prompts.answers, 1)
    whole = all(len(row) == len(rows[0]) for row in rows)
    if not whole or not (np.take_along_axis(np.array(rows), places + 1, 1) == right).all():
        raise ValueError(
            f"--pattern: {tokenizer.name} does not keep its words whole there (first prompt: "
            f"{prompts.texts[0][:80]!r}); put spaces or punctuation around them"
        )
    return np.array(rows)[:, :-1], places, values


@torch.no_grad()
def evaluate_recall(
    loaded: LoadedModel, plan: RecallPlan, *, seq_length: int = 0, micro_batch_size: int = 32
) -> dict[str, Any]:
    """Probe a model built with ``parallel_output=False``. Collective: data-parallel ranks share the prompts.

    Args:
        seq_length: tokens that a prompt may have; 0: the run's, which are the positions that it trained.
    Returns:
        the plan, ``words`` in the vocabulary, and ``cells``, one for each number of keys and load: keys,
        pairs, queries asked, tokens of a prompt; ``accuracy`` among the values in the context, ``stderr``,
        ``chance``; ``argmax_accuracy`` among all tokens, ``argmax_stderr`` (both errors are binomial, queries
        taken for independent); ``margin``, nats by which the right value is likelier than the others on
        average, ``margin_stderr`` over prompts. ``mean`` is over the cells.
    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    if micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {micro_batch_size}: must be at least 1")
    limit = loaded.config.model.max_position_embeddings
    seq_length = seq_length or min(loaded.config.train.seq_length, limit)
    if not 1 <= seq_length <= limit:
        raise ValueError(f"--seq-length {seq_length}: must be from 1 to the model's {limit} positions")
    every = all_prompts(loaded.tokenizer, plan, seq_length)
    cells = [_cell(loaded, prompts, micro_batch_size) for prompts in every]
    means = ("accuracy", "argmax_accuracy", "chance", "margin")
    return {
        "pattern": plan.pattern,
        "seed": plan.seed,
        "sequences": plan.sequences,
        "seq_length": seq_length,
        "words": len(find_words(loaded.tokenizer)),
        "mean": {key: sum(cell[key] for cell in cells) / len(cells) for key in means},
        "cells": cells,
    }


def _cell(loaded: LoadedModel, prompts: Prompts, micro_batch_size: int) -> dict[str, Any]:
    from megatron.core import parallel_state

    tokens, places, values = (
        torch.from_numpy(array).to(loaded.device) for array in encode_prompts(loaded.tokenizer, prompts)
    )
    answers = torch.from_numpy(prompts.answers).to(loaded.device)
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    # right among the values, right among all tokens, a prompt's mean margin and its square.
    sums = torch.zeros(4, dtype=torch.float64, device=loaded.device)
    for rows in torch.arange(rank, len(tokens), ranks, device=loaded.device).split(micro_batch_size):
        scores = _log_probs(loaded, tokens[rows], places[rows])
        ranked, first, margin = judge(scores, values[rows], answers[rows])
        each = margin.double().mean(1)
        sums += torch.stack([ranked.sum(), first.sum(), each.sum(), each.square().sum()])
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    ranked_sum, first_sum, margin_sum, square_sum = sums.tolist()
    n, q = prompts.answers.shape
    accuracy, argmax, mean = ranked_sum / (n * q), first_sum / (n * q), margin_sum / n
    variance = max(0.0, square_sum / n - mean**2) * n / max(1, n - 1)
    return {
        "keys": prompts.keys,
        "pairs": prompts.pairs,
        "queries": n * q,
        "tokens": tokens.shape[1],
        "accuracy": accuracy,
        "stderr": binomial_error(accuracy, n * q),
        "chance": 1 / prompts.pairs,
        "argmax_accuracy": argmax,
        "argmax_stderr": binomial_error(argmax, n * q),
        "margin": mean,
        "margin_stderr": math.sqrt(variance / n),
    }


def _log_probs(loaded: LoadedModel, tokens: Tensor, places: Tensor) -> Tensor:
    """Float32 log-probabilities [b, q, v] of the token after each place, over the tokenizer's vocabulary."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits = loaded.model(tokens, positions, None)  # [b, s, V]
    chosen = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
    scores: Tensor = chosen[..., : loaded.tokenizer.vocab_size].float().log_softmax(-1)
    return scores


def judge(scores: Tensor, values: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the right value wins among the context's, and among all tokens; its margin.

    A value that shares the first place with n - 1 others counts 1 / n among the context's.

    Args:
        scores: [b, q, v], log-probabilities; values: int64 [b, p], ids; answers: int64 [b, q], the right one.
    Returns:
        three tensors [b, q]: 0 to 1; bool; nats over the mean of the other values.
    """
    p = values.shape[1]
    found = scores.gather(2, values[:, None].expand(-1, scores.shape[1], -1))  # [b, q, p]
    right = found.gather(2, answers[..., None])
    best = found == found.amax(-1, keepdim=True)
    ranked = best.gather(2, answers[..., None]).squeeze(-1).double() / best.sum(-1)
    first = scores.argmax(-1) == values.gather(1, answers)
    others = (found.sum(-1) - right.squeeze(-1)) / (p - 1)
    return ranked, first, right.squeeze(-1) - others


def binomial_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` answers."""
    return math.sqrt(share * (1 - share) / count)
