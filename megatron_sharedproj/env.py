"""What is installed and active: ``python -m megatron_sharedproj.env``.

Prints versions, how the extension was built, and which attention path a given shape takes and why. Imports
neither Megatron-Core nor Transformer Engine: their versions are read from the installed packages.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from megatron_sharedproj import __version__
from megatron_sharedproj.command_line import Parser, print_error
from megatron_sharedproj.cpu_linear import fp32_library
from megatron_sharedproj.ops import extension, paths
from megatron_sharedproj.variants import get_variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PACKAGES = ("megatron-core", "transformer-engine", "apex", "transformers", "lm-eval")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return names


def environment() -> dict[str, Any]:
    """Versions, hardware and the extension, as JSON types."""
    return {
        "megatron_sharedproj": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none",
        "threads": torch.get_num_threads(),
        "cpu_fp32_products": fp32_library(),
        "gpus": _gpus(),
        "packages": {package: _version(package) for package in PACKAGES},
        "extension": extension.BUILD_INFO or {"missing": extension.MISSING},
    }


def attention_paths(
    *, device: str, dtype: torch.dtype, head_size: int, seq_length: int, tied: bool, dropout: bool
) -> dict[str, str]:
    """Path and reason of a training step, a prefill and a decode step of one token.

    Raises:
        ValueError: for a device that is not there.
    """
    capability = None
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: no GPU is visible here; use cpu")
        capability = torch.cuda.get_device_capability()
    found = {}
    for step, queries, training in (
        ("train", seq_length, True), ("prefill", seq_length, False), ("decode", 1, False),
    ):  # fmt: skip
        request = paths.Request(
            device=device, dtype=dtype, head_size=head_size, tied=tied, queries=queries, keys=seq_length,
            training=training, dropout=dropout and training, capability=capability,
        )  # fmt: skip
        path = paths.choose(request)
        found[step] = f"{path.name} ({path.reason})"
    return found


def _lines(found: dict[str, Any], shape: str) -> list[str]:
    built = found["extension"]
    lines = [
        ("megatron_sharedproj", found["megatron_sharedproj"]),
        ("python", f"{found['python']}, {found['machine']}"),
        ("torch", f"{found['torch']}, CUDA {found['torch_cuda']}, {found['threads']} thread(s)"),
        ("CPU fp32 products", found["cpu_fp32_products"]),
        *found["packages"].items(),
        ("GPU", "; ".join(found["gpus"]) or "none visible"),
    ]
    if "missing" in built:
        hint = "in a source tree, python setup.py build_ext --inplace says why"
        lines.append(("extension", f"{built['missing']}: attention runs on SDPA ({hint})"))
    else:
        lines += [
            (
                "extension",
                f"mode {built['mode']}, built with torch {built['torch']}, compiler {built['compiler']}",
            ),
            ("  device code", built["cuda_architectures"] or "none"),
            ("  CPU kernels", built["cpu_capability"]),
        ]
    lines.append(("attention paths", shape))
    lines += [(f"  {step}", path) for step, path in found["attention_paths"].items()]
    return [f"{name:<21}{value}" for name, value in lines]


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, or 2 for a mistake in the flags."""
    parser = Parser(prog="python -m megatron_sharedproj.env", description=__doc__.splitlines()[0])
    parser.add_argument("--attention-variant", default="qk_eq_v", help="variant (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where a GPU is visible")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--head-size", type=int, default=64, help="elements of a head (default %(default)s)")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens (default %(default)s)")
    parser.add_argument("--attention-dropout", type=float, default=0.0, help="default %(default)s")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default %(default)s")
    try:
        args = parser.parse_args(argv)
        for flag in ("head_size", "seq_length"):
            if getattr(args, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
        variant = get_variant(args.attention_variant)
        found = environment()
        found["attention_paths"] = attention_paths(
            device=device,
            dtype=DTYPES[dtype],
            head_size=args.head_size,
            seq_length=args.seq_length,
            tied=variant.tied_kv,
            dropout=args.attention_dropout > 0,
        )
    except ValueError as error:
        print_error(error)
        return 2
    if args.format == "json":
        print(json.dumps(found, indent=2))
    else:
        shape = f"{variant.name}, {device}, {dtype}, head size {args.head_size}, sequence {args.seq_length}"
        print("\n".join(_lines(found, shape)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
