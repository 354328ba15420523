"""generate() with the one-tensor cache: the same tokens, in half the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from megatron_sharedproj import formulas
from megatron_sharedproj.conversion.config_map import model_config
from megatron_sharedproj.layers.hf import BLOCK, SharedKVLayer, SharedKVStaticLayer, SharedProjCache
from tiny_hf import EIGHT, MODELS, TIED, H, build, needs_kernel, tokens

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
# One for each rotary scheme of a tied key/value.
ROTATED = ["rotate_keys", "rotate_keys-half", "rotate_values", "partial-one", "separate_rope_head"]
KINDS = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def generate(model: Any, ids: torch.Tensor, new: int = 24, **options: Any) -> Any:
    return model.generate(ids, max_new_tokens=new, **{**GREEDY, **options})


@pytest.mark.parametrize("name", [*EIGHT, "rope", "rope_q_eq_k", *ROTATED])
def test_200_greedy_tokens(name: str) -> None:
    model, ids = build(name), tokens(2, 8)
    cached = generate(model, ids, 200)
    assert cached.sequences.shape == (2, 208)
    assert cached.sequences[:, 8:].unique().numel() > 4, "a constant continuation shows little"
    # All at once: each token must be the best one after those before it.
    with torch.no_grad():
        best = model(cached.sequences[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(best[:, 7:], cached.sequences[:, 8:])


@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_cache_on_and_off(name: str, kind: str, way: str) -> None:
    model, ids = build(name), tokens()
    model.config.use_compiled_kernel = way == "kernel"
    expected = generate(model, ids, use_cache=False).sequences
    found = generate(model, ids, **KINDS[kind])
    assert torch.equal(found.sequences, expected)
    cache = found.past_key_values
    assert isinstance(cache, SharedProjCache)
    layer = SharedKVLayer if kind == "dynamic" else SharedKVStaticLayer
    assert all(type(x) is layer for x in cache.layers)


def test_cache_bytes_after_generation() -> None:
    """Live storage: K=V half of qkv's, and m g / (2 h) of it with g groups (paper, section 3)."""
    for kind, room in (("dynamic", BLOCK), ("static", 9 + 24)):
        measured = {}
        for name in EIGHT:
            cache = generate(build(name), tokens(), **KINDS[kind]).past_key_values
            storages = {
                x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                for layer in cache.layers
                for x in (layer.keys, layer.values)
            }
            measured[name] = sum(storages.values())
            assert measured[name] == cache.nbytes()
        full = measured["qkv"]
        slack = 2 if kind == "static" else 0  # transformers 5.8 leaves out the last token's place
        assert full <= 2 * 2 * 2 * room * H * 8 * 4
        assert full >= 2 * 2 * 2 * (room - slack) * H * 8 * 4
        fractions = {name: size / full for name, size in measured.items()}
        assert fractions == {
            "qkv": 1, "q_eq_k": 1, "qk_eq_v": 1 / 2, "q_eq_k_eq_v": 1 / 2,
            "qkv-2": 1 / 2, "qkv-1": 1 / 4, "qk_eq_v-2": 1 / 4, "qk_eq_v-1": 1 / 8,
        }  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_rotary_caches_hold_what_the_formulas_say(name: str) -> None:
    model = build(name)
    for kind in KINDS:
        cache = generate(model, tokens(), **KINDS[kind]).past_key_values
        room = cache.layers[0]._stored[0].shape[1]
        config = model_config({**model.config.to_dict(), "padded_vocab_size": None})
        wanted = formulas.kv_cache_bytes(config, room, 2, 4, policy=model.config.kv_cache_policy)
        assert cache.nbytes() == sum(layer.nbytes() for layer in cache.layers) == wanted
        at_read = model.config.kv_rotary == "rotate_keys" and model.config.kv_cache_policy == "rotate_at_read"
        assert cache.position_bytes() == (4 * room * 2 if at_read else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rotate_keys", "rotate_keys-half", "rotate_keys-one"])
def test_cache_policies_give_the_same_bits(name: str, kind: str) -> None:
    model, ids, found = build(name), tokens(3), {}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for policy in ("rotate_at_read", "store_both"):
        model.config.kv_cache_policy = policy
        out = generate(model, ids, attention_mask=mask, output_logits=True, pad_token_id=0, **KINDS[kind])
        found[policy] = torch.stack(out.logits)
        cache = out.past_key_values
        assert len(cache.layers[0]._stored) == (1 if policy == "rotate_at_read" else 2)
    torch.testing.assert_close(found["rotate_at_read"], found["store_both"], rtol=1e-6, atol=1e-6)


def step(model: Any, ids: Tensor, mask: Tensor, cache: Any, start: int, stop: int) -> Tensor:
    """Logits of some tokens [b, stop - start], with the positions that generate() gives them."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0).long()[:, start:stop]
    given = {"attention_mask": mask[:, :stop], "position_ids": positions, "past_key_values": cache}
    return model(ids[:, start:stop], **given).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["rope", *ROTATED])
def test_right_padding_and_positions_that_jump(name: str) -> None:
    """A key is rotated by its token's position, wherever it lies in the cache."""
    model, ids = build(name), tokens(2, 12)
    with torch.no_grad():
        alone = model(torch.cat([ids[:1, :5], ids[:1, 8:]], 1), use_cache=False).logits
        for static in (None, 16):
            cache, mask = SharedProjCache(model.config, max_cache_len=static), torch.ones(2, 12)
            mask[0, 5:8] = 0
            parts = []
            for start, stop in ((0, 8), (8, 9), (9, 12)):
                parts.append(step(model, ids, mask, cache, start, stop)[:1])
            found = torch.cat(parts, 1)[:, mask[0] == 1]
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
        cache = SharedProjCache(model.config)
        positions = torch.tensor([[0, 1, 2, 30, 31, 50, 51, 52, 53]])
        apart = model(ids[:, :9], position_ids=positions, attention_mask=torch.ones(2, 9), use_cache=False)
        first = model(ids[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        second = model(ids[:, 4:9], position_ids=positions[:, 4:], past_key_values=cache)
        found = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(found, apart.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROTATED)
def test_rotary_caches_change_as_a_whole(name: str, kind: str) -> None:
    """Positions and a separate head go with their sequences: reorder, repeat, select, crop, reset."""
    model, ids = build(name), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 8:]
        changes: list[tuple[str, Any, list[int]]] = [
            ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
            ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
            ("batch_select_indices", torch.tensor([1]), [1]),
            ("crop", -4, [0, 1]),
        ]
        for change, argument, rows in changes:
            cache = SharedProjCache(model.config, max_cache_len=None if kind == "dynamic" else 16)
            for _ in range(2):  # and again after a reset
                seen = 12 if change == "crop" else 8
                step(model, ids, mask, cache, 0, 5)
                step(model, ids, mask, cache, 5, seen)
                getattr(cache, change)(argument)
                rest = step(model, ids[rows], mask[rows], cache, 8, 12)
                torch.testing.assert_close(rest, expected[rows], rtol=1e-5, atol=1e-5)
                if change not in ("reorder_cache", "crop"):
                    break  # the batch has another size
                cache.reset()


@pytest.mark.parametrize("name", ["qkv", "qk_eq_v", "q_eq_k_eq_v", "qk_eq_v-1", "rope", *ROTATED])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_ways_of_generating(name: str, options: dict[str, Any]) -> None:
    model, ids = build(name), tokens()
    without = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    expected = generate(model, ids, use_cache=False, **without).sequences
    found = generate(model, ids, **options)
    assert torch.equal(found.sequences, expected)
    assert isinstance(found.past_key_values, SharedProjCache)


@pytest.mark.parametrize("name", ["qkv", "qk_eq_v", "qk_eq_v-1", "rope", "rotate_keys", "separate_rope_head"])
def test_assisted_generation_and_prompt_lookup(name: str) -> None:
    model, ids = build(name), tokens(1, 9)
    expected = generate(model, ids).sequences
    # Helpers that are often right, and often wrong: the cache is rolled back.
    close = build(name)
    with torch.no_grad():
        for parameter in close.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for assistant in (close, build("qk_eq_v-2", seed=5)):
        found = generate(model, ids, assistant_model=assistant)
        assert torch.equal(found.sequences, expected)
        assert isinstance(found.past_key_values, SharedProjCache)
    repeated = torch.cat([ids, expected[:, 9:20], ids], 1)
    expected = generate(model, repeated).sequences
    # An end token: transformers 5.8 cannot look prompts up without one.
    found = generate(model, repeated, prompt_lookup_num_tokens=3, eos_token_id=10**6)
    assert torch.equal(found.sequences, expected)
    assert isinstance(found.past_key_values, SharedProjCache)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_left_padding(name: str, kind: str) -> None:
    model, ids = build(name), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    found = generate(model, ids, attention_mask=mask, pad_token_id=0, **KINDS[kind]).sequences
    for row, start in ((0, 4), (1, 0), (2, 1)):
        alone = generate(model, ids[row : row + 1, start:]).sequences
        assert torch.equal(found[row : row + 1, start:], alone)


@pytest.mark.parametrize("name", ["qkv", "qk_eq_v", "rope", *ROTATED])
def test_a_cache_from_the_user(name: str) -> None:
    model, ids = build(name), tokens()
    expected = generate(model, ids).sequences
    theirs = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, past_key_values=theirs).sequences, expected)
    layer = theirs.layers[0]
    assert layer.keys.data_ptr() != layer.values.data_ptr()
    static = StaticCache(config=model.config, max_cache_len=48)
    assert torch.equal(generate(model, ids, past_key_values=static).sequences, expected)
    ours = SharedProjCache(model.config)
    assert torch.equal(generate(model, ids, 10, past_key_values=ours).sequences, expected[:, :19])
    # Continue where it stopped.
    assert torch.equal(generate(model, expected[:, :19], 14, past_key_values=ours).sequences, expected)
    with torch.no_grad():
        assert isinstance(model(ids, use_cache=True).past_key_values, SharedProjCache)


def disturbed(model: Any, adapter: Any) -> Any:
    """The model with an adapter of peft whose parameters are not zero."""
    import peft

    model = peft.get_peft_model(model, adapter)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    return model.eval()


def adapted_tokens(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens by generate, and by whole forwards (peft's prefix tuning fails with use_cache=False)."""
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    expected = ids
    for _ in range(24):
        with torch.no_grad():
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    return found, expected


@pytest.mark.parametrize("kind", ["prefix", "prompt", "lora"])
def test_adapters_of_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    adapters = {
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "kv_proj"], task_type="CAUSAL_LM"),
    }
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = generate(build("qk_eq_v"), ids).sequences
    model = disturbed(build("qk_eq_v"), adapters[kind]).train()
    model(**inputs, labels=ids).loss.backward()
    trained = [x for x in model.parameters() if x.requires_grad]
    assert trained and all(x.grad is not None for x in trained)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": H, "initializer_range": 0.3}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=8 * H, intermediate_size=48, **shape))
    if not torch.equal(*adapted_tokens(disturbed(llama, adapters[kind]), ids)):
        pytest.skip(f"peft {peft.__version__} generates other tokens with transformers' own Llama, too")
    found, expected = adapted_tokens(model.eval(), ids)
    assert torch.equal(found, expected) and not torch.equal(found, plain)


def test_a_static_cache_is_never_shorter_than_before() -> None:
    model, ids = build("qk_eq_v"), tokens()
    lengths = [
        generate(model, ids, new, **KINDS["static"]).past_key_values.get_max_length() for new in (20, 5, 30)
    ] if hasattr(StaticCache, "get_max_length") else [
        generate(model, ids, new, **KINDS["static"]).past_key_values.layers[0].max_cache_len
        for new in (20, 5, 30)
    ]  # fmt: skip
    assert lengths[0] == lengths[1] < lengths[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qk_eq_v", "rotate_keys"])
def test_compiled_generation(name: str) -> None:
    from transformers import CompileConfig

    model, ids = build(name), tokens()
    expected = generate(model, ids).sequences
    options = CompileConfig(fullgraph=True, mode="default")
    options._compile_all_devices = True  # transformers compiles on a CPU only if told
    found = generate(model, ids, cache_implementation="static", compile_config=options)
    assert torch.equal(found.sequences, expected)
