"""Build of the compiled extension; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "csrc" / "bindings.cpp").exists():
    print("megatron_sharedproj: no csrc/bindings.cpp in this tree: no extension, attention runs on SDPA")

setup()
