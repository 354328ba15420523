"""Generation: the cache holds what the formulas say and changes no text; sampling keeps its promises.

Shape legend: s sequence, b batch, V padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from random_models import CASES, PADDED, POSITIONS, VOCAB, full_logits, load, random_tokens, text

pytestmark = pytest.mark.usefixtures("parallel_state")


@pytest.mark.parametrize(("variant", "groups"), CASES)
def test_greedy_text_is_the_same_without_the_cache(variant: str, groups: int) -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    loaded, prompts = load(variant, groups), text(random_tokens(3, 4))
    cached, plain = (
        generate(loaded, prompts, max_new_tokens=10, sampling=Sampling(temperature=0), use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached.tokens, plain.tokens) and cached.text == plain.text
    assert cached.tokens.shape[1] > 6
    assert torch.equal(cached.tokens[:, :4], random_tokens(3, 4))
    assert plain.cache_bytes == 0
    # Each chosen token is the best of the real ones after its prefix.
    best = full_logits(loaded.model, cached.tokens)[:, 3:-1, :VOCAB].argmax(-1)
    for row, wanted in zip(cached.tokens[:, 4:], best, strict=True):
        ended = (row == VOCAB - 1).nonzero()
        length = int(ended[0]) + 1 if len(ended) else len(row)
        assert torch.equal(row[:length], wanted[:length])
        assert (row[length:] == VOCAB - 1).all()


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_measured_bytes_are_the_formulas(groups: int) -> None:
    from megatron_sharedproj.inference.generate import EngineOptions, generate

    for cache, tokens in (("paged", 2 * 64), ("contiguous", 2 * 64)):
        loaded = load("qk_eq_v", groups)
        result = generate(
            loaded, text(random_tokens(2, 4)), max_new_tokens=8, options=EngineOptions(cache=cache)
        )
        # By hand: one tensor x groups x head size x layers x 4 bytes, for each token of two pages.
        assert result.cache_bytes == result.cache_formula_bytes == groups * 8 * 2 * 4 * tokens
        assert result.cache_tokens == tokens


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_k_eq_v_halves_the_cache_exactly(groups: int) -> None:
    from megatron_sharedproj.inference.generate import generate

    prompt = text(random_tokens(1, 3))
    tied, untied = (generate(load(v, groups), prompt, max_new_tokens=5) for v in ("qk_eq_v", "qkv"))
    assert tied.cache_bytes > 0
    assert 2 * tied.cache_bytes == untied.cache_bytes


def favour(loaded: Any, wanted: list[int]) -> None:
    """Make a model say ``wanted[p]`` at position p: zero branches, one-hot positions, a tied output."""
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("bias") or "linear_proj" in name or "linear_fc2" in name:
                parameter.zero_()
            elif "layernorm" in name:
                parameter.fill_(1.0)
        table = loaded.model.embedding.word_embeddings.weight
        table.zero_()
        table[:, 1 : 1 + PADDED] = torch.eye(PADDED)
        places = loaded.model.embedding.position_embeddings.weight
        places.zero_()
        for position, token in enumerate(wanted):
            places[position, 1 + token] = 10.0


def test_stops_at_the_end_of_document_and_decodes_up_to_it() -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    eod = VOCAB - 1
    loaded = load()
    favour(loaded, [1, 2, 3, 4, 5, eod, 6, 7])
    result = generate(loaded, ["9 8 7"], max_new_tokens=10, sampling=Sampling(temperature=0))
    assert result.tokens.tolist() == [[9, 8, 7, 3, 4, 5, eod]]
    assert result.text == ["9 8 7 3 4 5"]


def test_a_finished_row_waits_for_the_others() -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    eod = VOCAB - 1
    loaded = load()
    favour(loaded, [1, 2, 3, 4, 5, eod, 7, 8])
    with torch.no_grad():  # after token 11 the document ends, whatever the position says
        loaded.model.embedding.position_embeddings.weight.mul_(0.15)
        table = loaded.model.embedding.word_embeddings.weight
        table[11, 1 + 11] = 0.0
        table[11, 1 + eod], table[eod, 1 + eod] = 2.0, 3.0
    result = generate(loaded, ["9 11", "9 8"], max_new_tokens=10, sampling=Sampling(temperature=0))
    assert result.tokens.tolist() == [[9, 11, eod, eod, eod, eod, eod], [9, 8, 2, 3, 4, 5, eod]]
    assert result.text == ["9 11", "9 8 2 3 4 5"]


def test_an_empty_prompt_starts_a_document() -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    loaded = load()
    favour(loaded, [4, 5, 6, 7])
    result = generate(loaded, [""], max_new_tokens=3, sampling=Sampling(temperature=0))
    assert result.tokens.tolist() == [[VOCAB - 1, 4, 5, 6]]
    assert result.text == ["4 5 6"]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_padded_rows_are_never_chosen(temperature: float) -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    loaded = load()
    favour(loaded, [VOCAB, VOCAB + 1, VOCAB + 2] * 5)
    tokens = random_tokens(8, 2)
    assert (full_logits(loaded.model, tokens)[:, -1].argmax(-1) >= VOCAB).all()  # what would be chosen
    result = generate(
        loaded, text(tokens), max_new_tokens=12, sampling=Sampling(temperature=temperature, seed=5)
    )
    assert result.tokens.max() < VOCAB


def test_the_seed_decides_the_text() -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    loaded, prompts = load(), text(random_tokens(2, 3))

    def run(seed: int) -> list[list[int]]:
        torch.manual_seed(torch.seed() % 2**32)  # the process's own stream must not matter
        sampling = Sampling(temperature=3.0, seed=seed)
        return generate(loaded, prompts, max_new_tokens=8, sampling=sampling).tokens.tolist()

    state = torch.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    torch.set_rng_state(state)
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"--temperature -0\.5: must be at least 0 \(0: greedy\)"),
        ({"top_k": -1}, r"--top-k -1: must be at least 0 \(0: all\)"),
        ({"top_p": 0.0}, r"--top-p 0\.0: must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"--top-p 1\.5: must be in \(0, 1\]"),
        ({"top_p": float("nan")}, r"--top-p nan: must be in \(0, 1\]"),
    ],
)
def test_sampling_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    with pytest.raises(ValueError, match=message):
        generate(load(), ["1 2"], max_new_tokens=2, sampling=Sampling(**options))


@pytest.mark.parametrize("count", [-1, 0])
def test_no_tokens_are_refused(count: int) -> None:
    from megatron_sharedproj.inference.generate import generate

    with pytest.raises(ValueError, match=rf"--max-new-tokens {count}: must be at least 1"):
        generate(load(), ["1 2 3"], max_new_tokens=count)


@pytest.mark.parametrize("length", [POSITIONS, POSITIONS + 5])
def test_a_prompt_without_room_is_refused(length: int) -> None:
    from megatron_sharedproj.inference.generate import generate

    message = rf"the prompt has {length} tokens and the model 16 positions: use 1 to 15 tokens"
    with pytest.raises(ValueError, match=message):
        generate(load(), [" ".join(["1"] * length)], max_new_tokens=1)


def test_every_position_can_be_used() -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    loaded = load()
    favour(loaded, list(range(POSITIONS)))
    result = generate(loaded, ["1 2 3"], max_new_tokens=1000, sampling=Sampling(temperature=0))
    assert result.completions[0].finish_reason == "length"
    assert result.tokens.shape == (1, POSITIONS)
    assert result.tokens[0, 3:].tolist() == list(range(2, POSITIONS - 1))
