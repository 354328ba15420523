"""Tiny trained runs to damage, and the pickle that must never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tiny
from megatron_sharedproj.checkpointing import manifest


def run(tmp_path: Path, variant: str = "qk_eq_v", groups: int = 0, **changes: Any) -> Any:
    """A trained tiny run in tmp_path/run."""
    if not (tmp_path / "tiny_text_document.idx").exists():
        tiny.write_data(tmp_path)
    line = tiny.flags(
        tmp_path / "tiny_text_document",
        variant,
        groups,
        **{"train_iters": 2, "lr_warmup_iters": 1, "save": tmp_path / "run", **changes},
    )
    trainer = tiny.trainer(line)
    assert trainer.train() == 0
    trainer.log.close()
    return trainer


def sign(folder: Path) -> None:
    """Make the manifest agree with the files, as whoever changed them on purpose would."""
    names = [path.name for path in folder.iterdir() if path.name != manifest.MANIFEST]
    manifest.write_manifest(folder, {name: manifest.record_of(folder / name) for name in names})


class Payload:
    """Unpickled without a check, this would create a folder."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.target,))
