"""Generation: the cache changes no logit and holds what the formulas say; sampling keeps its promises.

Shape legend: s sequence, b batch, V padded vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig, RunConfig
from megatron_sharedproj.data.tokenizers import build_tokenizer

pytestmark = pytest.mark.usefixtures("parallel_state")

VOCAB, PADDED, POSITIONS, HEADS = 21, 24, 16, 4
CASES = [
    *(("qkv", groups) for groups in (4, 2, 1)),
    ("q_eq_k", 4),
    *(("qk_eq_v", groups) for groups in (4, 2, 1)),
    ("q_eq_k_eq_v", 4),
]
TIED = {"qk_eq_v", "q_eq_k_eq_v"}
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def load(variant: str = "qk_eq_v", groups: int = HEADS, *, seed: int = 3) -> Any:
    """A random model with logits spread wide enough that no two steps look alike."""
    from megatron_sharedproj.inference.loading import LoadedModel
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        padded_vocab_size=PADDED,
        max_position_embeddings=POSITIONS,
        attention_variant=variant,
    )
    model = build_model(config, parallel_output=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if "layernorm.weight" in name else 0.3 * noise)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=VOCAB)
    return LoadedModel(model, RunConfig(model=config), tokenizer, Path("."), torch.device("cpu"), {})


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(tokens: Tensor) -> list[str]:
    return [" ".join(str(index) for index in row) for row in tokens.tolist()]


@torch.no_grad()
def full_logits(model: Any, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None)


@torch.no_grad()
def cached_logits(model: Any, tokens: Tensor, pieces: list[int]) -> tuple[Tensor, Any]:
    """Logits [b, V] after each piece, fed one after another through one cache; and the cache."""
    from megatron.core.inference.contexts.static_context import StaticInferenceContext

    context = StaticInferenceContext(tokens.shape[0], tokens.shape[1])
    start, found = 0, []
    for size in pieces:
        piece = tokens[:, start : start + size]
        positions = torch.arange(start, start + size).expand_as(piece)
        out = model(piece, positions, None, inference_context=context, runtime_gather_output=True)
        found.append(out[:, -1])
        start += size
        context.sequence_len_offset = start
        context.enable_decode_mode()
    return torch.stack(found, dim=1), context


@pytest.mark.parametrize(("variant", "groups"), CASES)
@pytest.mark.parametrize(
    "pieces",
    [[5, 1, 1, 1, 1, 1], [1] * 10, [4, 3, 3], [3, 1, 4, 2]],
    ids=["prefill and steps", "steps only", "chunks", "mixed"],
)
def test_cached_logits_are_those_of_a_full_forward(variant: str, groups: int, pieces: list[int]) -> None:
    model = load(variant, groups).model
    tokens = random_tokens(2, sum(pieces))
    expected = full_logits(model, tokens)
    found, _ = cached_logits(model, tokens, pieces)
    ends = [sum(pieces[: index + 1]) - 1 for index in range(len(pieces))]
    for index, position in enumerate(ends):
        torch.testing.assert_close(
            found[:, index],
            expected[:, position],
            **TOLERANCE,
            msg=lambda m, p=position: f"position {p}: {m}",
        )
    # The comparison sees a wrong position: neighbours differ by far more than the tolerance.
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax(-1).min() > 0.1


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


@pytest.mark.parametrize(("variant", "groups"), CASES)
def test_measured_cache_bytes(variant: str, groups: int) -> None:
    from megatron_sharedproj.inference.generate import generate
    from megatron_sharedproj.layers.kv_cache import cache_storage_bytes

    loaded = load(variant, groups)
    batch, length, element = 2, 12, 4
    _, context = cached_logits(loaded.model, random_tokens(batch, length), [length - 2, 1, 1])
    measured = cache_storage_bytes(context)
    assert measured == formulas.kv_cache_bytes_per_token(loaded.config.model, element) * batch * length
    # By hand: tensors x groups x head size x layers x 4 bytes, for each token.
    assert measured == (1 if variant in TIED else 2) * groups * 8 * 2 * element * batch * length

    buffers = context.key_value_memory_dict
    assert len(buffers) == 2
    for key, value in buffers.values():
        assert key.shape == (length, batch, groups, 8)
        assert (key is value) == (variant in TIED)
        assert (key.data_ptr() == value.data_ptr()) == (variant in TIED)
    assert len({key.data_ptr() for key, _ in buffers.values()}) == 2  # layers do not share

    result = generate(loaded, text(random_tokens(batch, 4)), max_new_tokens=length - 4)
    assert result.cache_bytes == result.cache_formula_bytes == measured
    assert result.cache_tokens == length


@pytest.mark.parametrize(("variant", "groups"), CASES)
def test_attention_reads_the_tied_cache_as_one_tensor(variant: str, groups: int) -> None:
    """A kernel that reads a tied key/value once tells it by identity, at decode steps too."""
    model = load(variant, groups).model
    seen: list[bool] = []
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[1] is inputs[2])
        )
    cached_logits(model, random_tokens(1, 6), [3, 1, 2])
    assert seen == [variant in TIED] * 6


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


def frequencies(logits: Tensor, draws: int = 4000, **options: Any) -> Tensor:
    """Shares [V] of the tokens drawn from logits [V]."""
    from megatron_sharedproj.inference.generate import Sampling, sample

    generator = torch.Generator().manual_seed(11)
    chosen = sample(logits.expand(draws, -1).clone(), Sampling(**options), generator)
    return torch.bincount(chosen, minlength=len(logits)) / draws


# Shuffled, so that an order by id is not an order by probability.
PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.2, 0.25])


def test_temperature() -> None:
    logits = PROBABILITIES.log()
    assert frequencies(logits, temperature=0.0)[1] == 1.0
    assert frequencies(logits, temperature=0.01)[1] == 1.0
    for temperature in (1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        found = frequencies(logits, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (5, None), (9, None), (0, None)]
)
def test_top_k_keeps_k(k: int, kept: list[int] | None) -> None:
    kept = kept or [0, 1, 2, 3, 4]
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    found = frequencies(PROBABILITIES.log(), top_k=k)
    assert found.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 4]),
        (0.64, [1, 4]),
        (0.66, [1, 3, 4]),
        (0.94, [1, 2, 3, 4]),
        (0.96, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]) -> None:
    found = frequencies(PROBABILITIES.log(), top_p=p)
    assert found.nonzero().flatten().tolist() == kept
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.03)


def test_filters_are_applied_per_row_and_together() -> None:
    from megatron_sharedproj.inference.generate import Sampling, sample

    rows = torch.stack([PROBABILITIES.log(), PROBABILITIES.flip(0).log()]).repeat(500, 1)
    chosen = sample(rows, Sampling(top_k=3, top_p=0.6), torch.Generator().manual_seed(2)).view(500, 2)
    # Of the best three, 0.4 / 0.85 and 0.25 / 0.85 reach 0.6.
    assert set(chosen[:, 0].tolist()) == {1, 4}
    assert set(chosen[:, 1].tolist()) == {3, 0}


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


@pytest.mark.parametrize("count", [-1, 0, 14, 1000])
def test_more_tokens_than_positions_are_refused(count: int) -> None:
    from megatron_sharedproj.inference.generate import generate

    message = rf"--max-new-tokens {count}: must be from 1 to 13 \(3 prompt tokens, 16 positions\)"
    with pytest.raises(ValueError, match=message):
        generate(load(), ["1 2 3"], max_new_tokens=count)


def test_every_position_can_be_used() -> None:
    from megatron_sharedproj.inference.generate import Sampling, generate

    loaded = load()
    favour(loaded, list(range(POSITIONS)))
    result = generate(loaded, ["1 2 3"], max_new_tokens=13, sampling=Sampling(temperature=0))
    assert result.tokens.shape == (1, POSITIONS)
    assert result.tokens[0, 3:].tolist() == list(range(2, POSITIONS - 1))


def test_prompts_of_different_lengths_are_refused() -> None:
    from megatron_sharedproj.inference.generate import generate

    with pytest.raises(ValueError, match=r"--prompt: prompts of different lengths \[2, 3\] in one batch"):
        generate(load(), ["1 2", "1 2 3"], max_new_tokens=2)
