"""The Megatron layers against attention written out from the paper, in float64.

The reference knows nothing of this package: it slices one weight per head out of the interleaved
projection (``q.. k v`` group by group) with its own arithmetic, so that a wrong layout shows here.

Shape legend: s sequence, b batch, h heads, g groups, e head size, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference_layers import CASES, TOLERANCE, VOCAB, B, D, H, S, build, head_slices

pytestmark = pytest.mark.usefixtures("parallel_state")


def reference_attention(
    x: Tensor, qkv: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], variant: str, groups: int, e: int
) -> Tensor:
    """x [s, b, d] -> [s, b, d]: one head after another, explicit weights, naive causal softmax."""
    weight, bias = qkv
    heads = []
    for rows_q, rows_k, rows_v in head_slices(variant, groups, e):
        q, k, v = (
            torch.einsum("sbd,ed->bse", x, weight[rows]) + bias[rows] for rows in (rows_q, rows_k, rows_v)
        )
        scores = torch.einsum("bie,bje->bij", q, k) / math.sqrt(e)
        seen = torch.tensor([[j <= i for j in range(x.shape[0])] for i in range(x.shape[0])])
        exponentials = torch.where(seen, scores, float("-inf")).exp()
        weights = exponentials / exponentials.sum(-1, keepdim=True)
        heads.append(torch.einsum("bij,bje->ibe", weights, v))
    return torch.einsum("sbf,df->sbd", torch.cat(heads, dim=-1), out[0]) + out[1]


@pytest.mark.parametrize("kv_channels", [8, 12])  # 12: heads x head size differs from d
@pytest.mark.parametrize("variant, groups", CASES)
def test_attention_and_its_gradients(variant: str, groups: int, kv_channels: int) -> None:
    attention = build(variant, groups, kv_channels=kv_channels).decoder.layers[0].self_attention
    parameters = [
        attention.linear_qkv.weight, attention.linear_qkv.bias,
        attention.linear_proj.weight, attention.linear_proj.bias,
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(S, B, D, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(S, B, D, generator=generator, dtype=torch.float64)

    ours = x.clone().requires_grad_()
    projected, bias = attention(ours, attention_mask=None)
    actual = projected + bias
    actual_gradients = torch.autograd.grad(actual, [ours, *parameters], cotangent)

    theirs = x.clone().requires_grad_()
    copies = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    expected = reference_attention(
        theirs, (copies[0], copies[1]), (copies[2], copies[3]), variant, groups, kv_channels
    )
    expected_gradients = torch.autograd.grad(expected, [theirs, *copies], cotangent)

    torch.testing.assert_close(actual, expected, **TOLERANCE)
    names = ("input", "projection weight", "projection bias", "output weight", "output bias")
    for name, got, wanted in zip(names, actual_gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(got, wanted, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant, groups", CASES)
def test_tied_tensors_are_one_tensor(variant: str, groups: int) -> None:
    attention = build(variant, groups).decoder.layers[0].self_attention
    x = torch.randn(S, B, D, dtype=torch.float64)
    query, key, value = attention.get_query_key_value_tensors(x)
    assert query.shape == (S, B, H, D // H)
    assert key.shape == value.shape == (S, B, groups, D // H)
    tied_value = variant in ("qk_eq_v", "q_eq_k_eq_v")
    assert (value is key) == tied_value
    assert (value.data_ptr() == key.data_ptr()) == tied_value
    tied_query = variant in ("q_eq_k", "q_eq_k_eq_v")
    assert (query is key) == tied_query


@pytest.mark.parametrize("variant, groups", CASES)
def test_query_head_reads_its_group(variant: str, groups: int) -> None:
    attention = build(variant, groups).decoder.layers[0].self_attention
    weight, bias = attention.linear_qkv.weight, attention.linear_qkv.bias
    x = torch.randn(S, B, D, dtype=torch.float64)
    query, key, value = attention.get_query_key_value_tensors(x)
    for head, rows in enumerate(head_slices(variant, groups, D // H)):
        group = head // (H // groups)
        for tensor, index, of_role in zip((query, key, value), (head, group, group), rows, strict=True):
            expected = x @ weight[of_role].T + bias[of_role]
            torch.testing.assert_close(tensor[:, :, index], expected, **TOLERANCE)


def reference_model(p: dict[str, Tensor], tokens: Tensor, variant: str, groups: int, layers: int) -> Tensor:
    """The released code's GPT-2-style model: tokens [b, s] -> logits [b, s, V]."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            p[f"{name}.weight"] * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            + p[f"{name}.bias"]
        )

    table = p["embedding.word_embeddings.weight"]
    x = table[tokens] + p["embedding.position_embeddings.weight"][: tokens.shape[1]]
    x = x.transpose(0, 1)  # [s, b, d]
    for i in range(layers):
        layer = f"decoder.layers.{i}"
        attended = f"{layer}.self_attention"
        x = x + reference_attention(
            norm(x, f"{layer}.input_layernorm"),
            (p[f"{attended}.linear_qkv.weight"], p[f"{attended}.linear_qkv.bias"]),
            (p[f"{attended}.linear_proj.weight"], p[f"{attended}.linear_proj.bias"]),
            variant, groups, D // H,
        )  # fmt: skip
        up = norm(x, f"{layer}.pre_mlp_layernorm") @ p[f"{layer}.mlp.linear_fc1.weight"].T
        up = up + p[f"{layer}.mlp.linear_fc1.bias"]
        up = 0.5 * up * (1.0 + torch.erf(up / math.sqrt(2.0)))
        x = x + up @ p[f"{layer}.mlp.linear_fc2.weight"].T + p[f"{layer}.mlp.linear_fc2.bias"]
    return (norm(x, "decoder.final_layernorm") @ table.T).transpose(0, 1)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = logits.gather(-1, labels[..., None])[..., 0]
    return (torch.logsumexp(logits, -1) - chosen).mean()


@pytest.mark.parametrize("variant, groups", CASES)
def test_whole_model_and_its_gradients(variant: str, groups: int) -> None:
    model = build(variant, groups)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (B, S), generator=generator)
    labels = torch.randint(VOCAB, (B, S), generator=generator)
    positions = torch.arange(S).expand(B, S)

    # From the logits: Megatron's own cross-entropy computes in float32 whatever its input is.
    logits = model(tokens, positions, None)
    loss = mean_loss(logits, labels)
    loss.backward()

    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected_logits = reference_model(copies, tokens, variant, groups, layers=2)
    expected = mean_loss(expected_logits, labels)
    expected.backward()

    torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    assert expected.item() > 1.0
    for name, parameter in model.named_parameters():
        wanted = copies[name].grad
        assert wanted is not None and wanted.abs().max() > 0, f"{name}: nothing to compare"
        torch.testing.assert_close(
            parameter.grad, wanted, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        per_token = model(tokens, positions, None, labels=labels)
    assert per_token.shape == (B, S)
    assert per_token.mean().item() == pytest.approx(expected.item(), abs=1e-5)
