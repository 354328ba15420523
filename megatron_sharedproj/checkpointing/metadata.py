"""Reading torch's ``.metadata``, a pickle, with an unpickler that knows only what belongs there."""

from __future__ import annotations

import io
import pickle
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class _MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata with the classes it consists of, and refuses all others."""

    _MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
        "megatron.core.dist_checkpointing.strategies.torch",
    )
    _NAMES = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "list"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        # A dotted name could walk from an allowed module to any other.
        if "." not in name:
            found = super().find_class(module, name) if module in (*self._MODULES, "torch") else None
            # Dataclasses and enumerations: building one does nothing else.
            is_data_class = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
            is_data_class = is_data_class and module in self._MODULES
            is_plain = isinstance(found, _plain_torch_types())
            if is_data_class or is_plain or (module, name) in self._NAMES:
                return found if found is not None else super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")


def _plain_torch_types() -> tuple[type, ...]:
    import torch

    return (torch.dtype, torch.layout, torch.memory_format)


def read_metadata(folder: str | Path) -> Any:
    """torch.distributed.checkpoint Metadata of a checkpoint, through a restricted unpickler.

    torch's own reader unpickles this file with no restriction, so it is checked here first.

    Raises:
        ValueError: if the file holds anything but metadata, or names files outside of its folder.
    """
    path = Path(folder) / ".metadata"
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        names = {stored.relative_path for stored in (found.storage_data or {}).values()}
        tensors = found.state_dict_metadata
        if not isinstance(tensors, dict):
            raise pickle.UnpicklingError("it lists no tensors")
    except Exception as error:
        # A damaged pickle raises whatever its accidental opcodes lead to.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {path}: not checkpoint metadata ({reason}); refused") from None
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise ValueError(f"checkpoint {path}: names {foreign[0]!r}, outside of its folder; refused")
    return found
