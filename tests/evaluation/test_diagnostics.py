"""What is collected from a model against Q, K and V multiplied out of its weights, in numpy.

Shape legend: n tokens, r rows (sequences), s sequence, h heads, g groups, e head size, d hidden size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("parallel_state")

VOCAB, POSITIONS, HEADS, E, SEQ, ROWS = 24, 16, 4, 8, 12, 4
TIED = {"qk_eq_v", "q_eq_k_eq_v"}
ROPE: dict[str, Any] = {"position_embedding_type": "rope"}
HALF: dict[str, Any] = {**ROPE, "rotary_percent": 0.5}
RMS: dict[str, Any] = {"qk_layernorm": True, "normalization": "RMSNorm", "add_bias_linear": False}
# name -> variant, groups, shape
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qkv": ("qkv", 4, {}),
    "qkv-2": ("qkv", 2, {}),
    "qkv-1": ("qkv", 1, RMS),
    "q_eq_k": ("q_eq_k", 4, {}),
    "qk_eq_v": ("qk_eq_v", 4, {}),
    "qk_eq_v-2": ("qk_eq_v", 2, {"qk_layernorm": True}),
    "qk_eq_v-1": ("qk_eq_v", 1, {"add_bias_linear": False}),
    "q_eq_k_eq_v": ("q_eq_k_eq_v", 4, {}),
    "qkv-2 rope": ("qkv", 2, {**HALF, "qk_layernorm": True}),
    "q_eq_k rope": ("q_eq_k", 4, {**ROPE, "qk_layernorm": True}),
    "rotate_keys": ("qk_eq_v", 4, {**ROPE, "kv_rotary": "rotate_keys"}),
    "rotate_values-2": ("qk_eq_v", 2, {**ROPE, "kv_rotary": "rotate_values", **RMS}),
    "rotate_values q=k=v": ("q_eq_k_eq_v", 4, {**ROPE, "kv_rotary": "rotate_values"}),
    "partial-2": ("qk_eq_v", 2, {**HALF, "kv_rotary": "partial"}),
    "separate_rope_head-2": ("qk_eq_v", 2, {**HALF, "kv_rotary": "separate_rope_head"}),
}

Array = NDArray[np.float64]


def stream(rows: int = ROWS) -> NDArray[np.int64]:
    return np.random.default_rng(6).integers(VOCAB, size=rows * SEQ + 1)


def load(variant: str = "qk_eq_v", groups: int = HEADS, **shape: Any) -> Any:
    """A random model, biases and norms too."""
    from megatron_sharedproj.config import ModelConfig, RunConfig
    from megatron_sharedproj.data.tokenizers import build_tokenizer
    from megatron_sharedproj.inference.loading import LoadedModel
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        num_layers=2, hidden_size=HEADS * E, num_attention_heads=HEADS, num_query_groups=groups,
        padded_vocab_size=VOCAB, max_position_embeddings=POSITIONS, attention_variant=variant, **shape,
    )  # fmt: skip
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if "layernorm.weight" in name else 0.3 * noise)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=VOCAB)
    return LoadedModel(model, RunConfig(model=config), tokenizer, Path("."), torch.device("cpu"), {})


def diagnose(loaded: Any, tokens: NDArray[Any], **options: Any) -> Any:
    from megatron_sharedproj.evaluation.diagnostics import diagnose as function

    return function(loaded, tokens, **{"seq_length": SEQ, **options})


def inputs_of_layers(loaded: Any, tokens: NDArray[np.int64]) -> list[Array]:
    """What each layer's projection is given, [r, s, d]."""
    found: list[Array] = []
    hooks = [
        layer.self_attention.linear_qkv.register_forward_pre_hook(
            lambda module, args: found.append(args[0].double().transpose(0, 1).numpy())
        )
        for layer in loaded.model.decoder.layers
    ]
    rows = torch.from_numpy(tokens[: ROWS * SEQ].reshape(ROWS, SEQ))
    with torch.no_grad():
        loaded.model(rows, torch.arange(SEQ).expand_as(rows), None)
    for hook in hooks:
        hook.remove()
    return found


def normed(x: Array, p: dict[str, Array], name: str) -> Array:
    if f"{name}.weight" not in p:
        return x
    centred = x - x.mean(-1, keepdims=True) if f"{name}.bias" in p else x
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"]
    return scaled + p.get(f"{name}.bias", 0.0)


def turned(x: Array, size: int) -> Array:
    """[r, s, e]: element i and i + size / 2 of position t rotated by t * 10000^(-2 i / size)."""
    out = x.copy()
    for i in range(size // 2):
        angle = np.arange(x.shape[1]) * 10000.0 ** (-2 * i / size)
        a, b = x[..., i], x[..., i + size // 2]
        out[..., i] = a * np.cos(angle) - b * np.sin(angle)
        out[..., i + size // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


class Head:
    """One query head of a layer: q, k, v as projected [r, s, e], as scored, and the weights [e, d]."""

    def __init__(self, x: Array, p: dict[str, Array], config: Any, head: int):
        variant, per_group = config.attention_variant, HEADS // config.num_query_groups
        # What a group stores, head by head.
        order = {
            "qkv": ["q"] * per_group + ["k", "v"],
            "q_eq_k": ["k", "v"],
            "qk_eq_v": ["q"] * per_group + ["k"],
            "q_eq_k_eq_v": ["k"],
        }[variant]
        group, inside = divmod(head, per_group)
        weight, bias = p["linear_qkv.weight"], p.get("linear_qkv.bias")

        def project(place: int) -> tuple[Array, Array]:
            start = (group * len(order) + place) * E
            rows = weight[start : start + E]
            return x @ rows.T + (0.0 if bias is None else bias[start : start + E]), rows

        key, self.w_k = project(order.index("k"))
        self.k = normed(key, p, "k_layernorm")
        self.q, self.w_q, self.v, self.w_v = self.k, self.w_k, self.k, self.w_k
        if "q" in order:
            query, self.w_q = project(inside)
            self.q = normed(query, p, "q_layernorm")
        if "v" in order:
            self.v, self.w_v = project(order.index("v"))
        self.group = group
        size = config.rope_size if config.position_embedding_type == "rope" else 0
        self.scored_q, self.scored_k = turned(self.q, size), turned(self.k, size)
        if config.kv_rotary == "separate_rope_head":
            rope = x @ p["linear_k_rope.weight"].T + p.get("linear_k_rope.bias", 0.0)
            self.scored_k = np.concatenate([turned(rope, size), self.k[..., size:]], axis=-1)


def cka(x: Array, y: Array) -> float:
    k, m = x @ x.T, y @ y.T
    h = np.eye(len(x)) - 1 / len(x)
    k, m = h @ k @ h, h @ m @ h
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def rank(matrix: Array) -> float:
    values = np.linalg.svd(matrix, compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def centred_rank(x: Array) -> float:
    return rank(x - x.mean(0))


def symmetry(scores: Array) -> float:
    """Of scores [r, s, s], all rows together."""
    other = scores.swapaxes(-1, -2)
    even, odd = (scores + other) / 2, (scores - other) / 2
    return float(((even**2).sum() - (odd**2).sum()) / (scores**2).sum())


def flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def expected_head(head: Head) -> dict[str, Any]:
    scores = head.scored_q @ head.scored_k.swapaxes(-1, -2)
    centre = np.eye(SEQ) - 1 / SEQ
    seen = np.tril(np.ones((SEQ, SEQ), dtype=bool))
    shifted = np.where(seen, scores / math.sqrt(E), -np.inf)
    weights = np.exp(shifted - shifted.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[:, 1:]
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(-1)
    return {
        "cka_key_value": cka(flat(head.k), flat(head.v)),
        "cka_query_key": cka(flat(head.q), flat(head.k)),
        **{f"effective_rank_{role}": centred_rank(flat(getattr(head, role[0]))) for role in ROLES},
        **{f"weight_rank_{role}": rank(getattr(head, f"w_{role[0]}")) for role in ROLES},
        "score_symmetry": symmetry(scores),
        "score_symmetry_centred": symmetry(centre @ scores @ centre),
        "weight_symmetry": symmetry(head.w_q.T @ head.w_k),
        "entropy": entropy.mean(),
        "entropy_share": (entropy / np.log(np.arange(2, SEQ + 1))).mean(),
        "first_token": weights[..., 0].mean(),
        "self": np.stack([weights[:, i - 1, i] for i in range(1, SEQ)]).mean(),
    }


ROLES = ("query", "key", "value")
QUERY_KEY = ("cka_query_key", "score_symmetry", "score_symmetry_centred", "weight_symmetry")


@pytest.mark.parametrize("name", MODELS)
def test_every_figure_of_every_variant(name: str) -> None:
    variant, groups, shape = MODELS[name]
    loaded = load(variant, groups, **shape)
    config = loaded.config.model
    found = diagnose(loaded, stream(), micro_batch_size=3)
    inputs = inputs_of_layers(loaded, stream())
    assert (found.tokens, found.seq_length, len(found.layers)) == (ROWS * SEQ, SEQ, 2)
    for index, layer in enumerate(loaded.model.decoder.layers):
        p = {key: x.detach().double().numpy() for key, x in layer.self_attention.named_parameters()}
        heads = [Head(inputs[index], p, config, head) for head in range(HEADS)]
        rows = [row for row in found.heads if row["layer"] == index]
        assert [row["head"] for row in rows] == list(range(HEADS))
        tied = {"cka_key_value"} if variant in TIED else set()
        tied |= set(QUERY_KEY) if variant.startswith("q_eq_k") else set()
        whole = found.layers[index]
        assert (whole["layer"], whole["head"]) == (index, None)
        expected = [expected_head(head) for head in heads]
        for row, mine in zip(rows, expected, strict=True):
            for key, value in mine.items():
                if key in tied:
                    assert row[key] == whole[key] == "tied"
                    assert value == pytest.approx(1.0)  # which is why it is not measured
                else:
                    assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
        for key in ("entropy", "entropy_share", "first_token", "self", *QUERY_KEY[1:]):
            if key not in tied:
                assert whole[key] == pytest.approx(
                    np.mean([mine[key] for mine in expected]), rel=2e-3, abs=1e-5
                )
        # A group's key is one, however many heads read it.
        own = [heads[group * (HEADS // groups)] for group in range(groups)]
        q, k, v = (
            np.concatenate([flat(getattr(head, role)) for head in some], axis=1)
            for role, some in (("q", heads), ("k", own), ("v", own))
        )
        for pair, x, y in (("key_value", k, v), ("query_key", q, k)):
            key = f"cka_{pair}"
            if key in tied:
                assert whole[f"{key}_unbiased"] == whole[f"{key}_heads"] == "tied"
            else:
                assert whole[key] == pytest.approx(cka(x, y), rel=1e-4)
                assert whole[f"{key}_heads"] == pytest.approx(np.mean([row[key] for row in rows]))
                assert whole[f"{key}_unbiased"] < whole[key]
        for role, x in zip(ROLES, (q, k, v), strict=True):
            assert whole[f"effective_rank_{role}"] == pytest.approx(centred_rank(x), rel=1e-4)
            assert 1 <= whole[f"rank99_{role}"] <= x.shape[1]
        w_k = np.concatenate([head.w_k for head in own])
        assert whole["weight_rank_key"] == pytest.approx(rank(w_k), rel=1e-5)


def test_the_loss_is_the_perplexitys(tmp_path: Path) -> None:
    from megatron_sharedproj.data.indexed import IndexedWriter
    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity

    loaded, tokens = load(), stream()
    with IndexedWriter(tmp_path / "data", VOCAB) as writer:
        writer.add(tokens, np.array([len(tokens)], dtype=np.int32))
        writer.close()
        writer.publish()
    loss = evaluate_perplexity(loaded, str(tmp_path / "data"), seq_length=SEQ)["loss"]
    assert diagnose(loaded, tokens).loss == pytest.approx(loss, rel=1e-6)


def test_the_micro_batch_does_not_matter_and_progress_is_told() -> None:
    loaded = load("qkv", 2)
    said: list[tuple[int, int]] = []
    first = diagnose(loaded, stream(), micro_batch_size=1, say=lambda done, total: said.append((done, total)))
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # What fills no row is left out.
    for other in (diagnose(loaded, stream(), micro_batch_size=9), diagnose(loaded, stream(5)[: 5 * SEQ])):
        assert other.tokens == first.tokens
        for before, after in zip(first.rows, other.rows, strict=True):
            measured = {key: x for key, x in before.items() if isinstance(x, float)}
            assert {key: after[key] for key in measured} == pytest.approx(measured, rel=1e-4)


def test_rows_are_layers_before_their_heads() -> None:
    from megatron_sharedproj.evaluation.diagnostics import MEASURES

    found = diagnose(load("qkv", 2), stream())
    assert [(row["layer"], row["head"]) for row in found.rows] == [
        (layer, head) for layer in range(2) for head in (None, *range(HEADS))
    ]
    assert all(list(row) == ["layer", "head", *MEASURES] for row in found.layers)
    assert all(set(row) <= {"layer", "head", *MEASURES} for row in found.heads)
    # Two heads read one group.
    keys = [row["effective_rank_key"] for row in found.heads[:HEADS]]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load()
    attention = loaded.model.decoder.layers[0].self_attention
    rows = torch.from_numpy(stream()[None, :SEQ])

    def state() -> Any:
        return loaded.model(rows, torch.arange(SEQ)[None], None)

    with torch.no_grad():
        before = state()
        diagnose(loaded, stream())
        assert torch.equal(state(), before)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(attention.linear_proj, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        diagnose(loaded, stream())
    for layer in loaded.model.decoder.layers:
        assert "get_query_key_value_tensors" not in vars(layer.self_attention)
        assert not layer.self_attention.core_attention._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"seq_length": 17}, 60, "--seq-length 17: must be from 2 to the model's 16 positions"),
        ({"seq_length": 1}, 60, "--seq-length 1: must be from 2"),
        ({"micro_batch_size": 0}, 60, "--micro-batch-size 0: must be at least 1"),
        ({}, SEQ, "--tokens: 12 tokens are too few for a row of 12 and the token after it"),
        ({}, 0, "--tokens: 0 tokens are too few"),
    ],
)
def test_bad_input(options: dict[str, Any], tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(load(), stream(8)[:tokens], **options)
