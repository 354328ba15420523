"""Data sets of the Hugging Face Hub: which copies of SlimPajama exist, and streaming one by its id.

Nothing here is imported or reached unless --dataset-id is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.data.records import SourceError
from megatron_sharedproj.data.sources import SPLITS


@dataclass(frozen=True)
class KnownDataset:
    """A row of the table that --list-datasets prints; `gone` says since when and what was seen."""

    id: str
    content: str
    gone: str = ""


KNOWN_DATASETS = (
    KnownDataset("gmongaras/SlimPajama-627B_Reupload", "all 627B tokens, parquet, about 1.5 TB"),
    KnownDataset("MBZUAI-LLM/SlimPajama-627B-DC", "627B, split by source (RedPajamaX/chunk_N.jsonl.zst)"),
    KnownDataset("venketh/SlimPajama-62B", "one chunk of ten in six files of about 12 GB, .jsonl.zst"),
    KnownDataset("DKYoon/SlimPajama-6B", "a sample of 5.5 million documents, parquet, 14 GB"),
    KnownDataset(
        "HuggingFaceFW/fineweb-edu", "another corpus; its text column is `text`, --dataset-config sample-10BT"
    ),
    KnownDataset(
        "cerebras/SlimPajama-627B",
        "the original: {train,validation,test}/chunkN/*.jsonl.zst, 895 GB",
        gone="reported as not found on the Hub since 2026-02",
    ),
)


def dataset_table() -> str:
    """The table, one line a data set. The ids were taken from public reports, not tried."""
    width = max(len(known.id) for known in KNOWN_DATASETS)
    return "\n".join(
        f"{known.id:{width}}  {known.content}" + (f"; GONE: {known.gone}" if known.gone else "")
        for known in KNOWN_DATASETS
    )


@dataclass(frozen=True)
class HubShard:
    """One shard of a streamed split: what a file is elsewhere."""

    dataset: str
    config: str | None
    revision: str | None
    split: str
    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.dataset}/{self.split}-{self.index:05d}-of-{self.count:05d}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """The shard's rows, streamed in order."""
        stream = _load(self.dataset, self.config, self.revision, self.split)
        if self.count > 1:
            stream = stream.shard(num_shards=self.count, index=self.index)
        yield from stream


def discover_hub(
    dataset: str, config: str | None = None, revision: str | None = None
) -> dict[str, list[HubShard]]:
    """The shards of each split of a data set of the Hub (or of a local directory that `datasets` reads).

    Raises:
        SourceError: for an id that is known to be gone, or one that cannot be loaded; it names others.
    """
    for known in KNOWN_DATASETS:
        if known.id == dataset and known.gone:
            others = ", ".join(other.id for other in KNOWN_DATASETS if not other.gone and "Slim" in other.id)
            raise SourceError(
                f"{dataset}: {known.gone}; use {others}, or --input with a copy that you have downloaded"
            )
    splits = _load(dataset, config, revision, None)
    found: dict[str, list[HubShard]] = {}
    for split, stream in splits.items():
        count = max(1, int(getattr(stream, "num_shards", 1)))
        shards = [HubShard(dataset, config, revision, split, index, count) for index in range(count)]
        found.setdefault(SPLITS.get(split, split), []).extend(shards)
    return found


def _load(dataset: str, config: str | None, revision: str | None, split: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise SourceError(f"{dataset}: streaming it needs datasets; install the [data] extra") from None
    try:
        return load_dataset(dataset, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # its loaders raise many types
        reason = str(error).splitlines()[0] if str(error) else "no message"
        where = "" if Path(dataset).exists() else "; --list-datasets names ids that were reported to exist"
        raise SourceError(f"{dataset}: cannot be loaded ({type(error).__name__}: {reason}){where}") from error
