"""Perplexity of a model over an indexed data set, by protocols that are never mixed up.

``packed``: documents back to back, every real token scored once, nothing else (the headline).
``padded``: the paper's protocol: a document per row, cut at s + 1 tokens, filled up with end-of-document
tokens, and the filling is scored too, which deflates the figure (paper.md, section 3).
``rolling``: as lm-eval's perplexity tasks: each document by itself after an end-of-document token, its own
last one not scored, in windows of which the last is filled up with context on its left; the softmax is over
the tokenizer's vocabulary, as in an export (the other two keep the rows that pad it, as training does).

Shape legend: s sequence length, b batch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from megatron_sharedproj.config import DATA_PROTOCOLS
from megatron_sharedproj.data.padded import Row, fill_row, padded_row, real_labels
from megatron_sharedproj.duration import format_duration
from megatron_sharedproj.inference.loading import LoadedModel

PROTOCOLS = (*DATA_PROTOCOLS, "rolling")


def packed_row(stream: NDArray[Any], seq_length: int, index: int) -> Row:
    """Window ``index`` of a token stream; together they score each token but the first exactly once."""
    window = stream[index * seq_length : (index + 1) * seq_length + 1]
    return fill_row(window, seq_length, 0, scored=len(window) - 1)


def without_eod(document: NDArray[Any], eod: int) -> NDArray[Any]:
    """A document's own tokens."""
    return document[:-1] if len(document) and document[-1] == eod else document


def rolling_row(document: NDArray[Any], seq_length: int, eod: int, index: int) -> Row:
    """lm-eval's window ``index`` of a document that has no eod: it scores tokens that no other one does."""
    start = index * seq_length
    end = min(start + seq_length, len(document))
    real = min(end, seq_length)
    window = np.concatenate([[eod], document])[end - real : end + 1]
    tokens, labels, _ = fill_row(window, seq_length, eod, scored=0)
    places = np.arange(seq_length)
    return tokens, labels, (real - (end - start) <= places) & (places < real)


@contextmanager
def real_vocabulary(loaded: LoadedModel) -> Iterator[None]:
    """The model without the rows that only pad its vocabulary: their logits are -inf."""
    from megatron.core import parallel_state

    def hide(module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output  # [s, b, V], or this rank's share of V
        split = logits.shape[-1] < loaded.config.model.padded_vocab_size
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1] if split else 0
        logits[..., max(loaded.tokenizer.vocab_size - first, 0) :] = float("-inf")
        return logits, bias

    handle = loaded.model.output_layer.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def unigram_entropy(stream: NDArray[Any]) -> float:
    """Entropy of the stream's own token frequencies, nats per token: what a model without context reaches."""
    _, counts = np.unique(stream, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def read_tokens(prefix: str, max_tokens: int) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """The first tokens of an indexed data set (0: all), as one stream and by document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    documents: list[NDArray[Any]] = []
    taken = 0
    for index in range(len(dataset.document_indices) - 1):
        first, last = dataset.document_indices[index], dataset.document_indices[index + 1]
        document = np.concatenate([dataset[i] for i in range(first, last)])
        if max_tokens and taken + len(document) > max_tokens:
            document = document[: max_tokens - taken]
        documents.append(document)
        taken += len(document)
        if max_tokens and taken >= max_tokens:
            break
    return np.concatenate(documents), documents


@torch.no_grad()
def evaluate_perplexity(
    loaded: LoadedModel,
    prefix: str,
    *,
    protocol: str = "packed",
    seq_length: int = 0,
    micro_batch_size: int = 8,
    max_tokens: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score a data set. Collective: data-parallel ranks share the rows.

    Args:
        prefix: indexed data set, already validated.
        protocol: one of PROTOCOLS.
        seq_length: tokens per row; 0: the run's.
        max_tokens: use the first so many tokens; 0: all.
    Returns:
        protocol, loss (nats per scored token), perplexity, tokens scored, real_tokens among them,
        bits_per_byte (not padded; byte-level tokenizers; the bytes are those of the scored tokens), bytes,
        unigram_entropy (nats), tokens_per_second.
    Raises:
        ValueError: for an unknown protocol or a length beyond the model's positions.
    """
    from megatron.core import parallel_state

    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)} or both")
    seq_length = seq_length or loaded.config.train.seq_length
    if micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {micro_batch_size}: must be at least 1")
    if max_tokens < 0:
        raise ValueError(f"--max-tokens {max_tokens}: must not be negative (0: all)")
    limit = loaded.config.model.max_position_embeddings
    if not 1 <= seq_length <= limit:
        raise ValueError(f"--seq-length {seq_length}: must be from 1 to the model's {limit} positions")
    stream, documents = read_tokens(prefix, max_tokens)
    if len(stream) < 2:
        raise ValueError(f"--data-path {prefix}: holds {len(stream)} token(s), nothing to score")
    eod = loaded.tokenizer.eod
    if protocol == "packed":
        count, real = -(-(len(stream) - 1) // seq_length), len(stream) - 1

        def row(index: int) -> Row:
            return packed_row(stream, seq_length, index)

    elif protocol == "rolling":
        documents = [without_eod(document, eod) for document in documents]
        windows = [(i, k) for i, d in enumerate(documents) for k in range(-(-len(d) // seq_length))]
        count, real = len(windows), sum(map(len, documents))
        if not count:
            raise ValueError(f"--data-path {prefix}: holds only end-of-document tokens, nothing to score")

        def row(index: int) -> Row:
            document, window = windows[index]
            return rolling_row(documents[document], seq_length, eod, window)

    else:
        count = len(documents)
        real = real_labels(np.array([len(document) for document in documents]), seq_length)

        def row(index: int) -> Row:
            return padded_row(documents[index], seq_length, eod)

    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = range(rank, count, ranks)
    positions = torch.arange(seq_length, device=loaded.device)
    sums = torch.zeros(2, dtype=torch.float64, device=loaded.device)
    started = time.perf_counter()
    for start in range(0, len(mine), micro_batch_size):
        batch = [row(index) for index in mine[start : start + micro_batch_size]]
        tokens, labels, mask = (
            torch.from_numpy(np.stack(column)).to(loaded.device) for column in zip(*batch, strict=True)
        )
        with real_vocabulary(loaded) if protocol == "rolling" else nullcontext():
            losses = loaded.model(tokens, positions.expand_as(tokens), None, labels=labels)
        sums += torch.stack([losses.double()[mask].sum(), mask.sum().double()])
        if show_progress:
            _progress(start + len(batch), len(mine), started)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    seconds = time.perf_counter() - started
    nats, scored = sums[0].item(), int(sums[1].item())
    loss = nats / scored
    result: dict[str, Any] = {
        "protocol": protocol,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": scored,
        "real_tokens": real,
        "seq_length": seq_length,
        "unigram_entropy": unigram_entropy(stream),
        "tokens_per_second": scored / seconds,
    }
    lengths = loaded.tokenizer.byte_lengths()
    if protocol != "padded" and lengths is not None:
        # Packed: the first token is given, not predicted: its bytes are not counted either.
        counted = stream[1:] if protocol == "packed" else stream
        size = int(lengths[counted.astype(np.int64)].sum())
        result.update(bytes=size, bits_per_byte=nats / math.log(2) / size)
    return result


def _progress(done: int, total: int, started: float) -> None:
    rate = done / (time.perf_counter() - started)
    end = "\n" if done == total else ""
    sys.stderr.write(
        f"\r\033[K{done}/{total} rows  {rate:.1f} rows/s  ETA {format_duration((total - done) / rate)}{end}"
    )
    sys.stderr.flush()
