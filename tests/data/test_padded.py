"""The paper's padded rows: content, order, shares, blends, and that no figure of theirs looks packed."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from megatron_sharedproj.data.indexed import IndexedWriter
from megatron_sharedproj.data.padded import ROUNDS, padded_row, real_labels, shuffled

EOD = tiny.VOCAB - 1
# A token, two, exactly a row and its label, one more, far longer, shorter than a row.
LENGTHS = (1, 2, tiny.SEQ + 1, tiny.SEQ + 2, 90, 20, tiny.SEQ)


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [np.append(random.integers(EOD, size=length - 1), EOD) for length in lengths]


def write(prefix: Path, given: list[np.ndarray]) -> Path:
    prefix.parent.mkdir(exist_ok=True)
    with IndexedWriter(prefix, tiny.VOCAB) as writer:
        for document in given:
            writer.add(document, np.array([len(document)], dtype=np.int32))
        writer.close()
        writer.publish()
    return prefix


def row_by_hand(document: np.ndarray) -> tuple[int, ...]:
    row = [int(token) for token in document][: tiny.SEQ + 1]
    return tuple(row + [EOD] * (tiny.SEQ + 1 - len(row)))


def row_of(sample: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """The row of a sample, whose four tensors are checked against each other."""
    tokens, labels = sample["tokens"], sample["labels"]
    assert tokens.shape == labels.shape == (tiny.SEQ,) and tokens.dtype == labels.dtype == torch.int64
    assert torch.equal(tokens[1:], labels[:-1])
    assert sample["loss_mask"].dtype == torch.float32 and bool((sample["loss_mask"] == 1).all())
    assert sample["position_ids"].tolist() == list(range(tiny.SEQ))
    return (*tokens.tolist(), int(labels[-1]))


def padded(prefix: Path | str, **changes: Any) -> list[str]:
    return tiny.flags(prefix, **{"data_protocol": "padded", "split": "100,0,0", **changes})


@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 30])
def test_a_row(length: int) -> None:
    tokens, labels, scored = padded_row(np.arange(10, 10 + length), 4, 99)
    expected = ([*range(10, 10 + length)] + [99] * 5)[:5]
    assert (tokens.tolist(), labels.tolist(), scored.all()) == (expected[:4], expected[1:], True)
    assert real_labels(np.array([length]), 4) == min(max(length - 1, 0), 4)


# --- order -----------------------------------------------------------------------------------------------


def keys(seed: int) -> list[bytes]:
    return [bytes([seed, position]) for position in range(ROUNDS)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_shuffled_is_a_permutation(size: int) -> None:
    orders = [[shuffled(index, size, keys(seed)) for index in range(size)] for seed in (1, 2)]
    for order in orders:
        assert sorted(order) == list(range(size))
    assert size < 16 or (orders[0] != orders[1] and orders[0] != sorted(orders[0]))


def test_shuffled_sends_every_index_everywhere() -> None:
    """Where 6 indices of 12 go under 1200 keys: a chi-square over the 72 cells, far inside its tail."""
    size, trials, watched = 12, 1200, range(0, 12, 2)
    counts = np.zeros((len(watched), size))
    for seed in range(trials):
        some = [seed.to_bytes(4, "little") + bytes([position]) for position in range(ROUNDS)]
        for place, index in enumerate(watched):
            counts[place, shuffled(index, size, some)] += 1
    expected = trials / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(watched) * (size - 1)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.usefixtures("parallel_state")
def test_an_epoch_holds_each_document_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    given = documents(LENGTHS * 4)
    prefix = write(tmp_path / "data", given)
    data = tiny.trainer(padded(prefix, train_iters=28)).train_data
    assert len(data) == 4 * 28 == 4 * len(given)
    rows = [row_of(data[index]) for index in range(len(data))]
    epochs = [tuple(rows[start : start + len(given)]) for start in range(0, len(rows), len(given))]
    for epoch in epochs:
        assert Counter(epoch) == Counter(row_by_hand(document) for document in given)
    assert len(set(epochs)) == len(epochs)

    # Neither more iterations nor the batch change the order; the seed does.
    longer = tiny.trainer(padded(prefix, train_iters=50, global_batch_size=8)).train_data
    assert [row_of(longer[index]) for index in range(len(rows))] == rows
    other = tiny.trainer(padded(prefix, train_iters=28, seed=5)).train_data
    assert [row_of(other[index]) for index in range(len(rows))] != rows


@pytest.mark.usefixtures("parallel_state")
def test_a_resumed_run_reads_on_where_it_was(tmp_path: Path) -> None:
    """Across the end of an epoch, with more iterations than before; the same losses to the last bit."""
    prefix = write(tmp_path / "data", documents())
    whole = tiny.losses(padded(prefix, train_iters=6, save=tmp_path / "whole", hidden_dropout=0.1))
    options: dict[str, Any] = {"save": tmp_path / "parts", "hidden_dropout": 0.1, "lr_decay_iters": 6}
    first = tiny.losses(padded(prefix, train_iters=3, **options))
    second = tiny.losses(padded(prefix, train_iters=6, **options))
    assert first + second == whole


# --- splits, blends, shares ------------------------------------------------------------------------------


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize("workers", [0, 1])
def test_the_split_divides_documents(tmp_path: Path, workers: int) -> None:
    given = documents(LENGTHS * 6)
    line = padded(
        write(tmp_path / "data", given), split="70,30,0", eval_iters=5, train_iters=10, num_workers=workers
    )
    trainer = tiny.trainer(line)
    end = round(0.7 * len(given))
    for data, part in ((trainer.train_data, given[:end]), (trainer.valid_data, given[end:])):
        rows = {row_of(data[index]) for index in range(len(data))}
        assert rows == {row_by_hand(document) for document in part}
        real = sum(min(len(document), tiny.SEQ + 1) - 1 for document in part)
        assert data.real_token_share == pytest.approx(real / (len(part) * tiny.SEQ))
    batch = next(trainer._iterator(trainer.train_data, 4))
    assert torch.equal(batch["tokens"][0], trainer.train_data[4]["tokens"])


@pytest.mark.usefixtures("parallel_state")
def test_a_document_of_several_sequences_is_one_row(tmp_path: Path) -> None:
    """Megatron-LM's --split-sentences writes such files; an empty document is one of no sequence."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    given = documents()
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    for document in given:
        for sentence in np.array_split(document, 3):
            if len(sentence):
                builder.add_item(torch.from_numpy(sentence))
        builder.end_document()
    builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    data = tiny.trainer(padded(tmp_path / "data", train_iters=3)).train_data
    assert data.documents == len(given) + 1
    rows = {row_of(data[index]) for index in range(data.documents)}
    assert rows == {row_by_hand(document) for document in [*given, np.zeros(0)]}
    real = sum(min(len(document), tiny.SEQ + 1) - 1 for document in given)
    assert data.real_token_share == pytest.approx(real / ((len(given) + 1) * tiny.SEQ))


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize("weights", [("3", "1"), None])
def test_a_blend_takes_rows_from_both(tmp_path: Path, weights: tuple[str, str] | None) -> None:
    """Without weights by documents, which are the rows here, and not by tokens."""
    first, second = documents((5,) * 30, seed=1), documents((90,) * 10, seed=2)
    paths = [str(write(tmp_path / "a" / "data", first)), str(write(tmp_path / "b" / "data", second))]
    words = [weights[0], paths[0], weights[1], paths[1]] if weights else paths
    line = padded("", data_path=None, train_iters=10)
    trainer = tiny.trainer([*line, "--data-path", *words])
    found = [row_of(trainer.train_data[index]) for index in range(40)]
    mine = {row_by_hand(document) for document in first}
    assert sum(row in mine for row in found) == 30

    from megatron_sharedproj.data.padded import real_token_share

    assert real_token_share(trainer.train_data) == pytest.approx((3 * 4 / tiny.SEQ + 1) / 4)
    assert trainer.train() == 0


# --- what the trainer says -------------------------------------------------------------------------------


@pytest.mark.usefixtures("parallel_state")
def test_validation_is_the_papers_perplexity_and_says_so(tmp_path: Path, capsys: Any) -> None:
    """One epoch of validation rows: the figure of tools/evaluate.py --protocol padded, and of no other."""
    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity
    from megatron_sharedproj.inference.loading import LoadedModel

    prefix = write(tmp_path / "data", documents((*LENGTHS, 7)))
    paths = {"data_path": None, "train_data_path": prefix, "valid_data_path": prefix}
    run = tmp_path / "run"
    trainer = tiny.trainer(padded("", **paths, eval_iters=2, train_iters=5, save=run))
    assert trainer.train() == 0
    result = trainer.evaluate()
    trainer.log.close()
    loaded = LoadedModel(
        trainer.model.module.eval(), trainer.config, trainer.valid_data.config.tokenizer, run,
        torch.device("cpu"), {},
    )  # fmt: skip
    figures = {name: evaluate_perplexity(loaded, str(prefix), protocol=name) for name in ("padded", "packed")}
    expected = figures["padded"]
    assert set(result) == {"lm_loss", "padded_perplexity", "real_token_share"}
    assert result["lm_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["padded_perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert result["real_token_share"] == pytest.approx(expected["real_tokens"] / expected["tokens"])
    assert abs(figures["packed"]["loss"] - expected["loss"]) > 0.1

    out = capsys.readouterr().out
    assert f"data protocol: padded (the paper's: a document per row of {tiny.SEQ} tokens" in out
    share = f"{expected['real_tokens'] / expected['tokens']:.6E}"
    shares = f"train real token share: {share} | validation real token share: {share} |"
    assert f" data at iteration 0 | {shares}" in out
    lines = [line for line in out.splitlines() if " validation at iteration 5 " in line]
    assert lines and all("| padded perplexity: " in line and "| perplexity: " not in line for line in lines)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert records[0]["data_train_real_token_share"] == result["real_token_share"]
    assert records[-1]["validation_padded_perplexity"] == pytest.approx(result["padded_perplexity"])
    assert not any("validation_perplexity" in record for record in records)

    from megatron_sharedproj.reporting.plots import load_run

    assert load_run(run).validation_curve()[0] == [5.0]


@pytest.mark.usefixtures("parallel_state")
def test_packed_says_packed(tmp_path: Path, capsys: Any) -> None:
    trainer = tiny.trainer(tiny.flags(tiny.write_data(tmp_path), eval_iters=1))
    result = trainer.evaluate()
    assert set(result) == {"lm_loss", "perplexity"}
    out = capsys.readouterr().out
    assert "data protocol: packed (documents back to back, every token real)" in out
    assert "real token share" not in out and "padded" not in out


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_protocol": "bucketed"}, "--data-protocol bucketed: choose packed or padded"),
        ({"reset_position_ids": True}, "--reset-position-ids: with --data-protocol padded .*; drop the flag"),
        ({"reset_attention_mask": True}, "--reset-attention-mask: with --data-protocol padded"),
        ({"eod_mask_loss": True}, "--eod-mask-loss: with --data-protocol padded"),
        ({"mock_data": True, "data_path": None}, "--mock-data: not with --data-protocol padded; drop it"),
    ],
)
def test_what_padded_rows_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        tiny.trainer(padded(write(tmp_path / "data", documents()), **changes))


@pytest.mark.usefixtures("parallel_state")
def test_a_run_keeps_its_protocol(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data", documents())
    assert tiny.trainer(padded(prefix, save=tmp_path / "run", train_iters=3)).train() == 0
    words = (
        "^--data-protocol packed: the checkpoint in .* was trained on padded data, .* use padded, or --fine"
    )
    for folder in ({"save": tmp_path / "run"}, {"load": tmp_path / "run"}):
        with pytest.raises(ValueError, match=words):
            tiny.trainer(tiny.flags(prefix, **folder, split="100,0,0"))
    tuned = tiny.trainer(tiny.flags(prefix, load=tmp_path / "run", finetune=True, split="100,0,0"))
    assert tuned.iteration == 0
