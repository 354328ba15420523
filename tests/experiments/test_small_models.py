"""Small transformers against the formulas written out in float64, gradients included, and their sizes.

Shape legend: b batch, s sequence, d hidden size, h heads, e head size, m channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sharedproj.experiments.small_models import (
    FORMS,
    PAPER_NAMES,
    SmallConfig,
    SmallTransformer,
    count_parameters,
)

B, S, D, H, LAYERS, WIDTH = 2, 5, 12, 3, 2, 20
E = D // H
# form -> the projections that are query, key and value
ROLES = {
    "qkv": "q k v", "q_eq_k": "k k v", "q_eq_k+": "k k v", "qk_eq_v": "q kv kv", "q_eq_k_eq_v": "kv kv kv",
    "q_eq_k_eq_v+": "kv kv kv", "mqa": "q k v", "q_mqa": "q kv kv",
}  # fmt: skip
CASES = [(form, causal) for form in FORMS for causal in (False, True) if not (causal and form.endswith("+"))]


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def term(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """sum(w), and sum_c w_c P_ijc + b [s, s] from P as a whole [s, s, m]."""
    w = weights[f"{name}.weight"]

    def channel(position: int, c: int) -> float:
        phase = position / 10000 ** ((c - c % 2) / 5)
        return math.cos(phase) if c % 2 else math.sin(phase)

    p = torch.tensor(
        [[[channel(i if c < 5 else j, c % 5) for c in range(10)] for j in range(S)] for i in range(S)],
        dtype=torch.float64,
    )
    return w.sum(), p @ w + weights[f"{name}.bias"]


def attention(x: Tensor, weights: dict[str, Tensor], name: str, form: str, causal: bool) -> Tensor:
    query, key, value = (linear(x, weights, f"{name}.{role}_proj") for role in ROLES[form].split())
    outputs = []
    for head in range(H):
        mine = slice(head * E, (head + 1) * E)
        shared = slice(0, E) if FORMS[form][1] else mine
        scores = query[..., mine] @ key[..., shared].transpose(1, 2) / math.sqrt(E)
        if form.endswith("+"):
            factor, added = term(weights, f"{name}.positional_term")
            scores = scores * factor + added
        if causal:
            scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
        outputs.append(scores.softmax(-1) @ value[..., shared])
    return linear(torch.cat(outputs, -1), weights, f"{name}.o_proj")


def definition(x: Tensor, weights: dict[str, Tensor], form: str, causal: bool) -> Tensor:
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        x = x + attention(
            norm(x, weights, f"{block}.attention_norm"), weights, f"{block}.attention", form, causal
        )
        y = linear(norm(x, weights, f"{block}.mlp_norm"), weights, f"{block}.mlp.0")
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(y, weights, f"{block}.mlp.2")
    return norm(x, weights, "norm")


def build(form: str, causal: bool = False, **changes: Any) -> SmallTransformer:
    torch.manual_seed(1)
    config = SmallConfig(D, LAYERS, H, form=form, causal=causal, **{"mlp_size": WIDTH, **changes})
    model = SmallTransformer(config).double()
    with torch.no_grad():  # norms, biases and the + forms' terms away from where they start
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("form", "causal"), CASES)
def test_outputs_and_gradients_are_those_of_the_formulas(form: str, causal: bool) -> None:
    model = build(form, causal)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain_x = x.detach().clone().requires_grad_()
    ours, plain = model(x), definition(plain_x, weights, form, causal)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    pull = torch.randn_like(ours)
    ours.backward(pull)
    plain.backward(pull)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-9, msg=name)


# form -> projections of size d x d, of size e x d, and parameters of the positional term
SIZES = {
    "qkv": (3, 0, 0), "q_eq_k": (2, 0, 0), "q_eq_k+": (2, 0, 11), "qk_eq_v": (2, 0, 0),
    "q_eq_k_eq_v": (1, 0, 0), "q_eq_k_eq_v+": (1, 0, 11), "mqa": (1, 2, 0), "q_mqa": (1, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_of_the_projections(form: str) -> None:
    whole, shared, positions = SIZES[form]
    attention_size = (whole + 1) * (D * D + D) + shared * (D * E + E) + positions
    layer = attention_size + 2 * D * 4 * D + 4 * D + D + 4 * D
    model = SmallTransformer(SmallConfig(D, LAYERS, H, form=form))
    assert count_parameters(model) == LAYERS * layer + 2 * D


def test_every_form_has_a_name_of_the_papers() -> None:
    assert PAPER_NAMES.keys() == FORMS.keys() and len(set(PAPER_NAMES.values())) == len(FORMS)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.endswith("+")])
def test_causal_tokens_see_none_behind_them(form: str) -> None:
    x = torch.randn(B, S, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3:] = torch.randn(B, S - 3, D, dtype=torch.float64)
    for causal in (True, False):
        model = build(form, causal)
        same = torch.isclose(model(x), model(changed), rtol=0, atol=1e-12)[:, :3].all()
        assert bool(same) == causal


def test_dropout_acts_in_training_only() -> None:
    model, plain = build("qkv", dropout=0.5), build("qkv")
    x = torch.randn(B, S, D, dtype=torch.float64)
    assert torch.equal(model.eval()(x), plain(x))
    assert not torch.allclose(model.train()(x), plain(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "gqa"}, "form gqa: unknown; choose from qkv, "),
        ({"num_heads": 5}, "hidden_size 12: not divisible by num_heads 5"),
        *(
            ({name: 0}, f"{name} 0: must be at least 1")
            for name in ("hidden_size", "num_layers", "num_heads")
        ),
    ],
)
def test_bad_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallConfig(**{"hidden_size": D, "num_layers": LAYERS, "num_heads": H, **changes})


@pytest.mark.parametrize("form", ["q_eq_k+", "q_eq_k_eq_v+"])
def test_plus_forms_are_not_causal(form: str) -> None:
    with pytest.raises(ValueError, match="see all tokens; give causal=False"):
        SmallTransformer(SmallConfig(D, LAYERS, H, form=form, causal=True))
