"""Which random stream each dropout draws from.

Under tensor parallelism heads are split and the residual stream is replicated: attention dropout needs a
stream per rank (Megatron's tracked one), residual dropout the default one, equal on all ranks.

Shape legend: s sequence, b batch, h heads, e head size.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.config import ModelConfig

pytestmark = pytest.mark.usefixtures("parallel_state")

S, B, H, E = 12, 2, 4, 8
VARIANTS = ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"]


@pytest.fixture(autouse=True)
def seeded(parallel_state: Any) -> None:
    from megatron_sharedproj import distributed

    distributed.seed_all(42)


def build(variant: str = "qk_eq_v", *, attention: float = 0.0, hidden: float = 0.0) -> Any:
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        num_layers=2,
        hidden_size=H * E,
        num_attention_heads=H,
        padded_vocab_size=64,
        max_position_embeddings=16,
        attention_variant=variant,
        attention_dropout=attention,
        hidden_dropout=hidden,
        init_method_std=0.3,
    )
    return build_model(config).train()


def streams() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The default stream's state, and those of Megatron's tracked streams."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracked = get_cuda_rng_tracker().get_states()
    return torch.get_rng_state(), {name: state.clone() for name, state in tracked.items()}


def moved(before: Any, after: Any) -> tuple[bool, set[str]]:
    """Whether the default stream moved, and the tracked ones that did."""
    assert before[1].keys() == after[1].keys()
    return (
        not torch.equal(before[0], after[0]),
        {name for name, state in before[1].items() if not torch.equal(state, after[1][name])},
    )


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    tokens = torch.arange(B * S).view(B, S) % 64
    return model(tokens, torch.arange(S).expand(B, S), None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_dropout_draws_from_the_tracked_stream(variant: str) -> None:
    model = build(variant, attention=0.5)
    before = streams()
    run(model)
    assert moved(before, streams()) == (False, {"model-parallel-rng"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_dropout_draws_from_the_default_stream(variant: str) -> None:
    model = build(variant, hidden=0.5)
    before = streams()
    run(model)
    assert moved(before, streams()) == (True, set())


def test_both_draw_from_their_own() -> None:
    model = build(attention=0.5, hidden=0.5)
    before = streams()
    run(model)
    assert moved(before, streams()) == (True, {"model-parallel-rng"})


def test_without_dropout_no_stream_moves() -> None:
    model = build()
    before = streams()
    first, second = run(model), run(model)
    assert moved(before, streams()) == (False, set())
    assert torch.equal(first, second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_drops_nothing(variant: str) -> None:
    model = build(variant, attention=0.5, hidden=0.5)
    trained = run(model)
    model.eval()
    before = streams()
    first, second = run(model), run(model)
    assert moved(before, streams()) == (False, set())
    assert torch.equal(first, second)
    assert not torch.allclose(first, trained, atol=1e-2)


def attention_weights(model: Any, layer: int) -> torch.Tensor:
    """A layer's attention weights after dropout: [h, s, s].

    Zero queries make the scores equal, and values that are unit vectors show each weight by itself.
    """
    core = model.decoder.layers[layer].self_attention.core_attention
    key = torch.eye(S)[:, None, None].expand(S, 1, H, S)
    return core(torch.zeros(S, 1, H, S), key, key, None).view(S, H, S).transpose(0, 1)


def dropped(model: Any, layer: int) -> torch.Tensor:
    return attention_weights(model, layer) == 0


def test_masks_differ_between_layers_steps_and_heads() -> None:
    model = build(attention=0.5)
    below = torch.ones(S, S, dtype=torch.bool).tril()
    masks = [dropped(model, layer)[:, below] for layer in (0, 1, 0, 1)]
    for one, other in itertools.combinations(masks, 2):
        assert not torch.equal(one, other)
    for one, other in itertools.combinations(masks[0], 2):  # the heads of one call
        assert not torch.equal(one, other)
    assert all(0.3 < mask.float().mean() < 0.7 for mask in masks)


def test_the_seed_decides_the_masks() -> None:
    from megatron_sharedproj import distributed

    model = build(attention=0.5, hidden=0.5)
    outputs = []
    for seed in (1, 1, 2):
        distributed.seed_all(seed)
        outputs.append(run(model))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_what_is_kept_is_scaled_up() -> None:
    """Inverted dropout: 1 / (1 - p) on what stays, so that evaluation needs no factor."""
    model = build(attention=0.75)
    weights = attention_weights(model, 0)
    seen = torch.arange(1, S + 1).view(1, S, 1).expand(H, S, S)
    kept = weights != 0
    assert 0 < kept.sum() < H * S * (S + 1) / 2
    torch.testing.assert_close(weights[kept], 4.0 / seen[kept])


def test_training_with_attention_dropout_leaves_the_residual_masks_alone(tmp_path: Path) -> None:
    """Steps of a real run with attention dropout only: the default stream stands still."""
    prefix = tiny.write_data(tmp_path)
    trainer = tiny.trainer(tiny.flags(prefix, attention_dropout=0.3, train_iters=3))
    iterator = trainer._iterator(trainer.train_data, 0)
    seen = [streams()]
    for _ in range(3):
        trainer.step(iterator)
        seen.append(streams())
    for earlier, later in itertools.pairwise(seen):
        assert moved(earlier, later) == (False, {"model-parallel-rng"})
