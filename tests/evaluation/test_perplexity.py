"""Perplexity by both protocols against computations written out one window and one token at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_sharedproj.config import ModelConfig, RunConfig, TrainConfig
from megatron_sharedproj.data.indexed import IndexedWriter
from megatron_sharedproj.data.tokenizers import build_tokenizer, train_bpe

pytestmark = pytest.mark.usefixtures("parallel_state")

VOCAB, POSITIONS, SEQ = 30, 16, 8
EOD = VOCAB - 1
# A row and a token, one token, exactly a row and a token, far longer, short: every way to fill a row.
LENGTHS = (9, 1, 30, 5, 9, 2, 12, 3)


def load(tokenizer: Any = None, variant: str = "qk_eq_v") -> Any:
    """A random model that is far from uniform: different contexts get different losses."""
    from megatron_sharedproj.inference.loading import LoadedModel
    from megatron_sharedproj.model import build_model

    tokenizer = tokenizer or build_tokenizer("NullTokenizer", vocab_size=VOCAB)
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        padded_vocab_size=-(-tokenizer.vocab_size // 8) * 8,
        max_position_embeddings=POSITIONS,
        attention_variant=variant,
    )
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if "layernorm.weight" in name else 0.3 * noise)
    run = RunConfig(model=config, train=TrainConfig(seq_length=SEQ))
    return LoadedModel(model, run, tokenizer, Path("."), torch.device("cpu"), {})


def make_documents() -> list[NDArray[np.int64]]:
    random = np.random.default_rng(2)
    return [np.append(random.integers(EOD, size=length - 1), EOD) for length in LENGTHS]


def write(folder: Path, documents: list[NDArray[np.int64]], vocab_size: int = VOCAB) -> str:
    prefix = folder / "data_text_document"
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document, np.array([len(document)], dtype=np.int32))
        writer.close()
        writer.publish()
    return str(prefix)


def evaluate(loaded: Any, prefix: str, **options: Any) -> dict[str, Any]:
    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity

    return evaluate_perplexity(loaded, prefix, **options)


@torch.no_grad()
def nats(loaded: Any, window: Any) -> float:
    """Summed cross-entropy of a window's tokens after its first, from the whole model's logits."""
    window = torch.as_tensor(np.asarray(window, dtype=np.int64))[None]
    tokens, labels = window[:, :-1], window[:, 1:]
    logits = loaded.model(tokens, torch.arange(tokens.shape[1])[None], None)
    return torch.nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="sum").item()


def naive_packed(loaded: Any, stream: NDArray[np.int64], seq_length: int) -> tuple[float, int]:
    """Nats and tokens: windows that overlap by the one token that predicts the next window's first."""
    total, scored = 0.0, 0
    for start in range(0, len(stream) - 1, seq_length):
        window = stream[start : start + seq_length + 1]
        total += nats(loaded, window)
        scored += len(window) - 1
    return total, scored


def naive_padded(loaded: Any, documents: list[NDArray[np.int64]], seq_length: int) -> tuple[float, int]:
    """The paper's released code: a document a row, cut at s + 1, filled with eod, every label scored."""
    total, scored = 0.0, 0
    for document in documents:
        row = list(document[: seq_length + 1])
        row += [EOD] * (seq_length + 1 - len(row))
        total += nats(loaded, row)
        scored += seq_length
    return total, scored


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 16, 17, 18, 41])
@pytest.mark.parametrize("seq_length", [1, 8, 64])
def test_packed_rows_score_each_token_but_the_first_once(length: int, seq_length: int) -> None:
    from megatron_sharedproj.evaluation.perplexity import packed_row

    stream = np.arange(100, 100 + length)
    rows = [packed_row(stream, seq_length, index) for index in range(-(-(length - 1) // seq_length))]
    scored: list[int] = []
    for tokens, labels, mask in rows:
        assert tokens.shape == labels.shape == mask.shape == (seq_length,)
        # A label is the token after its input, in the stream and not in the filling.
        assert (labels[mask] == tokens[mask] + 1).all()
        scored += labels[mask].tolist()
    assert scored == stream[1:].tolist()


@pytest.mark.parametrize("variant", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"])
@pytest.mark.parametrize("seq_length", [SEQ, 5, POSITIONS, 1])
def test_packed_equals_one_window_at_a_time(tmp_path: Path, variant: str, seq_length: int) -> None:
    loaded, documents = load(variant=variant), make_documents()
    stream = np.concatenate(documents)
    result = evaluate(loaded, write(tmp_path, documents), protocol="packed", seq_length=seq_length)
    total, scored = naive_packed(loaded, stream, seq_length)
    assert scored == len(stream) - 1 == sum(LENGTHS) - 1
    assert result["tokens"] == result["real_tokens"] == scored
    assert result["loss"] == pytest.approx(total / scored, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / scored), rel=1e-4)
    assert result["seq_length"] == seq_length


def test_the_filling_of_the_last_window_is_not_scored(tmp_path: Path) -> None:
    """One token past a window adds one loss to the sum, whatever stands in the seven places after it."""
    from megatron_sharedproj.evaluation.perplexity import packed_row

    loaded = load()
    stream = np.concatenate(make_documents())[: SEQ + 2]
    (tmp_path / "whole").mkdir()
    whole = evaluate(loaded, write(tmp_path, [stream[: SEQ + 1]]))
    more = evaluate(loaded, write(tmp_path / "whole", [stream]))
    assert (whole["tokens"], more["tokens"]) == (SEQ, SEQ + 1)
    added = more["loss"] * more["tokens"] - whole["loss"] * whole["tokens"]
    assert added == pytest.approx(nats(loaded, stream[SEQ:]), rel=1e-4)
    assert packed_row(stream, SEQ, 1)[2].tolist() == [True] + [False] * (SEQ - 1)


@pytest.mark.parametrize("protocol", ["packed", "padded"])
def test_the_micro_batch_does_not_matter(tmp_path: Path, protocol: str) -> None:
    loaded, prefix = load(), write(tmp_path, make_documents())
    results = [evaluate(loaded, prefix, protocol=protocol, micro_batch_size=size) for size in (1, 3, 100)]
    for result in results[1:]:
        assert result["tokens"] == results[0]["tokens"]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("seq_length", [SEQ, 12])
def test_padded_equals_the_papers_protocol(tmp_path: Path, seq_length: int) -> None:
    loaded, documents = load(), make_documents()
    prefix = write(tmp_path, documents)
    result = evaluate(loaded, prefix, protocol="padded", seq_length=seq_length)
    total, scored = naive_padded(loaded, documents, seq_length)
    assert result["tokens"] == scored == len(LENGTHS) * seq_length
    assert result["real_tokens"] == sum(min(length, seq_length + 1) - 1 for length in LENGTHS) < scored
    assert result["loss"] == pytest.approx(total / scored, rel=1e-5)
    packed = evaluate(loaded, prefix, seq_length=seq_length)
    assert abs(packed["loss"] - result["loss"]) > 0.01  # never mixed up
    assert (packed["protocol"], result["protocol"]) == ("packed", "padded")


def test_padding_deflates_the_figure_of_a_model_that_knows_it(tmp_path: Path) -> None:
    """Why the two words exist: after an eod comes an eod in the padded protocol, and only there."""
    loaded, prefix = load(), write(tmp_path, make_documents())
    with torch.no_grad():  # whatever comes in, answer with eod about half of the time
        for parameter in loaded.model.decoder.parameters():
            parameter.zero_()
        table = loaded.model.embedding.word_embeddings.weight
        table.zero_()
        loaded.model.decoder.final_layernorm.bias.fill_(1.0)
        table[EOD] = math.log(table.shape[0] - 1) / table.shape[1]
    packed = evaluate(loaded, prefix, protocol="packed")
    padded = evaluate(loaded, prefix, protocol="padded")
    eods = len(LENGTHS)
    others = math.log(2) + math.log(table.shape[0] - 1)
    share = eods / packed["tokens"]
    assert packed["loss"] == pytest.approx(share * math.log(2) + (1 - share) * others, rel=1e-4)
    assert padded["loss"] < packed["loss"] - 0.5


@pytest.mark.parametrize("limit", [2, 9, 10, 39, 45, 70, 71, 1000])
def test_max_tokens_takes_the_first_tokens(tmp_path: Path, limit: int) -> None:
    loaded, documents = load(), make_documents()
    prefix = write(tmp_path, documents)
    stream = np.concatenate(documents)[:limit]
    packed = evaluate(loaded, prefix, max_tokens=limit)
    total, scored = naive_packed(loaded, stream, SEQ)
    assert packed["tokens"] == scored == min(limit, sum(LENGTHS)) - 1
    assert packed["loss"] == pytest.approx(total / scored, rel=1e-5)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    cut = [stream[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True) if a < len(stream)]
    padded = evaluate(loaded, prefix, protocol="padded", max_tokens=limit)
    total, scored = naive_padded(loaded, cut, SEQ)
    assert padded["tokens"] == scored
    assert padded["loss"] == pytest.approx(total / scored, rel=1e-5)


def test_seq_length_is_the_runs_unless_given(tmp_path: Path) -> None:
    loaded, prefix = load(), write(tmp_path, make_documents())
    assert evaluate(loaded, prefix)["seq_length"] == SEQ
    assert evaluate(loaded, prefix)["loss"] == evaluate(loaded, prefix, seq_length=SEQ)["loss"]
    assert evaluate(loaded, prefix)["loss"] != evaluate(loaded, prefix, seq_length=SEQ + 1)["loss"]


def test_unigram_entropy(tmp_path: Path) -> None:
    from megatron_sharedproj.evaluation.perplexity import unigram_entropy

    assert unigram_entropy(np.arange(10).repeat(7)) == pytest.approx(math.log(10))
    assert unigram_entropy(np.full(5, 3)) == pytest.approx(0.0)
    skewed = np.array([0, 0, 1, 2], dtype=np.uint16)
    assert unigram_entropy(skewed) == pytest.approx(1.5 * math.log(2))
    documents = make_documents()
    result = evaluate(load(), write(tmp_path, documents), max_tokens=20)
    assert result["unigram_entropy"] == pytest.approx(unigram_entropy(np.concatenate(documents)[:20]))


def test_bits_per_byte(tmp_path: Path) -> None:
    texts = [
        "The sea is calm tonight. The tide is full.",
        "na\u00efve caf\u00e9 \u2014 \u6d77 \U0001f30a",
        "The end",
    ]
    tokenizer = train_bpe(texts * 20, 300, tmp_path / "tokenizer")
    documents = [np.array([*tokenizer.encode(text), tokenizer.eod]) for text in texts]
    loaded = load(tokenizer)
    result = evaluate(loaded, write(tmp_path, documents, tokenizer.vocab_size))
    # Bytes of the text itself: the first token is given and not scored, an end of document is no text.
    first = tokenizer.decode(documents[0][:1].tolist())
    assert texts[0].startswith(first) and first
    expected = sum(len(text.encode()) for text in texts) - len(first.encode())
    assert expected > sum(len(text) for text in texts)  # bytes, not characters
    total, scored = naive_packed(loaded, np.concatenate(documents), SEQ)
    assert result["bytes"] == expected
    assert result["tokens"] == scored
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / expected, rel=1e-5)
    padded = evaluate(loaded, str(tmp_path / "data_text_document"), protocol="padded")
    assert "bits_per_byte" not in padded and "bytes" not in padded


def test_no_bits_per_byte_without_bytes(tmp_path: Path) -> None:
    result = evaluate(load(), write(tmp_path, make_documents()))
    assert "bits_per_byte" not in result and "bytes" not in result


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path, make_documents())
    with pytest.raises(
        ValueError, match=r"--protocol sliding: choose one of packed, padded, rolling or both"
    ):
        evaluate(load(), prefix, protocol="sliding")


@pytest.mark.parametrize("seq_length", [-1, POSITIONS + 1])
def test_a_length_beyond_the_positions_is_refused(tmp_path: Path, seq_length: int) -> None:
    prefix = write(tmp_path, make_documents())
    message = rf"--seq-length {seq_length}: must be from 1 to the model's 16 positions"
    with pytest.raises(ValueError, match=message):
        evaluate(load(), prefix, seq_length=seq_length)


def test_a_runs_own_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    loaded = load()
    loaded.config.train.seq_length = POSITIONS + 4
    with pytest.raises(ValueError, match=r"--seq-length 20: must be from 1 to the model's 16 positions"):
        evaluate(loaded, write(tmp_path, make_documents()), seq_length=0)


def test_one_token_is_nothing_to_score(tmp_path: Path) -> None:
    prefix = write(tmp_path, make_documents())
    with pytest.raises(ValueError, match=r"--data-path .*holds 1 token\(s\), nothing to score"):
        evaluate(load(), prefix, max_tokens=1)
    with pytest.raises(ValueError, match=r"--data-path .*holds 1 token\(s\), nothing to score"):
        evaluate(load(), write(tmp_path, [np.array([EOD])]))
