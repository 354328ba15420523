"""The paper's data protocol: a document per row, cut at s + 1 tokens, filled with end-of-document tokens.

The filling is scored, as the paper's released code does it (paper.md, section 3), which deflates loss and
perplexity; a figure of these rows is called ``padded`` wherever it is shown. The rows are made here for
training, for the trainer's validation and for evaluation/perplexity.py alike.

Shape legend: s sequence length.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Tokens [s], labels [s], and a mask [s] of the labels that are scored.
Row = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]

ROUNDS = 6
_CHUNK = 1 << 22  # documents whose lengths are held at a time


def fill_row(window: NDArray[Any], seq_length: int, fill: int, *, scored: int) -> Row:
    """A row of at most s + 1 tokens, filled up with ``fill``; its first ``scored`` labels count."""
    full = np.full(seq_length + 1, fill, dtype=np.int64)
    full[: len(window)] = window
    return full[:-1], full[1:], np.arange(seq_length) < scored


def padded_row(document: NDArray[Any], seq_length: int, eod: int) -> Row:
    """A document as the paper's released code makes a row of it: every label is scored."""
    return fill_row(document[: seq_length + 1], seq_length, eod, scored=seq_length)


def real_labels(lengths: NDArray[Any], seq_length: int) -> int:
    """How many labels of the padded rows of documents of these lengths [any] are the documents' own."""
    return int(np.clip(lengths.astype(np.int64) - 1, 0, seq_length).sum())


def shuffled(index: int, size: int, keys: Sequence[bytes]) -> int:
    """Where a permutation of range(size), which the keys determine, sends ``index``.

    A Feistel network over the next power of four, walked until it lands inside: one index at a time, so
    that no loader process holds an order of all documents (gigabytes for SlimPajama).
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for key in keys:
            digest = hashlib.blake2b(right.to_bytes(8, "little"), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        index = left << half | right
        if index < size:
            return index


class PaddedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Padded rows of one split of a token file, each epoch in an order of its own.

    Row ``i`` is the ``i % documents``-th document of epoch ``i // documents``: it depends on the seed and on
    ``i`` alone, so that a run resumes exactly, with more iterations too. Constructor and static methods
    are what Megatron-Core's BlendedMegatronDatasetBuilder asks of a data set, which divides and blends.

    Args:
        indexed: Megatron-Core IndexedDataset; path: its prefix.
        indices: documents of the split, consecutive.
        num_samples: rows wanted; None: one epoch.
        index_split: Megatron's Split; config: its GPTDatasetConfig (seed, sequence length, tokenizer).
    Raises:
        ValueError: if the split has no documents.
    """

    def __init__(
        self,
        indexed: Any,
        path: str | None,
        indices: NDArray[Any],
        num_samples: int | None,
        index_split: Any,
        config: Any,
    ):
        if not len(indices):
            raise ValueError(f"the {index_split.name} split of {path} has no documents")
        self.dataset, self.dataset_path = indexed, path
        self.first, self.documents = int(indices[0]), len(indices)
        self.num_samples = num_samples
        self.index_split, self.config = index_split, config
        self.seq_length, self.eod = int(config.sequence_length), int(config.tokenizer.eod)
        self._epoch, self._keys = 0, self._epoch_keys(0)
        # Names the cached index of a blend.
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict(
            [
                ("class", type(self).__name__),
                ("dataset_path", path),
                ("num_samples", num_samples),
                ("index_split", index_split.name),
                ("random_seed", config.random_seed),
                ("sequence_length", self.seq_length),
            ]
        )

    @staticmethod
    def build_low_level_dataset(path: str, config: Any) -> Any:
        """Open a token file."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(path, multimodal=False, mmap=config.mmap_bin_files)

    @staticmethod
    def numel_low_level_dataset(indexed: Any) -> int:
        """What ``--split`` divides: documents."""
        return len(indexed.document_indices) - 1

    def __len__(self) -> int:
        return self.documents if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """tokens, labels, position_ids [s] int64 and loss_mask [s] float32, all ones."""
        epoch, position = divmod(int(index), self.documents)
        if epoch != self._epoch:
            self._epoch, self._keys = epoch, self._epoch_keys(epoch)
        document = self._read(self.first + shuffled(position, self.documents, self._keys))
        tokens, labels, scored = padded_row(document, self.seq_length, self.eod)
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(scored.astype(np.float32)),
            "position_ids": torch.arange(self.seq_length),
        }

    def _epoch_keys(self, epoch: int) -> list[bytes]:
        source = np.random.SeedSequence((self.config.random_seed, self.index_split.value, epoch))
        return [int(word).to_bytes(8, "little") for word in source.generate_state(ROUNDS, np.uint64)]

    def _read(self, document: int) -> NDArray[Any]:
        # Megatron-LM's tool may write a document as several sequences; ours writes one.
        wanted = self.seq_length + 1
        parts: list[NDArray[Any]] = []
        first, last = self.dataset.document_indices[document : document + 2]
        for sequence in range(int(first), int(last)):
            length = min(wanted, int(self.dataset.sequence_lengths[sequence]))
            parts.append(self.dataset.get(sequence, offset=0, length=length))
            wanted -= length
            if not wanted:
                break
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @cached_property
    def real_token_share(self) -> float:
        """Labels of an epoch that are the documents' own, over all that are scored. Reads the whole index."""
        real, last = 0, self.first + self.documents
        for start in range(self.first, last, _CHUNK):
            bounds = np.asarray(self.dataset.document_indices[start : min(start + _CHUNK, last) + 1])
            sequences = self.dataset.sequence_lengths[bounds[0] : bounds[-1]]
            ends = np.concatenate(([0], np.cumsum(sequences, dtype=np.int64)))
            real += real_labels(np.diff(ends[bounds - bounds[0]]), self.seq_length)
        return real / (self.documents * self.seq_length)


def real_token_share(dataset: Any) -> float:
    """Share of real tokens in what is scored of a PaddedDataset, or of Megatron's blend of several."""
    if isinstance(dataset, PaddedDataset):
        return dataset.real_token_share
    shares = [part.real_token_share for part in dataset.datasets]
    return float(np.average(shares, weights=dataset.weights))
