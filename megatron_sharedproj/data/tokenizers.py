"""Tokenizers under Megatron-LM's type names, over the Rust `tokenizers` library.

Text is untrusted: a document that spells `<|endoftext|>` is encoded as the plain characters, never as the
special token, so that the only end-of-document ids in a token file are those that the preprocessor appends.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer", "NullTokenizer")
_EOS_CANDIDATES = (END_OF_TEXT, "</s>")


def _library() -> Any:
    """The Rust tokenizers library, which the base install does not have."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("tokenizers is not installed; install the [hf] or [data] extra") from None
    return tokenizers


class Tokenizer(ABC):
    """What the preprocessor, Megatron-Core's GPTDatasetConfig and the evaluators need of a tokenizer.

    Attributes:
        vocab_size: number of ids, added tokens included; every id is below it.
        eod: id that ends a document (the EOS token); `eos` is the same id.
        pad: id of the pad token, or -1 when there is none of its own. Megatron-Core masks the loss where a
            label equals `pad`, so a pad token equal to EOS (a common setting) is reported as -1.
        sha256: hex digest of the vocabulary's file(s).
    """

    def __init__(self, name: str, vocab_size: int, eod: int, pad: int, sha256: str) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.eod = eod
        self.pad = pad if pad != eod else -1
        self.sha256 = sha256

    @property
    def eos(self) -> int:
        return self.eod

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What Megatron-Core puts into the hash that names a dataset's cached index files."""
        return OrderedDict([("class", type(self).__name__), ("sha256", self.sha256), ("eod", self.eod)])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any added special token."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text. Raises ValueError where a text cannot be encoded (NullTokenizer only)."""

    def encode_batch_parsing_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text where a spelled special token becomes its id: for trusted text only."""
        return self.encode_batch(texts)

    def to_json(self) -> str | None:
        """The tokenizer.json text for other libraries to load; None where the Rust library has no part."""
        return None

    def special_tokens(self) -> dict[str, int]:
        """Id of each special token by its spelling; empty where text cannot spell one."""
        return {}

    def added_tokens(self) -> list[str]:
        """Spellings of all added tokens, special or not, by rising id."""
        return list(self.special_tokens())

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""

    def byte_lengths(self) -> NDArray[np.int32] | None:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for; None unless byte-level BPE.

        Special tokens stand for 0 bytes. Summed over `encode(text)` it is `len(text.encode())`, unless the
        tokenizer normalizes or prefixes text.
        """
        return None

    def describe(self) -> str:
        """One line for logs and manifests."""
        return f"{self.name}: vocab_size {self.vocab_size}, eod {self.eod}, sha256 {self.sha256[:16]}"


class BPETokenizer(Tokenizer):
    """A tokenizer of the Rust library (byte-level BPE, or whatever a tokenizer.json describes)."""

    def __init__(self, name: str, rust: Any, eos: str, pad: str | None, sha256: str) -> None:
        eod = rust.token_to_id(eos)
        if eod is None:
            raise ValueError(f"EOS token {eos!r} is not in the vocabulary of {name}; correct eos_token there")
        # A tokenizer.json may cut or pad what it encodes, and may hold EOS as an ordinary added token.
        rust.no_truncation()
        rust.no_padding()
        rust.add_special_tokens([_library().AddedToken(eos, special=True, normalized=False)])
        rust.encode_special_tokens = True
        pad_id = rust.token_to_id(pad) if pad is not None else None
        # Not get_vocab_size(): ids may have gaps, and every id has to be below vocab_size.
        vocab_size = max(rust.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(name, vocab_size, eod, -1 if pad_id is None else pad_id, sha256)
        self._rust = rust
        self._encode_batch = getattr(rust, "encode_batch_fast", rust.encode_batch)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encode_batch(list(texts), add_special_tokens=False)]

    def encode_batch_parsing_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        self._rust.encode_special_tokens = False
        try:
            return self.encode_batch(texts)
        finally:
            self._rust.encode_special_tokens = True

    def to_json(self) -> str | None:
        return str(self._rust.to_str())

    def special_tokens(self) -> dict[str, int]:
        added = self._rust.get_added_tokens_decoder()
        return {token.content: index for index, token in sorted(added.items()) if token.special}

    def added_tokens(self) -> list[str]:
        return [token.content for _, token in sorted(self._rust.get_added_tokens_decoder().items())]

    def decode(self, ids: Sequence[int]) -> str:
        return self._rust.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> NDArray[np.int32] | None:
        if not _is_byte_level(json.loads(self._rust.to_str())):
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self._rust.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # one character of the ByteLevel alphabet is one byte
        for index, added in self._rust.get_added_tokens_decoder().items():
            # An added token that is not special (GPT-NeoX's runs of spaces) is written as plain text.
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths


class SlowTokenizer(Tokenizer):
    """A transformers tokenizer that has no Rust twin (SentencePiece or Python only)."""

    def __init__(self, name: str, slow: Any, sha256: str) -> None:
        if slow.eos_token_id is None:
            raise ValueError(f"{name} has no EOS token; set eos_token in its tokenizer_config.json")
        pad = -1 if slow.pad_token_id is None else int(slow.pad_token_id)
        super().__init__(name, len(slow), int(slow.eos_token_id), pad, sha256)
        self._slow = slow

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            self._slow.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts
        ]

    def encode_batch_parsing_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._slow.encode(text, add_special_tokens=False) for text in texts]

    def save(self, folder: str | Path) -> None:
        """Write the files that transformers loads it from."""
        self._slow.save_pretrained(str(folder))

    def special_tokens(self) -> dict[str, int]:
        return dict(zip(self._slow.all_special_tokens, self._slow.all_special_ids, strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._slow.decode(list(ids), skip_special_tokens=False))


class NullTokenizer(Tokenizer):
    """Text is space-separated ids in [0, vocab_size - 1); eod = vocab_size - 1, which text cannot spell.

    `vocab_size` counts the eod: Megatron-LM releases differ on this by one.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 2:
            raise ValueError(f"NullTokenizer needs a vocabulary of 2 ids or more, got {vocab_size}")
        digest = hashlib.sha256(f"NullTokenizer {vocab_size}".encode()).hexdigest()
        super().__init__("NullTokenizer", vocab_size, vocab_size - 1, -1, digest)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = [[int(word) for word in text.split()] for text in texts]
        for index in (index for ids in batch for index in ids):
            if not 0 <= index < self.eod:
                raise ValueError(f"id {index} is outside [0, {self.eod})")
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(index)) for index in ids)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Build a tokenizer by Megatron-LM's type name.

    HuggingFaceTokenizer: `tokenizer_model` is a directory with tokenizer.json (or vocab.json and merges.txt),
        a tokenizer.json, or anything else that transformers.AutoTokenizer loads.
    GPT2BPETokenizer: `vocab_file` and `merge_file`, or `tokenizer_model` = a directory that holds them as
        vocab.json/merges.txt or encoder.json/vocab.bpe.
    NullTokenizer: `vocab_size` ids, the last of which is the eod.

    Raises ValueError naming the flag, its value, and what would work.
    """
    try:
        return _build(tokenizer_type, tokenizer_model, vocab_file, merge_file, vocab_size)
    except ValueError as error:
        flag = (
            f"--tokenizer-model {tokenizer_model}"
            if tokenizer_model
            else f"--tokenizer-type {tokenizer_type}"
        )
        raise ValueError(f"{flag}: {error}") from None


def _build(
    tokenizer_type: str,
    tokenizer_model: str | None,
    vocab_file: str | None,
    merge_file: str | None,
    vocab_size: int | None,
) -> Tokenizer:
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise ValueError("NullTokenizer needs --vocab-size")
        return NullTokenizer(vocab_size)
    if tokenizer_type == "GPT2BPETokenizer":
        return _build_gpt2(tokenizer_model, vocab_file, merge_file)
    if tokenizer_type == "HuggingFaceTokenizer":
        if tokenizer_model is None:
            raise ValueError("HuggingFaceTokenizer needs --tokenizer-model DIR (with a tokenizer.json)")
        return _build_hugging_face(tokenizer_model)
    raise ValueError(f"unknown tokenizer type {tokenizer_type!r}; use one of {', '.join(TOKENIZER_TYPES)}")


def padded_vocab_size(vocab_size: int, make_divisible_by: int = 128) -> int:
    """`vocab_size` rounded up to a multiple: 50257 -> 50304. Independent of the tensor-parallel size."""
    if vocab_size < 1 or make_divisible_by < 1:
        raise ValueError(f"vocab_size {vocab_size}, make_divisible_by {make_divisible_by}: not positive")
    return -(-vocab_size // make_divisible_by) * make_divisible_by


def train_bpe(texts: Iterable[str], vocab_size: int, output_dir: str | Path) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) and write a Hugging Face tokenizer directory.

    The directory loads here and in transformers.AutoTokenizer. `<|endoftext|>` (id 0) is EOS, BOS and unk.
    The vocabulary is smaller than `vocab_size` where the text has too few distinct pairs to merge.
    Raises ValueError below 257 ids (256 bytes and EOS).
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small; a byte-level BPE needs 257 or more")
    library = _library()
    rust = library.Tokenizer(library.models.BPE())
    _make_byte_level(rust)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    rust.save(str(output / "tokenizer.json"))
    return _build_hugging_face(str(output))


def _build_gpt2(model: str | None, vocab_file: str | None, merge_file: str | None) -> Tokenizer:
    if model is not None and vocab_file is None and merge_file is None:
        found = _find_vocab_and_merges(Path(model))
        if found is None:
            raise ValueError(f"{model} holds neither vocab.json + merges.txt nor encoder.json + vocab.bpe")
        return _load_bpe("GPT2BPETokenizer", *found, eos=END_OF_TEXT, pad=None)
    if vocab_file is None or merge_file is None:
        raise ValueError("GPT2BPETokenizer needs --vocab-file and --merge-file, or --tokenizer-model DIR")
    return _load_bpe("GPT2BPETokenizer", Path(vocab_file), Path(merge_file), eos=END_OF_TEXT, pad=None)


def _build_hugging_face(model: str) -> Tokenizer:
    path = Path(model)
    name = f"HuggingFaceTokenizer {path.name}"
    directory = path.parent if path.is_file() else path
    file = path if path.is_file() else path / "tokenizer.json"
    if file.is_file():
        try:
            rust = _library().Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        return BPETokenizer(name, rust, *_configured_tokens(directory, rust, file), _sha256(file))
    found = _find_vocab_and_merges(directory)
    if found is not None:
        return _load_bpe(name, *found, *_configured_tokens(directory, None, found[0]))
    return _build_with_transformers(name, model)


def _build_with_transformers(name: str, model: str) -> Tokenizer:
    # A Hub id is `name` or `owner/name`; anything else is a path, and a typo in one is no Hub look-up.
    is_path = model.startswith((".", "~", "/")) or model.count("/") > 1 or model.endswith((".json", "/"))
    if is_path and not Path(model).exists():
        raise ValueError("no such file or directory; give a directory with a tokenizer.json, or a Hub name")
    from transformers import AutoTokenizer  # slow import: only where nothing else can load the model

    try:
        loaded: Any = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # its loaders raise many types
        raise ValueError(
            f"{model}: no tokenizer.json or vocab.json + merges.txt there, and transformers cannot load it"
            f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error
    rust = getattr(loaded, "backend_tokenizer", None)
    if rust is None:
        vocabulary = json.dumps(sorted(loaded.get_vocab().items()))
        return SlowTokenizer(name, loaded, hashlib.sha256(vocabulary.encode()).hexdigest())
    if loaded.eos_token is None:
        raise ValueError(f"{name} has no EOS token; set eos_token in its tokenizer_config.json")
    digest = hashlib.sha256(rust.to_str().encode()).hexdigest()
    return BPETokenizer(name, rust, str(loaded.eos_token), loaded.pad_token, digest)


def _load_bpe(name: str, vocab: Path, merges: Path, eos: str, pad: str | None) -> Tokenizer:
    for file in (vocab, merges):
        if not file.is_file():
            raise ValueError(f"no such file: {file}")
    try:
        rust = _library().Tokenizer(_library().models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{vocab} and {merges} are not a BPE vocabulary and merges: {error}") from error
    if rust.token_to_id(eos) is None:
        raise ValueError(f"{vocab} has no {eos!r} token, which ends a document; add it or use another file")
    _make_byte_level(rust)
    return BPETokenizer(name, rust, eos, pad, _sha256(vocab, merges))


def _make_byte_level(rust: Any) -> None:
    rust.pre_tokenizer = _library().pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = _library().decoders.ByteLevel()


def _find_vocab_and_merges(directory: Path) -> tuple[Path, Path] | None:
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (directory / vocab).is_file() and (directory / merges).is_file():
            return directory / vocab, directory / merges
    return None


def _configured_tokens(directory: Path, rust: Any, file: Path) -> tuple[str, str | None]:
    """(EOS, pad or None): tokenizer_config.json, else special_tokens_map.json, else well-known names."""
    found: dict[str, str] = {}
    for config in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
        if not config.is_file():
            continue
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is not valid JSON: {error}") from error
        for key in ("eos_token", "pad_token"):
            value = values.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found.setdefault(key, content)
    if "eos_token" not in found:
        vocabulary = rust.get_vocab() if rust is not None else json.loads(file.read_text(encoding="utf-8"))
        known = [token for token in _EOS_CANDIDATES if token in vocabulary]
        if not known:
            raise ValueError(f"{file} names no EOS token; set eos_token in a tokenizer_config.json beside it")
        found["eos_token"] = known[0]
    return found["eos_token"], found.get("pad_token")


def _is_byte_level(description: dict[str, Any]) -> bool:
    decoder = description.get("decoder") or {}
    stages = [decoder, *decoder.get("decoders", [])]
    is_bpe = (description.get("model") or {}).get("type") == "BPE"
    return is_bpe and any(stage.get("type") == "ByteLevel" for stage in stages)


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
