"""The Hugging Face model against a plain implementation, and its ways of computing against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megatron_sharedproj.layers.hf import (
    SharedProjCache,
    SharedProjConfig,
    SharedProjForCausalLM,
    SharedProjModel,
)
from tiny_hf import MODELS, VOCAB, H, build, config, needs_kernel, plain_logits, tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# How attention is computed: our kernels, PyTorch's SDPA, or plainly.
WAYS = [pytest.param("kernel", marks=needs_kernel), "sdpa", "eager"]


def choose(model: Any, way: str) -> Any:
    model.config.use_compiled_kernel = way == "kernel"
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    return model


def loss_and_gradients(model: Any, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    loss = (logits * weights).sum() / logits.shape[1]
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_in_float64(name: str) -> None:
    model, ids = build(name).double(), tokens()
    copies = {key: p.detach().clone().requires_grad_() for key, p in model.named_parameters()}
    expected = plain_logits(copies, model.config, ids)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    wanted = torch.autograd.grad((expected * weights).sum() / expected.shape[1], list(copies.values()))
    # Rotary angles are float32, as in Megatron.
    rope = model.config.position_embedding_type == "rope"
    close = {"rtol": 1e-5, "atol": 1e-5} if rope else {"rtol": 1e-9, "atol": 1e-9}
    for way in ("sdpa", "eager"):
        logits = choose(model, way)(ids).logits
        torch.testing.assert_close(logits, expected, **close)
        _, gradients = loss_and_gradients(model, logits)
        for (key, got), reference in zip(gradients.items(), wanted, strict=True):
            torch.testing.assert_close(got, reference, **close, msg=lambda text, key=key: f"{key}: {text}")
            if "k_proj.bias" not in key:  # a shift of all keys changes no softmax
                assert reference.abs().max() > 1e-3, f"{key}: nothing to compare"


@needs_kernel
@pytest.mark.parametrize("name", MODELS)
def test_the_three_ways_agree(name: str) -> None:
    model, ids = build(name), tokens()
    logits, gradients = {}, {}
    for way in ("kernel", "sdpa", "eager"):
        choose(model, way)
        assert (model.model.plain_causal(torch.empty(2, 9, 1), None, None, None) is not None) == (
            way == "kernel"
        )
        logits[way] = model(ids, use_cache=False).logits
        _, gradients[way] = loss_and_gradients(model, logits[way])
    for way in ("kernel", "sdpa"):
        torch.testing.assert_close(logits[way], logits["eager"], **CLOSE)
        for key, wanted in gradients["eager"].items():
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(gradients[way][key] / scale, wanted / scale, **CLOSE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_without_a_cache(name: str, way: str) -> None:
    model, ids = choose(build(name), way), tokens(length=30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for static in (None, 40):
            for chunks in ([7, *[1] * 23], [3, 20, 7]):
                cache, parts = SharedProjCache(model.config, max_cache_len=static), []
                for chunk in ids.split(chunks, dim=1):
                    parts.append(model(chunk, past_key_values=cache).logits)
                torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@pytest.mark.parametrize("way", WAYS)
def test_left_and_right_padding(way: str) -> None:
    model, ids = choose(build("qk_eq_v-2"), way), tokens(length=8)
    with torch.no_grad():
        alone = model(ids[:1, 3:]).logits
        full = model(ids[1:]).logits
        for positions in (slice(3, None), slice(0, 5)):
            mask = torch.zeros(2, 8, dtype=torch.long)
            mask[0, positions], mask[1] = 1, 1
            padded = ids.clone()
            padded[0, positions] = ids[0, 3:]
            logits = model(padded, attention_mask=mask).logits
            torch.testing.assert_close(logits[:1, positions], alone, **CLOSE)
            torch.testing.assert_close(logits[1:], full, **CLOSE)


@needs_kernel
def test_when_the_kernels_are_used() -> None:
    model = build("qk_eq_v")
    x, mask = torch.empty(2, 5, 1), torch.ones(2, 5)
    padded = mask.clone()
    padded[0, 0] = 0
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    used = model.model.plain_causal
    assert used(x, None, None, None) == used(x, mask, None, None) == (None, None)
    assert used(x, None, torch.arange(5)[None], None) is not None
    assert used(x, None, packed, None) is None
    assert used(x, padded, None, None) is None
    assert used(x, mask[:, None, None], None, None) is None
    assert used(x.half(), None, None, None) is None  # the CPU kernels have no float16
    static = SharedProjCache(model.config, max_cache_len=8)
    assert used(x, None, None, static).visible == 5
    with torch.no_grad():
        assert used(x[:, :1], None, None, static).lengths.tolist() == [1, 1]
    model.config.attention_dropout = 0.1
    assert used(x, None, None, None) is not None
    assert model.train().model.plain_causal(x, None, None, None) is None
    model.eval().config.use_compiled_kernel = False
    assert used(x, None, None, None) is None


def test_packed_rows_do_not_see_each_other() -> None:
    model, ids = build("qk_eq_v"), tokens(1, 9)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(part).logits for part in ids.split([4, 5], 1)], 1)
    torch.testing.assert_close(packed, apart, **CLOSE)


@pytest.mark.parametrize("name", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"])
def test_an_attention_backend_receives_one_tensor(name: str) -> None:
    """What engines register gets key and value as one object, from a cache and without."""
    seen: list[bool] = []

    def backend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append(value is key)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("sharedproj_test_backend", backend)
    model, ids = build(name), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("sharedproj_test_backend")
        for use_cache in (True, False):
            torch.testing.assert_close(model(ids, use_cache=use_cache).logits, expected, **CLOSE)
    assert seen == [model.config.tied_kv] * 4


@pytest.mark.parametrize("name", MODELS)
def test_tensor_names(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    model = build(name)
    c: SharedProjConfig = model.config
    d, e, f = c.hidden_size, c.head_dim, c.intermediate_size
    norms = [""] if c.normalization == "RMSNorm" else ["", "bias"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, d)}
    if c.position_embedding_type == "learned_absolute":
        shapes["model.embed_positions.weight"] = (c.max_position_embeddings, d)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (VOCAB, d)

    def norm(where: str, size: int) -> None:
        shapes.update({f"{where}.{kind or 'weight'}": (size,) for kind in norms})

    def linear(where: str, rows: int, columns: int) -> None:
        shapes[f"{where}.weight"] = (rows, columns)
        if c.use_bias:
            shapes[f"{where}.bias"] = (rows,)

    norm("model.norm", d)
    projected = {"qkv": "q k v", "q_eq_k": "k v", "qk_eq_v": "q kv", "q_eq_k_eq_v": "kv"}
    for n in range(2):
        layer = f"model.layers.{n}"
        norm(f"{layer}.input_layernorm", d)
        norm(f"{layer}.post_attention_layernorm", d)
        for tensor in projected[c.attention_variant].split():
            heads = H if tensor == "q" else c.num_key_value_heads
            linear(f"{layer}.self_attn.{tensor}_proj", heads * e, d)
        linear(f"{layer}.self_attn.o_proj", d, H * e)
        if c.kv_rotary == "separate_rope_head":
            rotated = int(e * c.rope_parameters["partial_rotary_factor"])
            linear(f"{layer}.self_attn.k_rope_proj", rotated, d)
        if c.qk_layernorm:
            norm(f"{layer}.self_attn.k_norm", e)
            if not c.attention_variant.startswith("q_eq_k"):
                norm(f"{layer}.self_attn.q_norm", e)
        for part in ("gate", "up") if c.gated_mlp else ("up",):
            linear(f"{layer}.mlp.{part}_proj", f, d)
        linear(f"{layer}.mlp.down_proj", d, f)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert written == shapes
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is SharedProjForCausalLM
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == c.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, rtol=0, atol=0)
        base = SharedProjModel.from_pretrained(tmp_path)
        got = base(tokens()).last_hidden_state
        torch.testing.assert_close(got, model.model(tokens()).last_hidden_state, rtol=0, atol=0)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = SharedProjForCausalLM(config("qkv", hidden_size=64, initializer_range=0.02))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            assert bool((parameter == (1 if key.endswith("weight") else 0)).all())
        elif key.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), key


@pytest.mark.parametrize("way", WAYS)
def test_it_trains(way: str) -> None:
    model, ids = (
        choose(build("qk_eq_v-2", initializer_range=0.05, hidden_dropout=0.1), way).train(),
        tokens(8, 12),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_loss_positions_kept_and_recorded_outputs() -> None:
    model, ids = build("qk_eq_v"), tokens()
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True)
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:], **CLOSE)
        chosen = torch.tensor([1, 4])
        torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, out.logits[:, chosen], **CLOSE)
        assert len(out.hidden_states) == 3
        weights = choose(model, "eager")(ids, output_attentions=True).attentions
        assert len(weights) == 2
        assert weights[0].shape == (2, H, 9, 9)
        torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, H, 9))
        plain = model(ids, return_dict=False)
        assert isinstance(plain, tuple)
        torch.testing.assert_close(plain[0], out.logits, **CLOSE)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits, **CLOSE)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing(way: str) -> None:
    model, ids = choose(build("qk_eq_v"), way).train(), tokens()
    _, wanted = loss_and_gradients(model, model(ids).logits)
    model.gradient_checkpointing_enable()
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = model(ids).logits
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    ((logits * weights).sum() / logits.shape[1]).backward()
    for key, parameter in zip(names, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-4, atol=1e-4)


def test_a_learned_prefix_gets_gradients_through_the_cache() -> None:
    """Prefix tuning: tokens of the cache that are parameters."""
    model, ids = build("qk_eq_v"), tokens(1, 6)
    model.requires_grad_(False)
    prefix = torch.randn(2, 1, H, 3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cache = SharedProjCache(model.config)
    for index in range(2):
        x = prefix[index]
        cache.update(x, x, index)
    model(ids, past_key_values=cache, labels=ids).loss.backward()
    assert prefix.grad.abs().amax(dim=(1, 2, 4)).min() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    for name in ("qk_eq_v", "rope", "swiglu_rmsnorm", "rotate_keys", "rotate_values", "separate_rope_head"):
        model, ids = build(name, initializer_range=0.1), tokens()
        with torch.no_grad():
            expected = model(ids).logits
            with torch.autocast("cpu", dtype):
                torch.testing.assert_close(model(ids).logits.float(), expected, rtol=0.1, atol=0.1)
            half = model.to(dtype)
            logits = half(ids).logits
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
            cache = SharedProjCache(half.config)
            steps = [half(part, past_key_values=cache).logits for part in ids.split([5, 1, 3], 1)]
            torch.testing.assert_close(torch.cat(steps, 1).float(), expected, rtol=0.1, atol=0.1)
            assert cache.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("name", ["qk_eq_v", "rotate_keys"])
def test_a_cache_has_two_names(name: str) -> None:
    """past_key_values, and cache since transformers 5.24; a checkpointed layer has none."""
    model, ids = build(name), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for key in ("past_key_values", "cache"):
            cache = SharedProjCache(model.config)
            parts = [model(part, **{key: cache}) for part in ids.split([5, 4], 1)]
            torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), expected, **CLOSE)
            assert parts[-1][key] is cache if key in parts[-1] else cache.get_seq_length() == 9
    model.train().gradient_checkpointing_enable()
    cache = SharedProjCache(model.config)
    model(ids, past_key_values=cache, labels=ids).loss.backward()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model.eval()(ids, past_key_values=cache)
        logits = model(ids[:, :2], past_key_values=cache).logits
        joined = torch.cat([ids, ids[:, :2]], 1)
        torch.testing.assert_close(logits, model(joined, use_cache=False).logits[:, 9:], **CLOSE)


def test_positions_beyond_the_limit_are_refused_by_name() -> None:
    model = build("qk_eq_v", max_position_embeddings=8)
    with torch.no_grad():
        model(tokens(1, 8))
        with pytest.raises(ValueError, match="position 8: max_position_embeddings=8"):
            model(tokens(1, 9))
        with pytest.raises(ValueError, match="max_position_embeddings=8"):
            model.generate(tokens(1, 5), max_new_tokens=10, do_sample=False)
        build("no_positions", max_position_embeddings=8)(tokens(1, 9))


def test_resizing_the_vocabulary() -> None:
    model, ids = build("qk_eq_v"), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.resize_token_embeddings(VOCAB + 5)
        assert model.config.vocab_size == VOCAB + 5
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(ids).logits[..., :VOCAB], expected, **CLOSE)


def test_a_field_set_later_is_checked_too() -> None:
    changed = config("q_eq_k")
    changed.num_key_value_heads = 2
    with pytest.raises(ValueError, match="num_key_value_heads=2"):
        SharedProjForCausalLM(changed)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:2])
def test_compiled_static_step(way: str) -> None:
    model, ids = choose(build("qk_eq_v"), way), tokens(length=12)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = SharedProjCache(model.config, max_cache_len=16)
        parts = [model(ids[:, :6], past_key_values=cache).logits]
        for i in range(6, 12):
            parts.append(step(ids[:, i : i + 1].contiguous(), past_key_values=cache).logits.clone())
        torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:2])
def test_compiled_training_step(way: str) -> None:
    model, ids = choose(build("qk_eq_v-2"), way).train(), tokens()
    wanted = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    got = torch.autograd.grad(compiled(ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_flex_attention() -> None:
    model, ids = build("qk_eq_v-2"), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_export_for_any_length() -> None:
    model = build("qk_eq_v-2", use_cache=False)
    length = torch.export.Dim("length", min=2, max=200)
    with torch.no_grad():
        exported = torch.export.export(model, (tokens(2, 9),), dynamic_shapes={"input_ids": {1: length}})
        assert "megatron_sharedproj" not in str(exported.graph)
        for n in (9, 30):
            got = exported.module()(tokens(2, n)).logits
            torch.testing.assert_close(got, model(tokens(2, n)).logits, **CLOSE)
