"""What decides the order and the contents of training samples, as JSON: a resume compares it.

Folders do not count: the same files elsewhere are the same data. Nor does --train-iters, although
Megatron-Core shuffles anew when it asks for more epochs; the trainer notes that by itself.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_sharedproj.config import DataConfig, TrainConfig
from megatron_sharedproj.data.datasets import split_shares
from megatron_sharedproj.data.token_file import open_indexed

OVERRIDE = "--override-data-fingerprint"
# Read whole up to this size. An .idx has 20 bytes per document, SlimPajama's 12 GB: of that, pieces. Byte
# offsets add up along it, so a document of another length changes every piece behind it.
_WHOLE = 32 << 20
_PIECES = 64


def file_digest(path: str | Path, whole: int = _WHOLE) -> str:
    """SHA-256 of a file and its size; of one above ``whole`` bytes, of evenly spaced pieces of it."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as stream:
        if size <= whole:
            digest.update(stream.read())
        else:
            piece = whole // _PIECES
            for index in range(_PIECES):
                stream.seek((size - piece) * index // (_PIECES - 1))
                digest.update(stream.read(piece))
    return digest.hexdigest()


def fingerprint(data: DataConfig, train: TrainConfig, blends: list[Any]) -> dict[str, Any]:
    """The identity of a run's training data.

    Args:
        blends: from :func:`megatron_sharedproj.data.datasets.resolve_blends`.
    Returns:
        JSON-ready: settings under their flags' names, and ``sets``: of each token file its name (for messages
        only), documents, tokens, digests of .idx and .bin, and its share of the blend.
    """
    found: dict[str, Any] = {
        "seq_length": train.seq_length,
        "seed": train.seed,
        "data_protocol": data.data_protocol,
    }
    if not blends:
        return {**found, "mock_data": True, "sets": []}
    if len(blends) == 1:
        found["split"] = [round(share, 9) for share in split_shares(data.split)]
    prefixes, weights = blends[0]
    total = sum(weights) if weights else 1.0
    shares = [round(weight / total, 9) for weight in weights] if weights else [1.0]
    sets = []
    for prefix, share in zip(prefixes, shares, strict=True):
        file = open_indexed(prefix)
        sets.append(
            {
                "name": Path(prefix).name,
                "documents": int(file.documents),
                "tokens": int(file.tokens),
                "idx": file_digest(f"{prefix}.idx"),
                # A look at the tokens: other ones may have the same lengths.
                "bin": file_digest(f"{prefix}.bin", _WHOLE // 32),
                "share": share,
            }
        )
    return {**found, "mock_data": False, "sets": sets}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; nothing where the data are the same."""
    found = []
    for name in ("seq_length", "seed", "data_protocol", "split", "mock_data"):
        if saved.get(name) != now.get(name):
            flag = "--" + name.replace("_", "-")
            found.append(f"{flag} was {_words(saved.get(name))}, now {_words(now.get(name))}")
    before, after = saved.get("sets", []), now.get("sets", [])
    if len(before) != len(after):
        return [
            *found,
            f"there were {len(before)} data set(s) ({_names(before)}), now {len(after)} ({_names(after)})",
        ]
    for old, new in zip(before, after, strict=True):
        if (old["documents"], old["tokens"]) != (new["documents"], new["tokens"]):
            found.append(f"data set {_describe(old)} is now {_describe(new)}")
        elif (old["idx"], old["bin"]) != (new["idx"], new["bin"]):
            found.append(f"data set {_describe(old)} is now {new['name']}, as large, with other contents")
        if old["share"] != new["share"]:
            found.append(f"the share of {old['name']} was {old['share']:.6g}, now {new['share']:.6g}")
    return found


def check_same_data(saved: dict[str, Any] | None, now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other training data than a checkpoint's.

    Args:
        saved: the checkpoint's, or None for one that has none (an older version's).
    Raises:
        ValueError: listing what differs.
    """
    changed = differences(saved, now) if saved else []
    if changed:
        raise ValueError(
            f"--data-path: not what the checkpoint in {folder} was trained on: {'; '.join(changed)}"
            f"; give the same data, or {OVERRIDE}, or --finetune into another --save folder"
        )


def _words(value: Any) -> str:
    return ",".join(f"{share:.6g}" for share in value) if isinstance(value, list) else str(value)


def _names(sets: list[dict[str, Any]]) -> str:
    return ", ".join(one["name"] for one in sets[:4]) + (", ..." if len(sets) > 4 else "")


def _describe(one: dict[str, Any]) -> str:
    return f"{one['name']} ({one['documents']} documents, {one['tokens']} tokens)"
