"""Tokenizers: ids agree with transformers, text cannot forge special tokens, byte counts are exact."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer

from megatron_sharedproj.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size, train_bpe

TEXT = (
    "Sharing the key and value projections halves the cache. The paper asks how much quality is lost, and"
    " the answer depends on what is shared: keys with values cost little, queries with keys more. 1234 56.7\n"
)
UNICODE = "Na\u00efve caf\u00e9 \u2014 \u6f22\u5b57 \U0001f600\u200d\U0001f680 e\u0301\r\n\t  \x00 end "


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe([TEXT] * 3, 320, directory)
    return directory


@pytest.fixture(scope="module")
def gpt2_files(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained vocabulary under OpenAI's file names (encoder.json, vocab.bpe)."""
    directory = tmp_path_factory.mktemp("gpt2")
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (directory / "encoder.json").write_text(json.dumps(model["vocab"]))
    (directory / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return directory


def load(directory: Path) -> Tokenizer:
    return build_tokenizer("HuggingFaceTokenizer", str(directory))


@pytest.mark.parametrize("text", [TEXT, UNICODE, "", " leading", "a <|endoftext|> b"])
def test_decode_inverts_encode(trained: Path, text: str) -> None:
    tokenizer = load(trained)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_cannot_forge_special_tokens(trained: Path, gpt2_files: Path) -> None:
    forged = "one<|endoftext|>two <|endoftext|>"
    for tokenizer in (load(trained), build_tokenizer("GPT2BPETokenizer", str(gpt2_files))):
        ids = tokenizer.encode(forged)
        assert tokenizer.eod not in ids
        assert tokenizer.decode(ids) == forged


def test_eos_that_is_not_marked_special_cannot_be_forged(trained: Path, tmp_path: Path) -> None:
    description = json.loads((trained / "tokenizer.json").read_text())
    description["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load(tmp_path)
    assert tokenizer.eod == 0 and 0 not in tokenizer.encode("a<|endoftext|>b")


def test_transformers_loads_what_train_bpe_wrote(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(str(trained))
    tokenizer = load(trained)
    for text in (TEXT, UNICODE):
        assert oracle(text)["input_ids"] == tokenizer.encode(text)
    assert (oracle.eos_token_id, len(oracle)) == (tokenizer.eod, tokenizer.vocab_size)


def test_gpt2_files_under_either_name_give_equal_ids(trained: Path, gpt2_files: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes((gpt2_files / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_files / "vocab.bpe").read_bytes())
    by_file = build_tokenizer(
        "GPT2BPETokenizer",
        vocab_file=str(gpt2_files / "encoder.json"),
        merge_file=str(gpt2_files / "vocab.bpe"),
    )
    others = [build_tokenizer("GPT2BPETokenizer", str(d)) for d in (gpt2_files, tmp_path)] + [load(tmp_path)]
    for tokenizer in others:
        assert tokenizer.encode(TEXT + UNICODE) == by_file.encode(TEXT + UNICODE)
        assert (tokenizer.eod, tokenizer.sha256) == (by_file.eod, by_file.sha256)
    assert by_file.encode(TEXT) == load(trained).encode(TEXT)


@pytest.mark.parametrize("text", [TEXT, UNICODE])
def test_byte_lengths_sum_to_the_bytes_of_the_text(trained: Path, text: str) -> None:
    tokenizer = load(trained)
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and lengths.shape == (tokenizer.vocab_size,)
    assert int(lengths[tokenizer.encode(text)].sum()) == len(text.encode())
    assert lengths[tokenizer.eod] == 0


def test_byte_lengths_of_added_plain_tokens_and_of_other_models(trained: Path, tmp_path: Path) -> None:
    rust = RustTokenizer.from_file(str(trained / "tokenizer.json"))
    rust.add_tokens(["    "])  # as GPT-NeoX does for runs of spaces
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    lengths = tokenizer.byte_lengths()
    text = "if x:\n    return caf\u00e9"
    assert lengths is not None and tokenizer.vocab_size - 1 in tokenizer.encode(text)
    assert int(lengths[tokenizer.encode(text)].sum()) == len(text.encode())
    assert build_tokenizer("NullTokenizer", vocab_size=8).byte_lengths() is None


@pytest.mark.parametrize("eos", ["\u0120the", {"content": "\u0120the", "special": True}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_eos_is_the_configured_one(trained: Path, tmp_path: Path, name: str, eos: object) -> None:
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(json.dumps({"eos_token": eos, "pad_token": "<|endoftext|>"}))
    tokenizer = load(tmp_path)
    assert tokenizer.eod == tokenizer.eos != 0
    assert tokenizer.pad == 0


def test_pad_equal_to_eos_is_reported_as_none(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(tmp_path).pad == -1 == load(trained).pad


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored(trained: Path, tmp_path: Path) -> None:
    rust = RustTokenizer.from_file(str(trained / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding(length=4)
    rust.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode_batch([TEXT, "a"]) == load(trained).encode_batch([TEXT, "a"])


def test_missing_eos_names_the_file(trained: Path, tmp_path: Path) -> None:
    description = (trained / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(description)
    with pytest.raises(ValueError, match=r"tokenizer\.json names no EOS token; set eos_token"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|absent|>"}')
    with pytest.raises(ValueError, match="not in the vocabulary"):
        load(tmp_path)


def test_mistakes_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        load(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer_type": "Nonsense"}, "use one of"),
        ({"tokenizer_type": "NullTokenizer"}, "--vocab-size"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "--merge-file"),
        ({"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": str(tmp_path)}, "holds neither"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "--tokenizer-model"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            build_tokenizer(**arguments)
    with pytest.raises(ValueError, match="257"):
        train_bpe(["a"], 100, tmp_path)


def test_a_tokenizer_that_only_transformers_has(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"}'
    )
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a</s>caf\u00e9")) == "a</s>caf\u00e9"
    assert tokenizer.eod not in tokenizer.encode("a</s>b")
    assert tokenizer.byte_lengths() is None and len(tokenizer.sha256) == 64


def test_null_tokenizer_keeps_its_eod_out_of_text() -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    assert tokenizer.encode("0 7 98") == [0, 7, 98] and tokenizer.decode([0, 7]) == "0 7"
    assert (tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (99, -1, 100)
    for text in ("99", "-1", "word"):
        with pytest.raises(ValueError):
            tokenizer.encode(text)


def test_identifiers_name_the_class_and_the_vocabulary(trained: Path) -> None:
    identifiers = load(trained).unique_identifiers
    assert list(identifiers) == ["class", "sha256", "eod"]
    assert json.loads(json.dumps(identifiers))["sha256"] == load(trained).sha256


def test_megatron_core_takes_it_without_warnings(trained: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = load(trained)
    ids = [*tokenizer.encode(TEXT), tokenizer.eod]
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for _ in range(8):
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "a.idx"))
    (tmp_path / "cache").mkdir()
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=([str(tmp_path / "a")], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = BlendedMegatronDatasetBuilder(
            gpt_dataset.GPTDataset, [4, 0, 0], lambda: True, config
        ).build()[0]
    assert all(int(train[index]["loss_mask"].sum()) == 16 for index in range(4))
    (description,) = (tmp_path / "cache").glob("*description.txt")
    assert tokenizer.sha256 in description.read_text()


@pytest.mark.parametrize(("size", "padded"), [(50257, 50304), (128, 128), (1, 128)])
def test_padded_vocab_size(size: int, padded: int) -> None:
    assert padded_vocab_size(size) == padded


def test_imports_stay_light() -> None:
    code = (
        "import sys, megatron_sharedproj.data.preprocess\n"
        "print([m for m in ('torch', 'transformers', 'megatron.core', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
