"""GPUs by name: memory, dense bf16 peak, memory bandwidth.

Bytes, FLOP/s and bytes/s.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from megatron_sharedproj import formulas

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU, or what a user says of one.

    Attributes:
        name: value of --gpu.
        memory: bytes that a process can use; None: not given.
        peak: dense bf16 (V100: fp16) FLOP/s of the tensor cores; None: not given.
        bandwidth: bytes/s of its memory; None: not given.
    """

    name: str
    memory: int | None = None
    peak: float | None = None
    bandwidth: float | None = None


# Name: GiB that the driver gives to processes (the total of torch.cuda.mem_get_info, rounded down: data
# sheets count in 10^9, and ECC and the driver keep a part), the peak's name in formulas.PEAK_BF16_FLOPS, and
# GB/s. Peaks without sparsity and bandwidths are those of NVIDIA's data sheets of each product: A100 (2021),
# H100 (2023, its SXM, PCIe and NVL columns), H200 (2024), L40S (2023), A10 (2021), V100 (2020).
_TABLE = {
    "A100-40GB": (39.3, "A100", 1555),
    "A100-40GB-PCIe": (39.3, "A100", 1555),
    "A100-80GB": (79.1, "A100", 2039),
    "A100-80GB-PCIe": (79.1, "A100", 1935),
    "H100-80GB": (79.1, "H100", 3350),
    "H100-80GB-PCIe": (79.1, "H100 PCIe", 2000),
    "H100-94GB-NVL": (93.0, "H100 NVL", 3900),
    "H200-141GB": (139.8, "H200", 4800),
    "L40S-48GB": (44.4, "L40S", 864),
    "A10-24GB": (22.0, "A10", 600),
    "V100-16GB": (15.7, "V100", 900),
    "V100-32GB": (31.7, "V100", 900),
}
GPUS: dict[str, Gpu] = {
    name: Gpu(name, int(gib * GIB), formulas.PEAK_BF16_FLOPS[peak], bandwidth * 1e9)
    for name, (gib, peak, bandwidth) in _TABLE.items()
}

_CLOSE, _MOST = 0.65, 4  # likeness of a name that may be meant, and how many of them are told

# Words of product names that are in no name above, and that tell no two of them apart.
_NOISE = {
    "nvidia",
    "tesla",
    "graphics",
    "gpu",
    "sxm",
    "sxm2",
    "sxm4",
    "sxm5",
    "hbm2",
    "hbm2e",
    "hbm3",
    "hbm3e",
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, as in the table or as drivers and data sheets write it.

    "H200" finds the only one of that kind; "A100" does not, since two have other memories.

    Raises:
        ValueError: for a name that is unknown or of several GPUs, listing those that are close.
    """
    words = _words(name)
    if words:
        exact = [gpu for gpu in GPUS.values() if _words(gpu.name) == words]
        found = exact or [gpu for gpu in GPUS.values() if words <= _words(gpu.name)]
        # The plain product is meant where its PCIe or NVL form is not named.
        plain = [gpu for gpu in found if not {"pcie", "nvl"} & (_words(gpu.name) - words)]
        if len(plain or found) == 1:
            return (plain or found)[0]
        if found:
            names = ", ".join(gpu.name for gpu in found)
            raise ValueError(f"--gpu {name}: several are named so; choose one of {names}")
    close = sorted(
        (known for known in GPUS if _likeness(name, known) >= _CLOSE),
        key=lambda known: -_likeness(name, known),
    )[:_MOST]
    hint = f"did you mean {' or '.join(close)}? known" if close else "known"
    raise ValueError(
        f"--gpu {name}: unknown; {hint}: {', '.join(GPUS)}; for others give the figures (--memory-gib, "
        "--peak-tflops, --bandwidth-gbs)"
    )


def _likeness(name: str, known: str) -> float:
    """From 0 to 1, of the whole name or of the product's alone."""
    return max(
        difflib.SequenceMatcher(None, name.lower(), other).ratio()
        for other in (known.lower(), known.lower().partition("-")[0])
    )


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower())) - _NOISE
