"""patch_model on tiny random models of transformers: the same outputs as qkv, half the cache as K=V.

Shape legend: b batch, s tokens, d hidden size, h heads, g groups, e head size, V vocabulary.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.8")

import transformers as hf  # noqa: E402

from megatron_sharedproj.ops import extension  # noqa: E402
from megatron_sharedproj.ops.attention import attention  # noqa: E402
from megatron_sharedproj.torch_layers import cache_nbytes, patch_model, patching  # noqa: E402
from megatron_sharedproj.torch_layers.merging import merge_key_value  # noqa: E402
from megatron_sharedproj.torch_layers.patching import PatchedAttention  # noqa: E402

V, D, H, G, E, LAYERS = 67, 32, 4, 2, 8, 2
ROPE_SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
KINDS = ["gpt2", "llama", "llama_bias_mha", "llama_yarn", "mistral", "qwen2", "qwen3"]
# What each scheme stores of K=V per token and layer, in elements, with g groups.
SCHEMES: dict[str, tuple[dict[str, Any], int]] = {
    "rotate_values": ({}, G * E),
    "partial": ({"rotary_percent": 0.5}, G * E),
    "rotate_keys": ({}, G * E + 1),  # and the position of each token
    "rotate_keys both": ({"cache_policy": "store_both"}, 2 * G * E),
    "separate_rope_head": ({"rotary_percent": 0.5}, G * E + E // 2),
}


def make(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random model, in evaluation mode."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        shape = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 64}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**{**shape, **ids, **options}))
    elif kind == "mistral":
        config: Any = hf.MistralConfig(**{**ROPE_SHAPE, "sliding_window": None, "head_dim": E, **options})
        model = hf.MistralForCausalLM(config)
    elif kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**ROPE_SHAPE, **options}))
    elif kind == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**ROPE_SHAPE, "head_dim": 2 * E, **options}))
    else:
        extra: dict[str, Any] = {"llama_yarn": {"rope_parameters": YARN}}.get(kind, {})
        if kind == "llama_bias_mha":
            extra = {"attention_bias": True, "num_key_value_heads": H}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**ROPE_SHAPE, **extra, **options}))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.2)
    return model.eval()


def ids(b: int = 2, s: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (b, s), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, Tensor]:
    """Two prompts, the second shorter: padded on the left."""
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def generate(model: Any, new: int = 8, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Greedy ids, the logits of each step, and the cache."""
    out = model.generate(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    return out.sequences, torch.stack(out.logits, 1), cache


def attentions(model: Any) -> list[PatchedAttention]:
    return [module for module in model.modules() if isinstance(module, PatchedAttention)]


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_qkv_nothing_changes(kind: str, implementation: str) -> None:
    model = make(kind, attn_implementation=implementation)
    original = copy.deepcopy(model)
    assert patch_model(model, "qkv") is model
    assert len(attentions(model)) == LAYERS

    close(model(ids()).logits, original(ids()).logits)
    found, wanted = model(ids(), labels=ids()), original(ids(), labels=ids())
    close(found.loss, wanted.loss)
    embedding, reference = model.get_input_embeddings(), original.get_input_embeddings()
    found.loss.backward(), wanted.loss.backward()
    close(embedding.weight.grad, reference.weight.grad)

    for options in ({"input_ids": ids()}, padded(), {"input_ids": ids(1), "num_beams": 3}):
        tokens, logits, _ = generate(model, **options)
        expected, expected_logits, _ = generate(original, **options)
        assert torch.equal(tokens, expected)
        close(logits, expected_logits)
    if implementation == "eager":
        weights = model(ids(), output_attentions=True).attentions
        assert len(weights) == LAYERS
        for got, want in zip(weights, original(ids(), output_attentions=True).attentions, strict=True):
            close(got, want)


def rotary_cases() -> list[tuple[str, str, str]]:
    ropes = [(kind, "qk_eq_v", scheme) for kind in ("llama", "qwen3") for scheme in SCHEMES]
    yarn = [("llama_yarn", "qk_eq_v", s) for s in ("rotate_values", "partial", "rotate_keys")]
    one = [("llama_bias_mha", "q_eq_k_eq_v", s) for s in ("rotate_values", "partial", "rotate_keys")]
    untied = [("llama_bias_mha", "q_eq_k", ""), ("gpt2", "q_eq_k", "")]
    return [*ropes, *yarn, *one, *untied, ("gpt2", "qk_eq_v", ""), ("gpt2", "q_eq_k_eq_v", "")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind, variant, scheme", rotary_cases())
def test_generating_with_a_cache_equals_without(
    kind: str, variant: str, scheme: str, implementation: str
) -> None:
    model = make(kind, attn_implementation=implementation)
    options = SCHEMES[scheme][0] if scheme else {}
    patch_model(model, variant, kv_rotary=scheme.split(" ")[0], **options)
    for inputs in ({"input_ids": ids()}, padded()):
        tokens, logits, cache = generate(model, **inputs)
        mask = inputs.get("attention_mask", torch.ones_like(ids()))
        for step in range(logits.shape[1]):
            seen = tokens[:, : ids().shape[1] + step]
            whole = torch.nn.functional.pad(mask, (0, step), value=1)
            positions = (whole.cumsum(-1) - 1).clamp(min=0)
            plain = model(seen, attention_mask=whole, position_ids=positions, use_cache=False)
            close(logits[:, step], plain.logits[:, -1], 1e-4)
        if scheme and kind == "llama":
            shape = cache.layers[0].keys.shape
            assert cache_nbytes(cache) == LAYERS * shape[0] * 256 * SCHEMES[scheme][1] * 4
    # A prompt in two chunks, and beams, which reorder the cache.
    first = model(ids()[:, :5], use_cache=True)
    past = first["cache"] if "cache" in first else first["past_key_values"]
    name = "cache" if "cache" in first else "past_key_values"
    close(model(ids()[:, 5:], **{name: past}).logits, model(ids()).logits[:, 5:], 1e-4)
    beams = {"input_ids": ids(1), "num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**beams), model.generate(**beams, use_cache=False))


def reference_layer(
    attention: PatchedAttention, x: Tensor, scheme: str, r: int, inverse: Tensor, gain: float
) -> Tensor:
    """A K=V layer of Llama from its formulas: of the pairs (i, i + e / 2) the first r / 2 turn."""
    weights = {name: p.detach().double() for name, p in attention.named_parameters()}

    def project(name: str) -> Tensor:
        return x @ weights[f"{name}_proj.weight"].T

    s = x.shape[1]
    size, groups = attention.head_size, attention.num_groups
    frequency = inverse.double().masked_fill(torch.arange(size // 2) >= r // 2, 0.0)

    def turn(y: Tensor, distance: Tensor) -> Tensor:
        angles = distance[..., None] * frequency
        pair = torch.complex(*y.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pair.real, pair.imag], -1)

    q, x_ = project("q").unflatten(-1, (-1, size)), project("kv").unflatten(-1, (-1, size))
    at = torch.arange(s, dtype=torch.float64)
    elements = [*range(r // 2), *range(size // 2, size // 2 + r // 2)]
    out = []
    for head in range(attention.num_heads):
        kv = x_[:, :, head * groups // attention.num_heads]
        key = kv.clone()
        if scheme == "separate_rope_head":
            key[..., elements] = project("k_rope")
        scores = (turn(q[:, :, head], at)[:, :, None] * turn(key, at)[:, None]).sum(-1)
        scores = scores * gain**2 * size**-0.5
        values = kv[:, None].expand(-1, s, -1, -1)
        if scheme in ("rotate_values", "partial"):
            values = turn(values, at[None] - at[:, None])
        attended = torch.softmax(scores.masked_fill(at[None] > at[:, None], float("-inf")), -1)
        out.append((attended[..., None] * values).sum(2))
    return torch.cat(out, -1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (scheme, kind)
        for kind in ("llama", "llama_yarn")
        for scheme in SCHEMES
        # That one is refused (test_bad_options_change_nothing).
        if " " not in scheme and (scheme, kind) != ("separate_rope_head", "llama_yarn")
    ],
)
def test_schemes_equal_their_formulas(scheme: str, kind: str) -> None:
    model = make(kind)
    patch_model(model, "qk_eq_v", kv_rotary=scheme, **SCHEMES[scheme][0])
    layer, rotary = attentions(model)[0].double(), model.model.rotary_emb
    assert (rotary.attention_scaling != 1.0) == (kind == "llama_yarn")
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    embeddings = rotary(x, position_ids=torch.arange(9)[None])
    r = E if scheme in ("rotate_keys", "rotate_values") else E // 2
    expected = reference_layer(layer, x, scheme, r, rotary.inv_freq, rotary.attention_scaling)
    close(layer(x, position_embeddings=embeddings)[0], expected, 1e-5)


def test_the_kernels_read_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension.MISSING:
        pytest.skip(extension.MISSING)
    model = patch_model(make("llama"), kv_rotary="rotate_values")
    seen = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query.shape[0], key.shape[0], value is key))
        return attention(query, key, value, **options)

    monkeypatch.setattr(patching, "attention", watched)
    generate(model, new=3, input_ids=ids())
    assert seen == [(s, t, True) for s, t in ((9, 9), (1, 10), (1, 11)) for _ in range(LAYERS)]
    seen.clear()
    generate(model, new=3, **padded())
    assert not seen


def test_other_classes() -> None:
    """A base model, a classifier, and a model inside of another."""
    causal = make("llama")
    base = copy.deepcopy(causal.model)
    patch_model(base, kv_rotary="rotate_values")
    patch_model(causal, kv_rotary="rotate_values")
    assert torch.equal(base(ids()).last_hidden_state, causal.model(ids()).last_hidden_state)
    config = make("gpt2").config
    config.num_labels = 3
    classifier = patch_model(hf.GPT2ForSequenceClassification(config).eval())
    assert classifier(ids()).logits.shape == (2, 3)
    wrapped = torch.nn.ModuleDict({"inner": make("gpt2")})
    patch_model(wrapped)
    assert len(attentions(wrapped)) == LAYERS


def test_merged_weights() -> None:
    for merge in ("mean", "keep_key", "keep_value"):
        model = make("llama_bias_mha")
        before = copy.deepcopy(model.model.layers[1].self_attn)
        patch_model(model, "qk_eq_v", kv_rotary="rotate_values", merge=merge)
        after = model.model.layers[1].self_attn
        for part in ("weight", "bias"):
            key, value = getattr(before.k_proj, part), getattr(before.v_proj, part)
            assert torch.equal(getattr(after.kv_proj, part), merge_key_value(key, value, merge))
            assert torch.equal(getattr(after.q_proj, part), getattr(before.q_proj, part))
        assert not hasattr(after, "v_proj") and not hasattr(after, "k_proj")

    model = make("gpt2")
    before = copy.deepcopy(model.transformer.h[0].attn)
    q, k, v = before.c_attn.weight.t().chunk(3)
    patch_model(model, "Q=K=V")
    close(model.transformer.h[0].attn.kv_proj.weight, (q + k + v) / 3)
    assert torch.equal(model.transformer.h[0].attn.o_proj.weight, before.c_proj.weight.t())
    model = make("gpt2")
    patch_model(model, "q_eq_k", merge="keep_key")
    assert torch.equal(model.transformer.h[0].attn.k_proj.weight, k)
    assert torch.equal(model.transformer.h[0].attn.v_proj.weight, v)


def test_fewer_groups_and_the_separate_head() -> None:
    model = make("llama")
    k = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    v = model.model.layers[0].self_attn.v_proj.weight.detach().clone()
    patch_model(model, kv_rotary="separate_rope_head", rotary_percent=0.5, num_groups=1)
    layer = model.model.layers[0].self_attn
    close(layer.kv_proj.weight, ((k + v) / 2).unflatten(0, (G, E)).mean(0))
    close(layer.k_rope_proj.weight, k.unflatten(0, (G, E)).mean(0)[[0, 1, 4, 5]])
    assert model.config.num_key_value_heads == 1
    assert torch.isfinite(model(ids()).logits).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_cache_is_half(kind: str) -> None:
    model = make(kind)
    qkv = patch_model(copy.deepcopy(model), "qkv")
    tied = patch_model(model, "qk_eq_v", kv_rotary="" if kind == "gpt2" else "rotate_values")
    full, half = (generate(m, input_ids=ids())[2] for m in (qkv, tied))
    assert cache_nbytes(half) * 2 == cache_nbytes(full) > 0
    # A cache of the caller's own: dynamic, or static.
    name = "cache" if "cache" in tied(ids(), use_cache=True) else "past_key_values"
    own = hf.DynamicCache()
    with torch.no_grad():
        tied(ids(), use_cache=True, **{name: own})
    assert cache_nbytes(own) == cache_nbytes(half)
    static = hf.StaticCache(config=tied.config, max_cache_len=32)
    tokens, _, _ = generate(tied, input_ids=ids(), **{name: static})
    assert torch.equal(tokens, generate(tied, input_ids=ids())[0])
    groups = H if kind == "gpt2" else G
    assert cache_nbytes(static) == LAYERS * 2 * 32 * groups * E * 4


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_static_caches(scheme: str) -> None:
    model: Any = patch_model(make("llama"), kv_rotary=scheme.split(" ")[0], **SCHEMES[scheme][0])
    tokens, logits, _ = generate(model, **padded())
    name = "cache" if "cache" in model(ids(), use_cache=True) else "past_key_values"
    static = hf.StaticCache(config=model.config, max_cache_len=24)
    found, found_logits, cache = generate(model, **padded(), **{name: static})
    assert cache is static and torch.equal(found, tokens)
    close(found_logits, logits, 1e-4)
    assert cache_nbytes(static) == LAYERS * 2 * 24 * SCHEMES[scheme][1] * 4


@pytest.mark.parametrize("kind, scheme", [("gpt2", ""), *(("llama", s) for s in SCHEMES if " " not in s)])
def test_training(kind: str, scheme: str) -> None:
    """Gradients reach every weight, are the same with gradient checkpointing, and lower the loss."""
    model = patch_model(make(kind), kv_rotary=scheme, **(SCHEMES[scheme][0] if scheme else {}))
    assert isinstance(model, hf.PreTrainedModel)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, PatchedAttention):
            module.dropout = 0.0
    model.train()
    losses, grads = [], {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        grads[checkpointing] = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, grad in grads[False].items():
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0, name
        close(grads[True][name], grad, 1e-5)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_frozen_weights_stay_frozen_and_mode_and_dtype_stay() -> None:
    model = make("llama").to(torch.bfloat16)
    model.requires_grad_(False)
    model.train()
    patch_model(model, kv_rotary="rotate_values")
    for layer in attentions(model):
        assert layer.training
        for parameter in layer.parameters():
            assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
    assert torch.isfinite(model(ids()).logits).all()


@pytest.mark.parametrize("kind, scheme", [("gpt2", ""), ("qwen3", "rotate_values"), ("qwen3", "rotate_keys")])
def test_autocast_and_copies(kind: str, scheme: str) -> None:
    model = copy.deepcopy(patch_model(make(kind), kv_rotary=scheme))
    wanted, found = model(ids()).logits, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids()).logits
        tokens, _, _ = generate(model, **padded())
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.15 * wanted.std().item())
    assert tokens.shape == (2, 17)


def test_whole_models_are_saved_and_compiled(tmp_path: Path) -> None:
    for kind, scheme in (("gpt2", ""), ("llama", "rotate_keys")):
        model = patch_model(make(kind, attn_implementation="eager"), kv_rotary=scheme)
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
        found, wanted = (x(ids(), output_attentions=True) for x in (twin, model))
        assert torch.equal(found.logits, wanted.logits)
        assert len(found.attentions) == LAYERS
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(ids(), use_cache=False).logits, wanted.logits)


def test_packed_rows() -> None:
    """Positions that start again separate the texts of a row, as transformers has it."""
    model = patch_model(make("llama"), kv_rotary="rotate_keys")
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None].expand(2, -1)
    packed = model(ids(), position_ids=positions, use_cache=False).logits
    close(packed[:, :4], model(ids()[:, :4]).logits)
    close(packed[:, 4:], model(ids()[:, 4:]).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model

    scheme = "" if kind == "gpt2" else "partial"
    percent = {} if kind == "gpt2" else {"rotary_percent": 0.5, "num_groups": 1}
    model: Any = patch_model(make(kind), kv_rotary=scheme, **percent)
    model.save_pretrained(tmp_path)

    config = hf.AutoConfig.from_pretrained(tmp_path)
    fresh: Any = type(model)(config).eval()
    patch_model(fresh, **config.sharedproj_patch)
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(ids()).logits, model(ids()).logits)
    fresh = patch_model(type(model)(config).eval(), **config.sharedproj_patch)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids()).logits, model(ids()).logits)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "rope=True: with variant qk_eq_v key and value are one tensor.*rotate_values"),
    ("llama", {"kv_rotary": "spin"}, "kv_rotary spin: unknown"),
    ("llama", {"kv_rotary": "partial"}, "rotary_percent 1.0: kv_rotary partial"),
    ("llama", {"kv_rotary": "rotate_values", "rotary_percent": 0.5}, "rotates whole heads"),
    ("llama", {"variant": "qkv", "kv_rotary": "rotate_values"}, "has a value of its own"),
    ("llama", {"variant": "q_eq_k"}, "num_groups 2: variant q_eq_k ties query and key"),
    ("llama", {"kv_rotary": "rotate_values", "num_groups": 4}, "num_groups 4: must divide the model's 2"),
    ("llama", {"kv_rotary": "rotate_values", "merge": "sum"}, "merge sum: unknown"),
    ("llama", {"kv_rotary": "rotate_keys", "cache_policy": "all"}, "cache_policy all: choose"),
    ("llama_yarn", {"kv_rotary": "separate_rope_head", "rotary_percent": 0.5}, "scales its rotary"),
    ("gpt2", {"variant": "kq"}, "variant kq: unknown"),
    ("gpt2", {"variant": "(Q=K)+"}, "are not causal"),
    ("gpt2", {"variant": "q_eq_k", "merge": "keep_value"}, "merge keep_value: variant q_eq_k"),
    ("gpt2", {"kv_rotary": "rotate_values"}, "needs rotary positions"),
    ("gpt2", {"rotary_percent": 0.5}, "rotary_percent 0.5: GPT2LMHeadModel has no rotary"),
    ("gpt2", {"num_groups": 3}, "num_groups 3: must divide num_heads 4"),
]


@pytest.mark.parametrize("kind, options, message", BAD)
def test_bad_options_change_nothing(kind: str, options: dict[str, Any], message: str) -> None:
    model = make(kind)
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message) as caught:
        patch_model(model, **options)
    assert "--" not in str(caught.value)
    assert model.state_dict().keys() == before and not hasattr(model.config, "sharedproj_patch")


def test_unsupported_models() -> None:
    with pytest.raises(ValueError, match="sliding_window=16 is not supported"):
        patch_model(make("mistral", sliding_window=16), "qkv")
    windowed = make("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    with pytest.raises(ValueError, match="layers.1.self_attn: sliding_window=16"):
        patch_model(windowed, "qkv")
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        patch_model(make("gpt2", reorder_and_upcast_attn=True), "qkv")
    with pytest.raises(ValueError, match="add_cross_attention"):
        patch_model(make("gpt2", add_cross_attention=True), "qkv")
    with pytest.raises(ValueError, match="model Linear: has none of"):
        patch_model(torch.nn.Linear(2, 2), "qkv")
    with pytest.raises(ValueError, match="is patched already"):
        patch_model(patch_model(make("gpt2"), "qkv"), "qkv")

    class Quantized(torch.nn.Linear):
        pass

    model = make("llama")
    model.model.layers[1].self_attn.k_proj.__class__ = Quantized
    with pytest.raises(ValueError, match="layers.1.self_attn.k_proj: is a Quantized"):
        patch_model(model, "qkv")
    model = make("llama")
    model.model.layers[0].self_attn.v_proj.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn, not a plain Linear"):
        patch_model(model, "qkv")
    assert not attentions(model)


def test_unsupported_caches() -> None:
    model = make("llama")
    name = "cache" if "cache" in model(ids(), use_cache=True) else "past_key_values"
    filled = model(ids(), use_cache=True)[name]
    patch_model(model, kv_rotary="rotate_keys")
    with pytest.raises(ValueError, match="holds tokens of a model that was not patched"):
        model(ids(), **{name: filled})
    sliding = hf.DynamicCache(config=model.config)
    sliding.layers[0] = hf.cache_utils.DynamicSlidingWindowLayer(sliding_window=8)
    with pytest.raises(ValueError, match="is a DynamicSlidingWindowLayer, which stores key and value apart"):
        model(ids(), use_cache=True, **{name: sliding})
