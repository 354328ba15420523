"""Layouts on GPUs: over NCCL where there are several, over gloo with two processes on one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layouts_worker import DEEP, FEW_GROUPS, LAYOUTS, MODELS, SAVED_AT, TIED, launch

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a GPU")]
# No GPU has run this yet; on CPUs it is 2.2e-6, and a GPU's sums are cut differently for each shape.
TOLERANCE = 1e-4
# Layout -> the one that it equals. gloo has no reduce-scatter and no point-to-point for a GPU's tensors.
OVER_GLOO = {"TP2": "TP1", "DP2": "TP1", "DP2+overlap": "TP1"}
OVER_NCCL = {
    **OVER_GLOO, "TP2+SP": "TP1", "CP2": "TP1", "PP2": "one", "PP2 interleaved": "one", "TP2xDP2": "TP1",
    "TP4 few groups": "TP1", "TP2xPP2": "one", "TP2xPP2+SP": "one", "PP2 interleaved xDP2": "one",
    "PP2 interleaved xDP2 sharded": "one", "TP2xDP2 sharded": "one",
}  # fmt: skip
FITTING = {layout: base for layout, base in OVER_NCCL.items() if LAYOUTS[layout].ranks <= GPUS}


@pytest.fixture(scope="module")
def over_nccl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("nccl"), ["TP1", "one", *FITTING], "nccl")


@pytest.fixture(scope="module")
def over_gloo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("gloo"), ["TP1", *OVER_GLOO], "gloo")


def assert_equal(found: dict[str, Any], layout: str, base: str) -> None:
    """Loss and gradient norm of every step of every model are those of one process."""
    compared = 0
    for model, expected in found[base].items():
        for name, history in found[layout].items():
            start = {model: 0, f"{model} from {base}": SAVED_AT}.get(name)
            if start is None or name in ("streams", "weights", "waiting"):
                continue
            for mine, theirs in zip(history, expected[start:], strict=True):
                assert mine == pytest.approx(theirs, rel=TOLERANCE), (layout, name)
            compared += 1
    models = {"TP4 few groups": FEW_GROUPS, "PP2 interleaved xDP2 sharded": TIED, "TP2xDP2 sharded": TIED}
    assert compared >= len(models.get(layout, MODELS if base == "TP1" else DEEP))


@pytest.mark.skipif(GPUS < 2, reason="needs several GPUs")
@pytest.mark.parametrize("layout", OVER_NCCL)
def test_layout_over_nccl_equals_one_process(over_nccl: dict[str, Any], layout: str) -> None:
    if layout not in FITTING:
        pytest.skip(f"needs {LAYOUTS[layout].ranks} GPUs")
    assert_equal(over_nccl, layout, OVER_NCCL[layout])


@pytest.mark.parametrize("layout", OVER_GLOO)
def test_two_processes_on_one_gpu_equal_one_process(over_gloo: dict[str, Any], layout: str) -> None:
    assert_equal(over_gloo, layout, OVER_GLOO[layout])
