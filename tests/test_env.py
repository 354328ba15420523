"""python -m megatron_sharedproj.env: what it prints, and its one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_sharedproj import __version__, cpu_linear, env
from megatron_sharedproj.ops import extension


def run(capsys: Any, *flags: str) -> tuple[int, str, str]:
    code = env.main(list(flags))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text(capsys: Any) -> None:
    code, out, _ = run(
        capsys, "--device", "cpu", "--dtype", "fp32", "--head-size", "32", "--seq-length", "128"
    )
    assert code == 0
    lines = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith(" "))
    assert lines["megatron_sharedproj"] == __version__
    assert lines["torch"].startswith(torch.__version__)
    assert f"\nCPU fp32 products    {cpu_linear.fp32_library()}\n" in out
    assert "qk_eq_v, cpu, fp32, head size 32, sequence 128" in out
    for step in ("train", "prefill", "decode"):
        assert f"\n  {step} " in out


def test_json_says_what_the_op_does(capsys: Any) -> None:
    code, out, _ = run(capsys, "--device", "cpu", "--format", "json", "--dtype", "bf16")
    found = json.loads(out)
    assert code == 0
    assert found["cpu_fp32_products"] == cpu_linear.fp32_library()
    assert found["extension"] == (extension.BUILD_INFO or {"missing": extension.MISSING})
    expected = "sdpa" if extension.MISSING else "extension"
    assert all(path.startswith(expected) for path in found["attention_paths"].values())


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--dtype", "fp64"], "float64 on a CPU"),
        (["--dtype", "fp16"], "float16 on a CPU"),
        (["--head-size", "20"], "head size 20 on a CPU"),
        (["--head-size", "264"], "head size 264 on a CPU"),
    ],
)
@pytest.mark.skipif(bool(extension.MISSING), reason=extension.MISSING)
def test_a_fallback_names_its_reason(capsys: Any, flags: list[str], reason: str) -> None:
    _, out, _ = run(capsys, "--device", "cpu", *flags)
    assert out.count("sdpa (") == 3 and reason in out


@pytest.mark.skipif(bool(extension.MISSING), reason=extension.MISSING)
def test_dropout_is_of_training_only(capsys: Any) -> None:
    _, out, _ = run(capsys, "--device", "cpu", "--attention-dropout", "0.1", "--format", "json")
    paths = json.loads(out)["attention_paths"]
    assert paths["train"].startswith("sdpa (attention dropout")
    assert paths["prefill"].startswith("extension") and paths["decode"].startswith("extension")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
        (["--attention-variant", "kqv"], "kqv"),
    ],
)
def test_a_mistake_is_one_line(capsys: Any, flags: list[str], words: str) -> None:
    code, out, err = run(capsys, *flags)
    assert code == 2 and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and words in err


def test_imports_neither_megatron_nor_transformer_engine() -> None:
    code = (
        "import sys, megatron_sharedproj.env as e; e.main(['--device', 'cpu']); "
        "print([m for m in sys.modules if m.startswith(('megatron.', 'transformer_engine'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
