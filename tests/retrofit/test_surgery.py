"""Surgery on whole models: exact where a K=V model can say the same, pooled heads, rotary order, refusals.

Shape legend: b batch, s sequence, V vocabulary, h heads, g groups, e head size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.config import ModelConfig
from megatron_sharedproj.conversion.megatron_checkpoint import model_state
from megatron_sharedproj.conversion.weights import to_hugging_face, to_megatron
from megatron_sharedproj.retrofit.conversion import new_layers
from megatron_sharedproj.retrofit.surgery import MERGES, Plan, attention_names, make_plan, operate

pytestmark = pytest.mark.usefixtures("parallel_state")

V, S, E, HEADS = 64, 24, 8, 4
SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": HEADS,
    "kv_channels": E,
    "ffn_hidden_size": 64,
    "padded_vocab_size": V,
    "max_position_embeddings": 32,
}
LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
ROPE = {"position_embedding_type": "rope"}
SOURCES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt grouped": {"num_query_groups": 2},
    "no bias": {"add_bias_linear": False},
    "llama": LLAMA,
    "llama grouped": {**LLAMA, "num_query_groups": 2},
    "rope": ROPE,
}


def build(config: ModelConfig, seed: int = 1) -> Any:
    """A model with random biases and norms as well, logits gathered."""
    from megatron_sharedproj.model import build_model

    model = build_model(config, parallel_output=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else noise * (parameter.shape[-1] ** -0.5))
    return model


def tokens(rows: int = 16, seed: int = 2) -> Tensor:
    return torch.randint(V, (rows, S), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = tokens(4, seed=5)
    return model(ids, torch.arange(S).expand_as(ids), None)


def tensors_of(config: ModelConfig, model: Any) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in model_state(model).items()}
    return to_hugging_face(config, state, V)


def loaded(config: ModelConfig, tensors: dict[str, Tensor]) -> Any:
    model = build(config)
    model.load_state_dict(to_megatron(config, tensors), strict=False)
    return model


def operated(plan: Plan, source: Any, **options: Any) -> Any:
    """The model that surgery makes of a source, whose weights calibration changes."""
    tensors = tensors_of(plan.source, source)
    rows = tokens() if plan.calibrated else None
    layers, _ = new_layers(plan, tensors, source, rows, **options)
    return loaded(plan.target, operate(plan, tensors, layers))


def rotary(config: dict[str, Any], scheme: str = "rotate_keys") -> str:
    return scheme if config.get("position_embedding_type") == "rope" else ""


def shared_space(config: ModelConfig, model: Any) -> None:
    """Make each value of a source a map of its key, with a constant of its own where there are biases."""
    tensors = tensors_of(config, model)
    generator = torch.Generator().manual_seed(3)
    for layer in range(config.num_layers):
        prefix = attention_names(layer)
        key = tensors[f"{prefix}k_proj.weight"].unflatten(0, (-1, E))
        turn = torch.eye(E) + 0.3 * torch.randn(key.shape[0], E, E, generator=generator)
        tensors[f"{prefix}v_proj.weight"] = (turn @ key).flatten(0, 1)
    model.load_state_dict(to_megatron(config, tensors), strict=False)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_least_squares_is_exact_where_it_can_be(name: str, sequential: bool) -> None:
    config = ModelConfig(**{**SHAPE, **SOURCES[name]})
    source = build(config)
    shared_space(config, source)
    if name == "rope":
        # A bias of the key is rotated: the value is a map of it only if its own bias is, too.
        state = source.state_dict()
        for key in state:
            if key.endswith("linear_qkv.bias"):
                state[key].zero_()
    expected = logits(source)
    plan = make_plan(config, "least_squares", kv_rotary=rotary(SOURCES[name]))
    result = operated(plan, source, sequential=sequential)
    torch.testing.assert_close(logits(result), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_calibrated_is_what_is_written(name: str) -> None:
    """The source's model, whose attentions were replaced on the way, and the K=V model are one function."""
    config = ModelConfig(**{**SHAPE, **SOURCES[name]})
    for groups in {config.num_query_groups, config.num_query_groups // 2}:
        source = build(config)
        plan = make_plan(config, "least_squares", kv_rotary=rotary(SOURCES[name]), num_query_groups=groups)
        result = operated(plan, source)
        expected = logits(source)
        torch.testing.assert_close(logits(result), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("merge", MERGES[:3])
@pytest.mark.parametrize("name", ["gpt", "llama grouped"])
def test_tied_keys_and_values_stay(name: str, merge: str) -> None:
    """A qkv model whose W_k is its W_v, biases included, is that K=V model, whichever one is kept."""
    config = ModelConfig(**{**SHAPE, **SOURCES[name]})
    source = build(config)
    tensors = tensors_of(config, source)
    for key in list(tensors):
        if ".v_proj." in key:
            tensors[key] = tensors[key.replace(".v_proj.", ".k_proj.")].clone()
    source.load_state_dict(to_megatron(config, tensors), strict=False)
    expected = logits(source)
    result = operated(make_plan(config, merge, kv_rotary=rotary(SOURCES[name])), source)
    torch.testing.assert_close(logits(result), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("groups", [1, 2])
def test_pooled_heads_are_means(groups: int) -> None:
    config = ModelConfig(**SHAPE)
    source = build(config)
    tensors = tensors_of(config, source)
    result = operated(make_plan(config, "mean", num_query_groups=groups), source)
    found = tensors_of(
        result_config := config.replace(attention_variant="qk_eq_v", num_query_groups=groups), result
    )
    assert result_config.num_query_groups == groups
    for kind in ("weight", "bias"):
        prefix = attention_names(1)
        k, v = (tensors[f"{prefix}{name}_proj.{kind}"] for name in "kv")
        for group in range(groups):
            of = range(group * HEADS // groups, (group + 1) * HEADS // groups)
            mean = sum(x[head * E : (head + 1) * E] for head in of for x in (k, v)) / (2 * len(of))
            got = found[f"{prefix}kv_proj.{kind}"][group * E : (group + 1) * E]
            torch.testing.assert_close(got, mean)
        for name in ("q", "o"):
            assert torch.equal(found[f"{prefix}{name}_proj.{kind}"], tensors[f"{prefix}{name}_proj.{kind}"])


def test_equal_heads_are_pooled_exactly() -> None:
    """Heads that are maps of one tensor become one head: each query and output has a map of its own."""
    config = ModelConfig(**SHAPE)
    source = build(config)
    tensors = tensors_of(config, source)
    generator = torch.Generator().manual_seed(4)
    for layer in range(2):
        first = tensors[f"{attention_names(layer)}k_proj.weight"][:E].clone()
        for name in "kv":
            turns = torch.eye(E) + 0.3 * torch.randn(HEADS, E, E, generator=generator)
            tensors[f"{attention_names(layer)}{name}_proj.weight"] = (turns @ first).flatten(0, 1)
    source.load_state_dict(to_megatron(config, tensors), strict=False)
    expected = logits(source)
    result = operated(make_plan(config, "least_squares", num_query_groups=1), source)
    torch.testing.assert_close(logits(result), expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("norm", [False, True])
def test_fewer_rotated_elements_keep_their_frequencies(norm: bool) -> None:
    """Queries and keys whose dropped pairs are zero give the scores that they gave with all pairs rotated."""
    config = ModelConfig(**{**SHAPE, **LLAMA, "qk_layernorm": norm})
    source = build(config)
    tensors = tensors_of(config, source)
    # Of the four pairs (i, i + 4) the first and third have the frequencies of a head with 4 rotated elements.
    dropped = [1, 3, 5, 7]
    for name in list(tensors):
        if ".q_proj." in name or ".k_proj." in name:
            tensors[name].unflatten(0, (-1, E))[:, dropped] = 0
    if not norm:
        for name in list(tensors):
            if ".v_proj." in name:
                value = tensors[name].unflatten(0, (-1, E))
                key = tensors[name.replace(".v_proj.", ".k_proj.")].unflatten(0, (-1, E))
                value[:] = key
    source.load_state_dict(to_megatron(config, tensors), strict=False)
    plan = make_plan(config, "keep_key", kv_rotary="rotate_keys", rotary_percent=0.5)
    result = operated(plan, source)
    if norm:
        assert result.decoder.layers[0].self_attention.k_layernorm.weight.tolist() == [
            tensors["model.layers.0.self_attn.k_norm.weight"][i].item() for i in (0, 2, 4, 6, 1, 3, 5, 7)
        ]
        return
    # The value's elements are in another order, too: so is the output's projection in the source.
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    for name in list(tensors):
        if ".v_proj." in name:
            tensors[name] = tensors[name].unflatten(0, (-1, E))[:, order].flatten(0, 1)
    source.load_state_dict(to_megatron(config, tensors), strict=False)
    expected = logits(source)
    torch.testing.assert_close(logits(result), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("scheme", "percent"), [("rotate_values", 1.0), ("partial", 0.5), ("separate_rope_head", 0.5)]
)
def test_every_scheme_has_a_closed_form(scheme: str, percent: float) -> None:
    config = ModelConfig(**{**SHAPE, **LLAMA})
    plan = make_plan(config, "mean", kv_rotary=scheme, rotary_percent=percent)
    result = operated(plan, build(config))
    assert logits(result).isfinite().all()
    assert plan.target.kv_rotary == scheme
    if scheme == "separate_rope_head":
        key = tensors_of(config, build(config))["model.layers.1.self_attn.k_proj.weight"].unflatten(
            0, (-1, E)
        )
        # Of pairs (i, i + 4) those of every second frequency.
        expected = key.mean(0)[[0, 2, 4, 6]]
        found = result.decoder.layers[1].self_attention.linear_k_rope.weight
        torch.testing.assert_close(found.detach(), expected)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ({}, {"merge": "median"}, "--merge median: unknown; choose one of mean, keep_key, keep_value, least"),
        ({"attention_variant": "qk_eq_v"}, {}, "--load: is a qk_eq_v model; surgery needs separate keys"),
        (
            {},
            {"num_query_groups": 3},
            r"--num-query-groups 3: must divide .* 4 key/value heads; use one of \[1,",
        ),
        (
            {"num_query_groups": 2},
            {"num_query_groups": 4},
            "--num-query-groups 4: must divide the source's 2",
        ),
        (LLAMA, {}, "--position-embedding-type rope: .* what a rotation does .*--kv-rotary"),
        ({}, {"kv_rotary": "rotate_keys"}, "--kv-rotary rotate_keys: needs rotary positions"),
        ({}, {"rotary_percent": 0.5}, "--rotary-percent 0.5: the source has no rotary positions"),
        (LLAMA, {"kv_rotary": "partial"}, "--rotary-percent 1.0: --kv-rotary partial rotates a part"),
        (
            LLAMA,
            {"kv_rotary": "partial", "rotary_percent": 0.75},
            "--rotary-percent 0.75: rotates 6 elements .* divide the source's 8 .*; try 0.5",
        ),
        (
            LLAMA,
            {"kv_rotary": "rotate_values", "merge": "least_squares"},
            "--merge least_squares: with --kv-rotary rotate_values the value is rotated",
        ),
        (
            {"qk_layernorm": True},
            {"merge": "least_squares"},
            "--merge least_squares: the source norms queries and keys",
        ),
        ({}, {"key_weight": -1.0}, "--key-weight -1.0, --value-weight 1.0: must be at least 0"),
    ],
)
def test_bad_plans_are_refused(shape: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(ModelConfig(**{**SHAPE, **shape}), **{"merge": "mean", **options})
