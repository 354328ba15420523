"""Activations computed again in backward: the same loss and gradients, dropout masks included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.config import ModelConfig, ParallelConfig

pytestmark = pytest.mark.usefixtures("parallel_state")

S, B, VOCAB = 12, 2, 64
# name -> flags of ParallelConfig
RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "units": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}
MODELS: dict[str, dict[str, Any]] = {
    "qkv": {},
    "qk_eq_v": {"attention_variant": "qk_eq_v"},
    "q_eq_k_eq_v": {"attention_variant": "q_eq_k_eq_v"},
    "Q-GQA": {"attention_variant": "qk_eq_v", "num_query_groups": 2},
    "Q-MQA": {"attention_variant": "qk_eq_v", "num_query_groups": 1},
    "rope": {"num_query_groups": 2, "position_embedding_type": "rope", "qk_layernorm": True},
}


def loss_and_gradients(
    shape: dict[str, Any], dropout: float, **parallel: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    from megatron_sharedproj import distributed
    from megatron_sharedproj.model import build_model

    distributed.seed_all(5)
    config = ModelConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        padded_vocab_size=VOCAB,
        max_position_embeddings=S,
        attention_dropout=dropout,
        hidden_dropout=dropout,
        init_method_std=0.2,
        **shape,
    )
    model = build_model(config, ParallelConfig(**parallel)).train()
    tokens = torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(S).expand(B, S)
    loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_without(model: str, dropout: float) -> None:
    expected, gradients = loss_and_gradients(MODELS[model], dropout)
    for name, flags in RECOMPUTE.items():
        found, recomputed = loss_and_gradients(MODELS[model], dropout, **flags)
        assert found == expected, name
        for key, gradient in gradients.items():
            assert torch.equal(recomputed[key], gradient), (name, key)


@pytest.mark.parametrize("documents", [{}, {"reset_attention_mask": True, "reset_position_ids": True}])
def test_a_run_trains_as_without(tmp_path: Path, documents: dict[str, Any], capsys: Any) -> None:
    data = tiny.write_data(tmp_path)
    further = {"num_layers": 4, "hidden_dropout": 0.1, **documents}
    expected = tiny.losses(tiny.flags(data, **further))
    assert "recompute" not in capsys.readouterr().out
    full = {"recompute_granularity": "full", "recompute_num_layers": 2}
    assert tiny.losses(tiny.flags(data, **further, **full)) == expected
    assert "recompute full: keeps" in capsys.readouterr().out


def test_selective_says_when_it_saves_nothing(tmp_path: Path, capsys: Any) -> None:
    """Only plain attention, which dropout needs on a CPU, keeps scores that could be computed again."""
    data = tiny.write_data(tmp_path)
    for dropout, says in ((0.0, True), (0.1, False)):
        line = tiny.flags(data, hidden_size=128, recompute_activations=True, attention_dropout=dropout)
        tiny.trainer(line)
        out = capsys.readouterr().out
        assert "recompute selective: keeps" in out
        assert ("next to nothing to compute again" in out) == says
