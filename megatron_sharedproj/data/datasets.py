"""Megatron-Core data sets of packed or padded rows, and the sampler that can resume anywhere.

Shape legend: b micro batch, s sequence length.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from megatron_sharedproj.config import DataConfig, TrainConfig
from megatron_sharedproj.data.inspection import check_training_data
from megatron_sharedproj.device import get_device

_SPLITS = ("train", "valid", "test")

# Ids checked at every start; all of a terabyte would take longer than a restart may.
_CHECKED_TOKENS = 200_000_000


def blend_prefixes(values: list[str], flag: str) -> tuple[list[str], list[float] | None]:
    """Split Megatron's blend, ``PREFIX`` or ``WEIGHT PREFIX WEIGHT PREFIX ...``.

    Returns:
        prefixes, and weights (None for prefixes without weights).
    Raises:
        ValueError: for a weight that is not a positive number or a missing file.
    """
    prefixes, weights = list(values), None
    if len(values) > 1 and len(values) % 2 == 0:
        try:
            weights = [float(value) for value in values[0::2]]
        except ValueError:
            weights = None  # prefixes only, as Megatron-LM takes them
        else:
            prefixes = values[1::2]
            if any(weight <= 0 for weight in weights):
                raise ValueError(f"{flag} {' '.join(values)}: weights must be positive")
    for prefix in prefixes:
        for suffix in (".idx", ".bin"):
            if not Path(prefix + suffix).is_file():
                raise ValueError(
                    f"{flag} {prefix}: {prefix}{suffix} does not exist; give the prefix that "
                    "tools/preprocess_slimpajama.py printed (without .bin or .idx)"
                )
    return prefixes, weights


def split_shares(split: str) -> list[float]:
    """``--split`` as three shares that sum to 1.

    Raises:
        ValueError: unless it is one to three numbers, not negative, with a positive sum.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    valid = 1 <= len(shares) <= 3 and all(0 <= share < float("inf") for share in shares) and sum(shares) > 0
    if not valid:
        raise ValueError(
            f"--split {split}: must be shares of training, validation and test, such as 969,30,1"
        )
    shares += [0.0] * (3 - len(shares))
    return [share / sum(shares) for share in shares]


def _check_split(split: str, prefix: str, documents: int, *, validate: bool) -> None:
    # Megatron-Core loops for ever over a split whose share is positive and whose documents are none.
    shares = split_shares(split)
    end = 0.0
    for name, share, needed in zip(_SPLITS, shares, (True, validate, False), strict=True):
        begin, end = end, end + share
        if needed and round(end * documents) - round(begin * documents) < 1:
            hint = "; or switch validation off by --eval-iters 0" if name == "valid" else ""
            raise ValueError(
                f"--split {split}: leaves none of the {documents} documents of {prefix} to the {name} split; "
                f"give it a larger share{hint}"
            )


def resolve_blends(
    data: DataConfig, vocab_size: int, *, validate: bool, tokenizer: tuple[str, str] | None = None
) -> list[Any]:
    """Check the data flags and their files.

    Args:
        vocab_size: ids must be below it (the tokenizer's, not the padded one).
        validate: validation data are needed.
        tokenizer: type and sha256, which must be those that the data were made with.
    Returns:
        One blend (prefixes, weights) for ``--data-path``, three (None where absent) for the per-split
        flags, none for ``--mock-data``.
    Raises:
        ValueError: naming the flag and the remedy.
    """
    per_split = [getattr(data, f"{name}_data_path") for name in _SPLITS]
    if data.mock_data:
        if data.data_path or any(per_split):
            raise ValueError("--mock-data: given together with a data path; give one")
        return []
    if data.data_path and any(per_split):
        raise ValueError("--data-path: given together with --train-data-path and its like; give one kind")
    if not data.data_path and not per_split[0]:
        raise ValueError(
            "--data-path: required; give the prefix of a .bin/.idx pair, which "
            "tools/preprocess_slimpajama.py makes"
        )
    blends: list[Any]
    if data.data_path:
        blends = [blend_prefixes(data.data_path, "--data-path")]
    else:
        blends = [
            blend_prefixes(paths, f"--{name}-data-path") if paths else None
            for name, paths in zip(_SPLITS, per_split, strict=True)
        ]
        if validate and blends[1] is None:
            raise ValueError("--valid-data-path: required with --eval-iters; give it, or --eval-iters 0")
    return [_checked(blend, data, vocab_size, validate, tokenizer) if blend else None for blend in blends]


def _checked(
    blend: Any, data: DataConfig, vocab_size: int, validate: bool, tokenizer: tuple[str, str] | None
) -> Any:
    prefixes, weights = blend
    kind, digest = tokenizer or (None, None)
    sizes = []
    for prefix in prefixes:
        documents, tokens = check_training_data(prefix, vocab_size, _CHECKED_TOKENS, digest, kind)
        # What a sample is made of: so many tokens, or a document.
        sizes.append(float(documents if data.data_protocol == "padded" else tokens))
        if data.data_path:
            _check_split(data.split, prefix, documents, validate=validate)
    if weights is None and len(prefixes) > 1:
        # By size, which is what a blend without weights means; Megatron-Core would stop after one epoch.
        weights = sizes
    return prefixes, weights


def check_document_ends(blends: list[Any], eod: int, flag: str) -> None:
    """Refuse data whose documents do not end with ``eod``: ``flag`` would find no boundary in them.

    Looks at up to 32 documents of each prefix, spread over it; one that ends so is enough, since the last of
    a cut file may not.

    Raises:
        ValueError: naming the prefix and the remedy.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for prefix in (prefix for blend in blends if blend for prefix in blend[0]):
        dataset = IndexedDataset(prefix)
        lengths, bounds = dataset.sequence_lengths, dataset.document_indices
        looked_at = range(1, len(bounds), max(1, (len(bounds) - 1) // 32))[:32]
        ends = [int(bounds[document]) - 1 for document in looked_at]
        last = [dataset.get(end, offset=int(lengths[end]) - 1)[0] for end in ends if lengths[end]]
        if eod not in last:
            raise ValueError(
                f"{flag}: the documents of {prefix} do not end with the end-of-document token, {eod}; "
                "preprocess them with it (--append-eod), or drop the flag"
            )


def build_datasets(
    data: DataConfig, train: TrainConfig, tokenizer: Any, blends: list[Any], sizes: tuple[int, int, int]
) -> list[Any]:
    """Training, validation and test data sets (None where there is no data).

    Packed: GPTDatasets, documents back to back in sequences of ``seq_length`` + 1 tokens; no padding is
    scored. Padded (``--data-protocol``): PaddedDatasets, a document per row, its filling scored.

    Args:
        blends: from :func:`resolve_blends`.
        sizes: sequences wanted of each split; the data repeat (in a new order) if there are fewer.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

    from megatron_sharedproj.data.padded import PaddedDataset

    chosen: dict[str, Any]
    if len(blends) == 1:
        chosen = {"blend": blends[0], "split": data.split}
    elif blends:
        chosen = {"blend_per_split": blends}
    else:
        chosen = {"split": "1,1,1"}  # no blend: Megatron takes that as mock data
    config = GPTDatasetConfig(
        random_seed=train.seed,
        sequence_length=train.seq_length,
        path_to_cache=data.data_cache_path or None,
        mmap_bin_files=not data.no_mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        # The boundaries reach attention as lengths (layers/core_attention.py), not as an s x s mask.
        create_attention_mask=False,
        **chosen,
    )
    if len(blends) != len(_SPLITS):
        # A split of which nothing is wanted is not built: it may have no documents.
        ranges = zip(config.split_matrix, sizes, strict=True)
        config.split_matrix = [bounds if size else None for bounds, size in ranges]
    wanted = [size if len(blends) < len(_SPLITS) or blends[index] else 0 for index, size in enumerate(sizes)]
    kind: Any = GPTDataset if blends else MockGPTDataset
    if data.data_protocol == "padded":
        kind = PaddedDataset
    if torch.distributed.get_rank() == 0:
        _drop_cut_caches(data, blends)
    try:
        return list(BlendedMegatronDatasetBuilder(kind, wanted, lambda: True, config).build())
    except (AssertionError, IndexError, ValueError) as error:
        raise ValueError(
            f"--data-path: Megatron-Core could not build a data set of {train.seq_length}-token sequences "
            f"({error})"
        ) from error


def _drop_cut_caches(data: DataConfig, blends: list[Any]) -> None:
    """Delete index caches that a killed run left half-written; Megatron-Core takes any for a whole one."""
    prefixes = [prefix for blend in blends if blend for prefix in blend[0]]
    folders = [Path(data.data_cache_path)] if data.data_cache_path else [Path(p) / "cache" for p in prefixes]
    for path in (path for folder in sorted(set(folders)) for path in folder.rglob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            print(f"note: {path} is cut short and is built anew", file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)


class PretrainingSampler:
    """Indices of this data-parallel rank, from any number of consumed samples on.

    The counterpart of Megatron-LM's MegatronPretrainingSampler (megatron.training, absent from the
    0.16 wheel): global batches follow each other, a rank takes its micro batch from each stripe.
    """

    def __init__(self, total: int, consumed: int, micro_batch_size: int, rank: int, ranks: int):
        self.total, self.consumed = total, consumed
        self.micro_batch_size, self.rank, self.ranks = micro_batch_size, rank, ranks

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        stripe = self.micro_batch_size * self.ranks
        for start in range(self.consumed, self.total - stripe + 1, stripe):
            first = start + self.rank * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))


class _Loading:
    """Micro batches of a sampler, in order; goes on with new loader processes where one was killed."""

    def __init__(self, make: Callable[[int], Any], consumed: int, stripe: int):
        self._make, self._position, self._stripe = make, consumed, stripe
        self._batches, self._failures = self._start(), 0

    def _start(self) -> Any:
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._make(self._position))
        if signal.getsignal(signal.SIGCHLD) is not before:
            # torch's handler raises wherever the main thread is, in the middle of an update too; without it
            # a loader that died is noticed when the next batch is due.
            signal.signal(signal.SIGCHLD, before)
        return batches

    def __iter__(self) -> _Loading:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        while True:
            try:
                batch = next(self._batches)
            except (RuntimeError, ConnectionError, EOFError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                # An error in a loader ("Caught ...") is not its death; a dead one's batch cannot be read.
                died = not isinstance(error, RuntimeError) or "DataLoader worker" in reason
                if not died or reason.startswith("Caught "):
                    raise
                self._failures += 1
                if self._failures > _LOADER_RESTARTS:
                    raise ValueError(
                        f"--num-workers: data loader processes die again and again ({reason}); give fewer, "
                        "0 for none, or more (shared) memory"
                    ) from error
                print(f"note: {reason}; started anew", file=sys.stderr, flush=True)
                self._batches = self._start()
                continue
            self._failures = 0
            self._position += self._stripe
            return batch


# In a row, without a batch in between.
_LOADER_RESTARTS = 3


def build_iterator(
    dataset: Any, train: TrainConfig, *, consumed: int, rank: int, ranks: int, num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro batches of this rank: tokens, labels [b, s] int64, loss_mask [b, s] float32, position_ids."""

    def loader(start: int) -> Any:
        return torch.utils.data.DataLoader(
            dataset,
            batch_sampler=PretrainingSampler(len(dataset), start, train.micro_batch_size, rank, ranks),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=get_device().pins_memory,
            # Without its own, the loader takes its worker seed from the stream that dropout draws from.
            generator=torch.Generator(),
        )

    return _Loading(loader, consumed, train.micro_batch_size * ranks)
