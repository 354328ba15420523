"""The run's tokenizer as the files that transformers, lm-eval and serving engines load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_sharedproj.data.tokenizers import SlowTokenizer, Tokenizer

# What of the original tokenizer_config.json says something about text; its class and file names do not.
_KEPT = (
    "add_prefix_space", "bos_token", "chat_template", "clean_up_tokenization_spaces", "pad_token",
    "unk_token",
)  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, source: str, folder: Path, positions: int) -> dict[str, int | None]:
    """Write tokenizer.json and tokenizer_config.json (nothing for a NullTokenizer, which is no text's).

    Args:
        source: folder, or file in it, that the tokenizer was loaded from (its special tokens and chat
            template are kept).
        positions: the model's positions, for ``model_max_length``.
    Returns:
        eos_token_id, bos_token_id and pad_token_id for the model's configuration.
    """
    ids: dict[str, int | None] = {
        "eos_token_id": tokenizer.eod,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad if tokenizer.pad >= 0 else None,
    }
    if isinstance(tokenizer, SlowTokenizer):
        tokenizer.save(folder)
        return ids
    text = tokenizer.to_json()
    if text is None:
        return ids
    described = json.loads(text)
    # Training data are encoded without added tokens; a template would put BOS before every text.
    if (described.get("post_processor") or {}).get("type") != "ByteLevel":
        described["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    known = _known(described)
    by_id = {index: token for token, index in known.items()}
    values: dict[str, Any] = _original(source)
    for role in ("bos_token", "pad_token", "unk_token"):
        # transformers would give a token that is not in the vocabulary an id that the model has no row for.
        if role in values and _content(values[role]) not in known:
            del values[role]
    values.update(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=by_id[tokenizer.eod],
        model_max_length=positions,
    )
    values.setdefault("bos_token", values["eos_token"])
    if tokenizer.pad >= 0:
        values.setdefault("pad_token", by_id[tokenizer.pad])
    values.setdefault("clean_up_tokenization_spaces", False)
    ids["bos_token_id"] = known[_content(values["bos_token"])]
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if source and (template := _folder(source) / "chat_template.jinja").is_file():
        shutil.copy(template, folder)
    return ids


def _known(described: dict[str, Any]) -> dict[str, int]:
    """Every token of a parsed tokenizer.json with its id."""
    vocabulary = described["model"]["vocab"]  # a list of [token, score] in a Unigram model
    known = (
        vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    )
    return {**known, **{added["content"]: added["id"] for added in described.get("added_tokens", [])}}


def _folder(source: str) -> Path:
    return Path(source).parent if Path(source).is_file() else Path(source)


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _original(source: str) -> dict[str, Any]:
    file = _folder(source) / "tokenizer_config.json"
    if not source or not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    return {key: values[key] for key in _KEPT if values.get(key) is not None}
