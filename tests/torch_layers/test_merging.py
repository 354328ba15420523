"""merge_key_value: what becomes of two projections."""

from __future__ import annotations

import pytest
import torch

from megatron_sharedproj.torch_layers.merging import merge_key_value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_methods(dtype: torch.dtype) -> None:
    key, value = torch.randn(6, 4).to(dtype), torch.randn(6, 4).to(dtype)
    mean = ((key.double() + value.double()) / 2).to(dtype)
    torch.testing.assert_close(merge_key_value(key, value), mean)
    for method, kept in (("keep_key", key), ("keep_value", value)):
        merged = merge_key_value(key, value, method)
        assert torch.equal(merged, kept) and merged.data_ptr() != kept.data_ptr()
    assert merge_key_value(key[:, 0], value[:, 0]).shape == (6,)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="sum: unknown way to merge"):
        merge_key_value(torch.zeros(2, 2), torch.zeros(2, 2), "sum")
    with pytest.raises(ValueError, match="shapes must be equal"):
        merge_key_value(torch.zeros(2, 2), torch.zeros(1, 2))
