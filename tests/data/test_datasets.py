"""Data flags: what is refused before anything is built, and what the built data sets hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import DataConfig
from megatron_sharedproj.data.corpus import PreprocessOptions
from megatron_sharedproj.data.datasets import resolve_blends, split_shares
from megatron_sharedproj.data.preprocess import preprocess
from megatron_sharedproj.data.tokenizers import build_tokenizer, train_bpe


def prefix(folder: Path, documents: int = 40) -> str:
    return str(tiny.write_data(folder, documents=documents))


@pytest.mark.parametrize(
    ("split", "expected"),
    [("969,30,1", [0.969, 0.03, 0.001]), ("9,1", [0.9, 0.1, 0.0]), ("1", [1.0, 0.0, 0.0])],
)
def test_split_shares(split: str, expected: list[float]) -> None:
    assert split_shares(split) == pytest.approx(expected)


@pytest.mark.parametrize("split", ["", "a,b,c", "0,0,0", "-1,2", "1,2,3,4", "nan", "inf,1"])
def test_a_bad_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match="--split .*: must be shares of training, validation and test"):
        split_shares(split)


@pytest.mark.parametrize(
    ("split", "validate", "name"),
    [("0,100,0", False, "train"), ("100,0,0", True, "valid"), ("99,1,0", True, "valid")],
)
def test_an_empty_split_is_refused(tmp_path: Path, split: str, validate: bool, name: str) -> None:
    data = DataConfig(data_path=[prefix(tmp_path)], split=split)
    with pytest.raises(
        ValueError, match=f"--split {split}: leaves none of the 40 documents .* to the {name} split"
    ):
        resolve_blends(data, tiny.VOCAB, validate=validate)


def test_missing_kinds_of_data_are_refused(tmp_path: Path) -> None:
    data = prefix(tmp_path)
    with pytest.raises(ValueError, match="--data-path: required"):
        resolve_blends(DataConfig(), tiny.VOCAB, validate=False)
    with pytest.raises(ValueError, match="--data-path: given together with --train-data-path"):
        resolve_blends(DataConfig(data_path=[data], train_data_path=[data]), tiny.VOCAB, validate=False)
    with pytest.raises(ValueError, match="--valid-data-path: required with --eval-iters"):
        resolve_blends(DataConfig(train_data_path=[data]), tiny.VOCAB, validate=True)
    assert resolve_blends(DataConfig(train_data_path=[data]), tiny.VOCAB, validate=False)[1] is None
    with pytest.raises(ValueError, match="weights must be positive"):
        resolve_blends(DataConfig(data_path=["0.5", data, "-1", data]), tiny.VOCAB, validate=False)


# Shares that round to no document made Megatron-Core loop for ever, the default split among them.
@pytest.mark.parametrize("split", ["969,30,1", "98,1,1", "90,10,0"])
def test_a_small_data_set_trains_with_any_split(parallel_state: Any, tmp_path: Path, split: str) -> None:
    trainer = tiny.trainer(tiny.flags(prefix(tmp_path), split=split, train_iters=3))
    assert trainer.train() == 0
    assert trainer.valid_data is None


def test_sequences_are_packed_documents(parallel_state: Any, tmp_path: Path) -> None:
    """Every training sequence is a piece of the documents, back to back in some order, none padded."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    name = prefix(tmp_path)
    trainer = tiny.trainer(tiny.flags(name, split="100,0,0", train_iters=20))
    documents = IndexedDataset(name)
    # One byte per id, so that "is a piece of" is a substring test.
    whole = [documents[i].astype(np.uint8).tobytes() for i in range(len(documents))]
    ended = 0
    for index in range(len(trainer.train_data)):
        sample = trainer.train_data[index]
        tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
        assert np.array_equal(tokens[1:], labels[:-1]) and bool(sample["loss_mask"].all())
        sequence = np.append(tokens, labels[-1]).astype(np.uint8)
        pieces = np.split(sequence, np.flatnonzero(sequence == tiny.VOCAB - 1) + 1)
        for position, piece in enumerate(part.tobytes() for part in pieces if part.size):
            starts = [document.find(piece) for document in whole]
            # A document that starts inside the sequence starts at its beginning.
            assert 0 in starts if position else max(starts) >= 0
            ended += piece[-1] == tiny.VOCAB - 1
    assert ended > 20


def test_mock_data_trains(parallel_state: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.flags("", data_path=None, mock_data=True, eval_iters=1))
    assert trainer.train() == 0
    assert trainer.valid_data is not None
    with pytest.raises(ValueError, match="--mock-data: given together with a data path"):
        resolve_blends(DataConfig(mock_data=True, data_path=[prefix(tmp_path)]), tiny.VOCAB, validate=False)


def test_reading_instead_of_mapping_gives_the_same(parallel_state: Any, tmp_path: Path) -> None:
    name = prefix(tmp_path)
    losses = []
    for changes in ({}, {"no_mmap_bin_files": True}):
        trainer = tiny.trainer(tiny.flags(name, train_iters=3, **changes))
        trainer.train()
        losses.append(trainer.last_loss)
    assert losses[0] == losses[1]


def test_a_blend_without_weights_goes_by_size_and_repeats(parallel_state: Any, tmp_path: Path) -> None:
    """Megatron-Core alone would stop after one epoch of it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    small, large = (
        tiny.write_data(tmp_path / "a", documents=10),
        tiny.write_data(tmp_path / "b", documents=40),
    )
    line = tiny.flags(small, data_path=None, split="100,0,0", train_iters=40, global_batch_size=8)
    trainer = tiny.trainer([*line, "--data-path", str(small), str(large)])
    assert len(trainer.train_data) >= 320
    share = float((np.asarray(trainer.train_data.dataset_index[:320]) == 0).mean())
    assert share == pytest.approx(0.2, abs=0.05)
    assert trainer.train() == 0


def test_test_data_is_evaluated_at_the_end(parallel_state: Any, tmp_path: Path, capsys: Any) -> None:
    name = prefix(tmp_path)
    paths = {"data_path": None, "train_data_path": name, "valid_data_path": name, "test_data_path": name}
    trainer = tiny.trainer(tiny.flags(name, **paths, eval_iters=1, train_iters=3))
    assert trainer.train() == 0
    assert " test at iteration 3 | lm loss: " in capsys.readouterr().out


def test_a_blend_takes_from_both(parallel_state: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = tiny.write_data(tmp_path / "a", seed=1), tiny.write_data(tmp_path / "b", seed=2)
    line = tiny.flags(first, data_path=None, split="100,0,0", train_iters=10)
    trainer = tiny.trainer([*line, "--data-path", "0.75", str(first), "0.25", str(second)])
    chosen = np.asarray(trainer.train_data.dataset_index[:40])
    assert (chosen == 0).sum() == 30 and (chosen == 1).sum() == 10
    assert trainer.train() == 0


# --- a blend in a file -----------------------------------------------------------------------------------


def test_a_blend_file_is_the_same_as_its_words(parallel_state: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    paths = [tiny.write_data(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    blend = tmp_path / "blend.txt"
    blend.write_text(f"0.75 {paths[0]}\n\t0.25   {paths[1]}\n")
    line = tiny.flags("", data_path=None, split="100,0,0", train_iters=3)
    words = ["0.75", str(paths[0]), "0.25", str(paths[1])]
    configs = [
        run_config(build_parser().parse_args([*line, *given]), tiny.VOCAB, 1)
        for given in (["--data-args-path", str(blend)], ["--data-path", *words])
    ]
    assert configs[0] == configs[1]
    assert configs[0].data.data_path == words
    losses = [
        tiny.losses([*line, *given]) for given in (["--data-args-path", str(blend)], ["--data-path", *words])
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize(
    ("content", "further", "words"),
    [
        (None, [], "cannot be read (No such file or directory); give a file of WEIGHT PREFIX words"),
        (b"", [], "is empty; write WEIGHT PREFIX words into it"),
        (b" \n\t\n", [], "is empty"),
        (b"\xff\xfe0.5", [], "cannot be read (not UTF-8 text)"),
        (b"1.0 nowhere", [], "nowhere.idx does not exist; give the prefix"),
        (b"-1 a 2 b", [], "weights must be positive"),
        (b"1.0 a", ["--data-path", "a"], "--data-path is given too; give one"),
    ],
)
def test_a_bad_blend_file_is_one_line(
    tmp_path: Path, capsys: Any, content: bytes | None, further: list[str], words: str
) -> None:
    from megatron_sharedproj.pretrain import main

    blend = tmp_path / "blend.txt"
    if content is not None:
        blend.write_bytes(content)
    line = tiny.flags("", data_path=None)
    assert main([*line, "--data-args-path", str(blend), *further]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --data-args-path {blend}: ") and words in err
    assert err.count("\n") == 1


def test_a_folder_is_no_blend_file(tmp_path: Path) -> None:
    line = tiny.flags("", data_path=None, data_args_path=tmp_path)
    with pytest.raises(ValueError, match="^--data-args-path .*: cannot be read .Is a directory"):
        run_config(build_parser().parse_args(line), tiny.VOCAB, 1)


def test_data_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    """Two vocabularies of one size: no id is out of range, and every one means something else."""
    (tmp_path / "a.jsonl").write_text('{"text": "abc abc abd abd the cat sat"}\n' * 4)
    tokenizers = []
    for name, text in (("one", "abc abc abd abd"), ("two", "the cat sat on the mat")):
        train_bpe([text], 262, tmp_path / name)
        tokenizers.append(build_tokenizer("HuggingFaceTokenizer", str(tmp_path / name)))
    made, other = tokenizers
    arguments = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "one")}
    (summary,) = preprocess({"": [tmp_path / "a.jsonl"]}, str(tmp_path / "x"), PreprocessOptions(arguments))
    data = DataConfig(data_path=[summary.prefix], split="1,0,0")
    assert made.vocab_size == other.vocab_size
    resolve_blends(data, 262, validate=False, tokenizer=("HuggingFaceTokenizer", made.sha256))
    resolve_blends(data, 262, validate=False, tokenizer=("GPT2BPETokenizer", other.sha256))  # not comparable
    with pytest.raises(ValueError, match=r"--tokenizer-model: this tokenizer .* is not the one that made"):
        resolve_blends(data, 262, validate=False, tokenizer=("HuggingFaceTokenizer", other.sha256))
