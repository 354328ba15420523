"""The engine: a text is the same alone, in a ragged batch, with any cache, and when places are passed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sharedproj.inference.engine import Engine, EngineOptions, Request, requests_for
from megatron_sharedproj.inference.sampling import Sampling
from random_models import CASES, ROTARY, VOCAB, full_logits, load, text

pytestmark = pytest.mark.usefixtures("parallel_state")

GREEDY = Sampling(temperature=0)
EOD = VOCAB - 1
LENGTHS = (3, 70, 9, 3, 1, 9)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [text(torch.randint(EOD, (1, length), generator=generator))[0] for length in lengths]


def never_ending(loaded: Any) -> Any:
    """The same model, where the end-of-document token is never the best."""
    with torch.no_grad():
        table = loaded.model.embedding.word_embeddings.weight
        table[EOD] = 0.0
    return loaded


def generated(loaded: Any, wanted: list[Request], sampling: Sampling = GREEDY, **options: Any) -> list[Any]:
    completions = Engine(loaded, EngineOptions(**options)).run(wanted, sampling)
    assert [done.request for done in completions] == wanted  # in the order of the input
    return [(done.tokens, done.text, done.finish_reason) for done in completions]


WAYS: dict[str, dict[str, Any]] = {
    "contiguous": {"cache": "contiguous"},
    "no cache": {"cache": ""},
    "pages of 128": {"page_size": 128},
    "chunks": {"prefill_chunk_size": 7},
    "long chunks": {"prefill_chunk_size": 33, "cache": "contiguous"},
    "two at once": {"max_batch_size": 2},
    "three, contiguous": {"max_batch_size": 3, "cache": "contiguous"},
    "few pages": {"pages": 4},
    "alone": {"max_batch_size": 1},
}
MODELS = [(*case, {}) for case in CASES] + [
    ROTARY[name] for name in ("qkv rope", "rotate_keys", "rotate_values-2", "separate_rope_head-2")
]


@pytest.mark.parametrize(("variant", "groups", "shape"), MODELS)
@pytest.mark.parametrize("temperature", [0.0, 4.0])
def test_texts_are_the_same_in_every_way_of_making_them(
    variant: str, groups: int, shape: dict[str, Any], temperature: float
) -> None:
    loaded = load(variant, groups, positions=100, **shape)
    sampling = Sampling(temperature, seed=9)
    wanted = requests_for(loaded.tokenizer, prompts(), max_new_tokens=25)
    expected = generated(loaded, wanted, sampling)
    assert (
        len({len(tokens) for tokens, _, _ in expected}) > 1 or temperature == 0
    )  # they end at different times
    for name, options in WAYS.items():
        assert generated(loaded, wanted, sampling, **options) == expected, name
    # And each as the only request of its own run.
    for request, one in zip(wanted, expected, strict=True):
        assert generated(loaded, [request], sampling) == [one]


@pytest.mark.parametrize(("variant", "groups", "shape"), MODELS)
def test_200_greedy_tokens_with_and_without_the_cache(
    variant: str, groups: int, shape: dict[str, Any]
) -> None:
    loaded = never_ending(load(variant, groups, positions=220, **shape))
    wanted = requests_for(loaded.tokenizer, prompts((5, 12)), max_new_tokens=200)
    expected = generated(loaded, wanted, cache="")
    for cache in ("paged", "contiguous"):
        assert generated(loaded, wanted, cache=cache) == expected
    assert [len(tokens) for tokens, _, _ in expected] == [200, 200]
    # Each is the best after its prefix, in one forward over the whole text.
    for request, (tokens, _, _) in zip(wanted, expected, strict=True):
        whole = torch.tensor([[*request.tokens, *tokens]])
        best = full_logits(loaded.model, whole)[0, len(request.tokens) - 1 : -1, :VOCAB].argmax(-1)
        assert best.tolist() == tokens


def test_samples_of_a_prompt_differ_and_do_not_depend_on_other_prompts() -> None:
    loaded = load(positions=64)
    sampling = Sampling(2.0, seed=4)
    several = requests_for(loaded.tokenizer, prompts((4, 6)), max_new_tokens=12, num_samples=3)
    found = generated(loaded, several, sampling)
    assert len({tuple(tokens) for tokens, _, _ in found}) == 6
    fewer = requests_for(loaded.tokenizer, prompts((4, 6))[:1], max_new_tokens=12, num_samples=5)
    assert generated(loaded, fewer, sampling)[:3] == found[:3]
    assert generated(loaded, several, Sampling(2.0, seed=5)) != found


def test_a_text_that_ends_makes_room_for_the_next() -> None:
    loaded = load(positions=100)
    wanted = [Request((1, 2, 3), max_new_tokens=n, prompt=i) for i, n in enumerate((2, 12, 2, 2, 2))]
    never_ending(loaded)
    engine = Engine(loaded, EngineOptions(max_batch_size=2))
    ended: list[int] = []
    engine.run(wanted, GREEDY, on_done=lambda done: ended.append(done.request.prompt))
    assert ended == [0, 2, 3, 4, 1]
    # Steps of two while the long text has a neighbour, then of one.
    assert engine.figures.step_tokens[0] == 2 and engine.figures.step_tokens[-1] == 1
    assert sum(engine.figures.step_tokens) == sum(n - 1 for n in (2, 12, 2, 2, 2))


def test_reasons_to_finish() -> None:
    loaded = never_ending(load(positions=40))
    ids = tuple(range(1, 11))
    (long,) = generated(loaded, [Request(ids, 1000)])
    assert long[2] == "length" and len(long[0]) == 40 - len(ids)  # the model's positions
    (some,) = generated(loaded, [Request(ids, 5)])
    assert some == (long[0][:5], " " + " ".join(map(str, long[0][:5])), "length")
    # The end-of-document token, forced: it is in the tokens and not in the text.
    with torch.no_grad():
        loaded.model.embedding.word_embeddings.weight[EOD] = loaded.model.decoder.final_layernorm.bias * 100
    (ended,) = generated(loaded, [Request(ids, 5)])
    assert ended == ([EOD], "", "eod")


def test_stop_strings_cut_the_text_across_tokens() -> None:
    loaded = never_ending(load(positions=60))
    ids = (1, 2, 3)
    ((tokens, whole, _),) = generated(loaded, [Request(ids, 30)])
    # From the middle of one token to the middle of another, at its first place in the text.
    stop = f"{str(tokens[9])[-1]} {tokens[10]} {str(tokens[11])[0]}"
    first = whole.index(stop)
    pieces: list[str] = []
    request = Request(ids, 30, stop=("no such text", stop))
    (done,) = Engine(loaded).run([request], GREEDY, on_text=lambda _, piece: pieces.append(piece))
    assert done.text == whole[:first] == "".join(pieces)
    assert done.finish_reason == "stop"
    assert tokens[: len(done.tokens)] == done.tokens and len(done.tokens) < 30


def test_requests_of_one_run_have_their_own_limits_and_stops() -> None:
    loaded = never_ending(load(positions=60))
    ((tokens, whole, _),) = generated(loaded, [Request((1, 2, 3), 20)])
    stop = f" {tokens[5]}"
    wanted = [Request((1, 2, 3), 4), Request((1, 2, 3), 20, stop=(stop,)), Request((1, 2, 3), 8)]
    found = generated(loaded, wanted)
    assert [len(part[0]) for part in found][::2] == [4, 8]
    assert found[1][1] == whole[: whole.index(stop)]
    assert [part[2] for part in found] == ["length", "stop", "length"]


def test_memory_of_a_prefill_is_bounded_by_its_chunk() -> None:
    loaded = load(positions=100)
    seen: list[int] = []
    loaded.model.decoder.layers[0].self_attention.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append(inputs[0].shape[0] * inputs[0].shape[1]), with_kwargs=True
    )
    wanted = requests_for(loaded.tokenizer, prompts((90, 10, 10, 10, 10)), max_new_tokens=1)
    generated(loaded, wanted, prefill_chunk_size=25)
    assert max(seen) <= 25 and sum(seen) == 130
    assert seen == [20, 20, 25, 25, 25, 15]


def test_only_the_last_logits_are_computed() -> None:
    loaded = load(positions=100)
    rows: list[int] = []
    loaded.model.output_layer.register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0].shape[0])
    )
    generated(loaded, requests_for(loaded.tokenizer, prompts((50,)), max_new_tokens=3))
    assert set(rows) == {1}


def test_figures_and_cache_bytes() -> None:
    loaded = load("qk_eq_v", 2, positions=200)
    engine = Engine(loaded, EngineOptions(max_batch_size=2))
    engine.run([Request((1, 2, 3), 5), Request(tuple([4] * 70), 5)], GREEDY)
    # One tensor x 2 groups x 8 elements x 2 layers x 4 bytes, three pages of 64 tokens.
    assert engine.figures.cache_bytes == 2 * 8 * 2 * 4 * 3 * 64
    assert engine.figures.cache_tokens == 3 * 64
    assert engine.figures.prefill_seconds > 0 and engine.figures.tokens_per_second > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "--max-batch-size 0: must be at least 1"),
        ({"cache": "static"}, "--cache static: choose one of paged, contiguous"),
        ({"page_size": 100}, "--page-size 100: must be a multiple of 64"),
        ({"page_size": 0}, "--page-size 0: must be a multiple of 64"),
        ({"prefill_chunk_size": -1}, r"--prefill-chunk-size -1: must be at least 0"),
        ({"pages": 0}, "pages 0: must be at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(load(), EngineOptions(**options))


def test_a_text_larger_than_a_fixed_pool_is_refused_before_any_work() -> None:
    from megatron_sharedproj.layers.kv_cache import OutOfPages

    engine = Engine(load(positions=200), EngineOptions(pages=2))
    done: list[Any] = []
    wanted = [Request((1,), 3), Request((1,), 150)]
    with pytest.raises(OutOfPages, match="a sequence of 151 tokens needs 3 pages of 64 tokens, there are 2"):
        engine.run(wanted, GREEDY, on_done=done.append)
    assert not done


def test_a_page_is_no_larger_than_the_longest_text() -> None:
    loaded = load(positions=200)
    wanted = requests_for(loaded.tokenizer, prompts((70, 3)), max_new_tokens=5)
    engine = Engine(loaded, EngineOptions(page_size=64 * 10**12))
    found = [done.tokens for done in engine.run(wanted, GREEDY)]
    assert found == [tokens for tokens, _, _ in generated(loaded, wanted)]
    assert engine.figures.cache_tokens == 2 * 128


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature: float, value: float) -> None:
    loaded = load()
    with torch.no_grad():
        loaded.model.embedding.word_embeddings.weight[3] = value
    with pytest.raises(ValueError, match=r"the model's logits are not finite; .*load an earlier iteration"):
        generated(loaded, [Request((1, 2, 3), 3)], Sampling(temperature))


def test_no_request() -> None:
    assert Engine(load()).run([]) == []


def test_one_step_serves_all_texts() -> None:
    """As many model calls as the longest text has tokens, not as all have."""
    loaded = never_ending(load(positions=64))
    calls: list[int] = []
    loaded.model.register_forward_pre_hook(lambda *_: calls.append(1))
    generated(loaded, requests_for(loaded.tokenizer, prompts((4,) * 6), max_new_tokens=10))
    assert len(calls) == 1 + 9
