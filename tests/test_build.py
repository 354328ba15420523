"""setup.py: what is built where, and that no failure fails the install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import load

ROOT = Path(__file__).resolve().parents[1]


setup = load("setup.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads: a failing build deletes the binary of its own tree."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "megatron_sharedproj").mkdir()
    shutil.copy(ROOT / "megatron_sharedproj" / "__init__.py", tmp_path / "megatron_sharedproj")
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SHAREDPROJ_", "TORCH_CUDA_ARCH"))}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "wanted, torch_cuda, nvcc, mode",
    [
        ("", None, False, "cpu"),
        ("", None, True, "nvcc"),
        ("", "13.0", True, "cuda"),
        ("", "13.0", False, "cpu"),
        ("cpu", "13.0", True, "cpu"),
        ("nvcc", "13.0", True, "nvcc"),
    ],
)
def test_mode(monkeypatch: Any, wanted: str, torch_cuda: str | None, nvcc: bool, mode: str) -> None:
    monkeypatch.setenv("SHAREDPROJ_BUILD", wanted)
    assert setup.choose_mode(torch_cuda, ROOT if nvcc else None) == mode


@pytest.mark.parametrize(
    "ours, torchs, text, flags",
    [
        (None, None, "8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        (None, "8.6", "8.6", ["sm_86"]),
        ("9.0a", "8.6", "9.0a", ["sm_90a"]),
        ("8.0, 10.0+PTX", None, "8.0;10.0+PTX", ["sm_80", "sm_100", "compute_100"]),
    ],
)
def test_architectures(
    monkeypatch: Any, ours: str | None, torchs: str | None, text: str, flags: list[str]
) -> None:
    for name, value in (("SHAREDPROJ_CUDA_ARCHS", ours), ("TORCH_CUDA_ARCH_LIST", torchs)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    found, options = setup.parse_architectures()
    assert found == text
    assert [option.split("code=")[1] for option in options] == flags


@pytest.mark.parametrize("value", ["7.5", "Ampere", "sm_80", "8.0;;x"])
def test_architectures_that_are_none(monkeypatch: Any, value: str) -> None:
    monkeypatch.setenv("SHAREDPROJ_CUDA_ARCHS", value)
    with pytest.raises(
        setup.CannotBuild, match=f"SHAREDPROJ_CUDA_ARCHS={value}: .* give architectures from 8.0"
    ):
        setup.parse_architectures()


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"SHAREDPROJ_BUILD": "fast"}, "SHAREDPROJ_BUILD=fast: use one of cuda, nvcc, cpu, none"),
        ({"SHAREDPROJ_BUILD": "none"}, "SHAREDPROJ_BUILD=none"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler)"),
    ],
)
def test_a_failure_is_one_line_and_no_failed_install(
    tree: Path, environment: dict[str, str], reason: str
) -> None:
    stale = tree / "megatron_sharedproj" / Path(setup.extension_file())
    stale.write_bytes(b"of other sources")
    done = build(tree, **environment)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == [
        f"megatron_sharedproj: extension not built, attention runs on SDPA: {lines[0].split(': ', 2)[2]}"
    ]
    assert reason in lines[0]
    assert not stale.exists()


def test_a_compiler_error_names_itself_and_the_log(tree: Path) -> None:
    (tree / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    done = build(tree, SHAREDPROJ_BUILD="cpu", MAX_JOBS="1")
    assert done.returncode == 0
    assert "broken on purpose" in done.stderr and "build.log" in done.stderr
    assert not list((tree / "megatron_sharedproj").glob("*.so"))


@pytest.mark.slow
def test_cpu_build_runs_and_a_second_one_compiles_nothing(tree: Path) -> None:
    done = build(tree, SHAREDPROJ_BUILD="cpu")
    assert "extension built, mode cpu" in done.stdout, done.stderr
    code = (
        "import torch, megatron_sharedproj._C as c; q = torch.ones(1, 3, 2, 16); "
        "o, _ = torch.ops.megatron_sharedproj.attention(q, q, None, True, 1.0); "
        "assert torch.equal(o, q); print(c.build_info()['mode'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert ran.stdout.strip() == "cpu", ran.stderr
    again = build(tree, SHAREDPROJ_BUILD="cpu")
    assert "extension built, mode cpu" in again.stdout
    (log,) = (tree / "build").glob("extension-*/build.log")
    assert "no work to do" in log.read_text()
