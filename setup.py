"""Build of the compiled extension; everything else is in pyproject.toml.

SHAREDPROJ_BUILD: cuda (torch with CUDA), nvcc (any torch, nvcc present: the device code is inside but no
CUDA tensor can reach it), cpu (no device code) or none. Default: the best that the machine has.
SHAREDPROJ_CUDA_ARCHS: as TORCH_CUDA_ARCH_LIST, which it falls back to; default 8.0;9.0+PTX.
MAX_JOBS, NVCC_THREADS and CUDA_HOME as in torch.utils.cpp_extension.

The install never fails for want of the extension: one line says why it is missing, and attention runs on
SDPA.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
MODES = ("cuda", "nvcc", "cpu", "none")

# Flags of each instruction set that csrc/cpu/kernels.cpp is compiled for.
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}

# torch.utils.cpp_extension compiles with these: half-precision operators stay undefined in every mode.
NO_HALF_OPERATORS = (
    "-D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ "
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__"
)


class CannotBuild(Exception):
    """Why there will be no extension, in words for the user."""


def find_cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, or where nvcc says it is (on the PATH it may be a wrapper script)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, errors="replace"
    )
    found = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(found.group(1).strip()).resolve() if found else Path(nvcc).resolve().parent.parent


def choose_mode(torch_cuda: str | None, cuda_home: Path | None) -> str:
    """The build mode: SHAREDPROJ_BUILD if given, else the best that the machine has."""
    mode = os.environ.get("SHAREDPROJ_BUILD", "")
    if mode and mode not in MODES:
        raise CannotBuild(f"SHAREDPROJ_BUILD={mode}: use one of {', '.join(MODES)}")
    if mode == "none":
        raise CannotBuild("SHAREDPROJ_BUILD=none")
    if mode == "cuda" and torch_cuda is None:
        raise CannotBuild("SHAREDPROJ_BUILD=cuda: this torch is built without CUDA; use nvcc or cpu")
    if mode in ("cuda", "nvcc") and cuda_home is None:
        raise CannotBuild(f"SHAREDPROJ_BUILD={mode}: no nvcc on the PATH and no CUDA_HOME; use cpu")
    if mode:
        return mode
    if cuda_home is None:
        return "cpu"
    return "cuda" if torch_cuda else "nvcc"


def parse_architectures() -> tuple[str, list[str]]:
    """The architectures as text, and nvcc's flags for them."""
    name = "SHAREDPROJ_CUDA_ARCHS" if os.environ.get("SHAREDPROJ_CUDA_ARCHS") else "TORCH_CUDA_ARCH_LIST"
    text = os.environ.get(name) or DEFAULT_ARCHITECTURES
    flags, parsed = [], []
    for item in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None or int(match.group(1)) < 8:
            raise CannotBuild(f"{name}={text}: {item!r}: give architectures from 8.0 on, as 8.0;9.0+PTX")
        number = f"{match.group(1)}{match.group(2)}{match.group(3)}"
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
        parsed.append(item)
    return ";".join(parsed), flags


def extension_file() -> str:
    """Name of the extension's shared library for this Python."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


class Builder:
    """Writes the extension's build.ninja and runs it."""

    def __init__(self, output: Path, folder: Path):
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise CannotBuild(
                f"torch cannot be imported ({error}); install torch first, then with --no-build-isolation"
            ) from None
        self.output, self.folder = output, folder
        self.cuda_home = find_cuda_home()
        self.mode = choose_mode(torch.version.cuda, self.cuda_home)
        self.includes = [*include_paths(), sysconfig.get_paths()["include"]]
        self.libraries = library_paths()
        self.abi = int(torch.compiled_with_cxx11_abi())
        self.cxx = os.environ.get("CXX", "c++")
        if shutil.which(self.cxx) is None:
            raise CannotBuild(f"no C++ compiler ({self.cxx}); install g++ or set CXX")

    def ninja_file(self) -> str:
        torch_flags = " ".join(f"-isystem {path}" for path in self.includes)
        common = "-O3 -fPIC -fno-math-errno -fvisibility=hidden -DNDEBUG -Wall -Wextra"
        # GCC 12 sees uninitialised values in its own AVX-512 headers.
        kernels = f"{common} -std=c++17 -Wno-maybe-uninitialized -Wno-uninitialized"
        torch_cxx = (
            f"{common} -std=c++20 -fopenmp -Wno-unused-parameter -DTORCH_EXTENSION_NAME=_C "
            f"-D_GLIBCXX_USE_CXX11_ABI={self.abi} '-DSHAREDPROJ_MODE=\"{self.mode}\"' {torch_flags}"
        )
        link = [f"-L{path} -Wl,-rpath-link,{path}" for path in self.libraries]
        link.append("-lc10 -ltorch_cpu -ltorch -ltorch_python -fopenmp")
        lines = [
            "rule cxx",
            f"  command = {self.cxx} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $in $note",
            "rule nvcc",
            f"  command = {self.cuda_home}/bin/nvcc -MD -MF $out.d $flags -c $in -o $out 2> $out.log "
            "|| (cat $out.log && false)",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $in $note",
            "rule link",
            f"  command = {self.cxx} -shared $in $flags -o $out",
            "  description = linking $out",
        ]
        objects = []

        def compile_rule(rule: str, source: str, name: str, flags: str, note: str = "") -> None:
            lines.extend(
                [f"build {name}.o: {rule} {ROOT / 'csrc' / source}", f"  flags = {flags}", f"  note = {note}"]
            )
            objects.append(f"{name}.o")

        if self.mode != "cpu":
            text, architectures = parse_architectures()
            flags = (
                f"-O3 -std=c++17 --threads {os.environ.get('NVCC_THREADS', '2')} -Xcompiler -fPIC -Xptxas -v "
                f"-Xfatbin -compress-all {NO_HALF_OPERATORS} {' '.join(architectures)}"
            )
            compile_rule("nvcc", "shared_kv_attention.cu", "shared_kv_attention", flags, f"for {text}")
            torch_cxx += f" '-DSHAREDPROJ_ARCHITECTURES=\"{text}\"' -isystem {self.cuda_home}/include"
        if self.mode == "cuda":
            torch_cxx += " -DSHAREDPROJ_TORCH_CUDA"
            link.append(f"-lc10_cuda -ltorch_cuda -L{self.cuda_home}/lib64 -lcudart")
        elif self.mode == "nvcc":
            link.append(f"-L{self.cuda_home}/lib64 -lcudart_static -ldl -lrt -lpthread")
        compile_rule("cxx", "bindings.cpp", "bindings", torch_cxx)
        compile_rule("cxx", "shared_kv_attention_cpu.cpp", "shared_kv_attention_cpu", torch_cxx)
        for name, flags in INSTRUCTION_SETS.items():
            compile_rule(
                "cxx",
                "cpu/kernels.cpp",
                f"kernels_{name}",
                f"{kernels} {flags} -DSHAREDPROJ_ISA={name}",
                f"for {name}",
            )
        lines.extend([f"build {self.output.name}: link {' '.join(objects)}", f"  flags = {' '.join(link)}"])
        lines.append(f"default {self.output.name}")
        return "\n".join(lines) + "\n"

    def run(self) -> None:
        ninja = shutil.which(
            "ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        )
        if ninja is None:
            raise CannotBuild("no ninja; pip install ninja")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(self.ninja_file())
        command = [ninja, "-C", str(self.folder)]
        jobs = os.environ.get("MAX_JOBS")
        if jobs:
            command += ["-j", jobs]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        log = self.folder / "build.log"
        log.write_text(result.stdout + result.stderr)
        if result.returncode:
            errors = re.findall(r"^.*\b(?:error|fatal)\s*: .*$", log.read_text(), re.MULTILINE)
            raise CannotBuild(f"{(errors or ['the build failed'])[0].strip()} (whole log: {log})")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.folder / self.output.name, self.output)


class BuildExtension(build_ext):
    """Builds by ninja, so that an install without changes compiles nothing."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not setuptools' build_temp: an editable install puts that into a fresh temporary folder each time.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        try:
            builder = Builder(output, ROOT / "build" / f"extension-{tag}")
            builder.run()
            print(f"megatron_sharedproj: extension built, mode {builder.mode}")
        except CannotBuild as reason:
            # A binary of other sources would be worse than none.
            for stale in {output, ROOT / "megatron_sharedproj" / extension_file()}:
                stale.unlink(missing_ok=True)
            print(
                f"megatron_sharedproj: extension not built, attention runs on SDPA: {reason}", file=sys.stderr
            )


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:  # pyproject.toml's license field needs it
        sys.exit(
            f"error: setuptools {setuptools.__version__}: 77 or later is needed (pip install -U setuptools)"
        )
    setup(
        ext_modules=[Extension("megatron_sharedproj._C", [], optional=True)],
        cmdclass={"build_ext": BuildExtension},
    )
