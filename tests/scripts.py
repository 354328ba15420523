"""Loads the command lines of tools/ and benchmarks/, which are files and no package."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def load(script: str) -> Any:
    """A new module of a script, "tools/profile.py" for example; sys.path stays as it is."""
    # Not by its own name: tools/profile.py is not Python's `profile`.
    name = f"script_{Path(script).stem}"
    spec = spec_from_file_location(name, _ROOT / script)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module
