"""The parts of a projection with fewer groups than ranks, each built here: together they are the whole.

Sums of gradients need processes: tests/distributed/test_layouts.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig

CASES = [
    (variant, groups, ranks)
    for variant in ("qkv", "qk_eq_v")
    for groups, ranks in ((1, 2), (1, 4), (1, 8), (2, 4), (2, 8), (4, 8))
]
SIZE = 16


@dataclass(frozen=True)
class Place:
    """What a linear asks of its group, which sends nothing here."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


def config_of(variant: str, groups: int, **changes: Any) -> Any:
    from megatron_sharedproj.model import transformer_config

    return transformer_config(model_of(variant, groups), **changes)


def model_of(variant: str, groups: int) -> ModelConfig:
    return ModelConfig(
        num_layers=2, hidden_size=SIZE, num_attention_heads=8, num_query_groups=groups, kv_channels=4,
        attention_variant=variant, padded_vocab_size=32, max_position_embeddings=8,
    )  # fmt: skip


def build(variant: str, groups: int, rank: int, ranks: int, **changes: Any) -> Any:
    from megatron_sharedproj.layers.projection import SharedProjectionLinear

    config = config_of(variant, groups, **changes)
    torch.manual_seed(3)
    return SharedProjectionLinear(
        SIZE, 0, config=config, variant=variant, init_method=config.init_method, gather_output=False,
        skip_bias_add=False, is_expert=False, tp_group=Place(rank, ranks),
    )  # fmt: skip


@pytest.mark.parametrize("variant, groups, ranks", CASES)
def test_ranks_compute_their_heads_of_the_whole(
    parallel_state: Any, variant: str, groups: int, ranks: int
) -> None:
    whole, x = build(variant, groups, 0, 1), torch.randn(3, 2, SIZE)
    torch.nn.init.normal_(whole.bias)
    queries = 8 // groups
    per_group = whole(x)[0].view(3, 2, groups, -1, 4)
    bias = whole.bias.view(groups, -1, 4)
    for rank in range(ranks):
        linear, own = build(variant, groups, rank, ranks), 8 // ranks
        group, copy = divmod(rank, ranks // groups)
        mine = slice(copy * own, (copy + 1) * own)
        linear.bias.data.copy_(bias[group, mine].flatten())
        linear.kv_bias.data.copy_(bias[group, queries:].flatten())
        expected = torch.cat([per_group[:, :, group, mine], per_group[:, :, group, queries:]], dim=2).flatten(
            2
        )
        torch.testing.assert_close(linear(x)[0], expected)
        with torch.no_grad():  # by two products
            torch.testing.assert_close(linear(x)[0], expected)
        rows = formulas.projected_rows_per_rank(model_of(variant, groups), ranks)
        assert rows == expected.shape[-1] == len(linear.weight) + len(linear.kv_weight)


@pytest.mark.parametrize("variant, groups, ranks", CASES)
def test_ranks_save_the_whole_weight_once(parallel_state: Any, variant: str, groups: int, ranks: int) -> None:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    groups_of = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    offsets = ((0, 1, 2),)  # of the second of two layers
    whole = build(variant, groups, 0, 1)
    usual = whole.sharded_state_dict("linear_qkv.", offsets, groups_of)
    found = {name: torch.full_like(getattr(whole, name), torch.nan) for name in ("weight", "bias")}
    for rank in range(ranks):
        linear = build(variant, groups, rank, ranks)
        state = linear.sharded_state_dict("linear_qkv.", offsets, groups_of)
        assert set(state) == {f"linear_qkv.{name}" for name in linear.state_dict()}
        for name, parameter in linear.named_parameters():
            factory, key = state[f"linear_qkv.{name}"], name.removeprefix("kv_")
            assert factory.data is parameter
            heads = factory.build()
            torch.testing.assert_close(factory.merge_fn([h.data for h in heads]), parameter, rtol=0, atol=0)
            for head in heads:
                known = usual[f"linear_qkv.{key}"]
                assert (head.key, head.global_shape) == (known.key, known.global_shape)
                layer, start, *_ = head.global_offset
                assert layer == 1
                if is_main_replica(head.replica_id):
                    place = found[key][start : start + 4]
                    assert place.isnan().all()
                    place.copy_(head.data)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, getattr(whole, name).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("variant, groups, ranks", CASES)
def test_norms_count_a_weight_once(parallel_state: Any, variant: str, groups: int, ranks: int) -> None:
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    counted = sum(
        parameter.numel()
        for rank in range(ranks)
        for parameter in build(variant, groups, rank, ranks).parameters()
        if param_is_not_tensor_parallel_duplicate(parameter, Place(rank, ranks))
    )
    assert counted == sum(parameter.numel() for parameter in build(variant, groups, 0, 1).parameters())


def test_parameters_have_the_dtype_of_the_model(parallel_state: Any) -> None:
    linear = build("qk_eq_v", 1, 1, 2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.bfloat16}
    assert linear(torch.randn(3, 2, SIZE).bfloat16())[0].dtype == torch.bfloat16


def test_enough_groups_are_cut_as_ever(parallel_state: Any) -> None:
    whole = build("qk_eq_v", 4, 0, 1)
    for rank in range(4):
        linear = build("qk_eq_v", 4, rank, 4)
        assert not linear.replicates_kv
        assert set(dict(linear.named_parameters())) == {"weight", "bias"}
        torch.testing.assert_close(linear.weight, whole.weight.chunk(4)[rank])


def test_ranks_that_cannot_share_groups_are_refused(parallel_state: Any) -> None:
    from megatron_sharedproj.layers.projection import OwnHeads

    with pytest.raises(ValueError, match="--tensor-model-parallel-size 8: .*--num-query-groups 3"):
        OwnHeads.of(SimpleNamespace(num_attention_heads=24, num_query_groups=3), "qkv", 0, 8)
