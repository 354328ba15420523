"""The end of a run: manifests, blend files, and the renames that make its output appear."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import megatron_sharedproj
from megatron_sharedproj.data.assembly import Assembly
from megatron_sharedproj.data.corpus import Corpus, PreprocessOptions
from megatron_sharedproj.data.indexed import token_dtype
from megatron_sharedproj.data.journal import Journal
from megatron_sharedproj.data.manifest import Counts, InputFile, Manifest, TokenizerRecord, utc_now
from megatron_sharedproj.data.outputs import SUFFIXES, Output, blend_path, check_free, output_prefix_of
from megatron_sharedproj.data.tokenizers import Tokenizer


@dataclass
class Summary:
    """One token file of the result."""

    split: str
    prefix: str
    counts: Counts
    sources: Mapping[str, Counts]
    rejected: Mapping[str, int]

    def line(self) -> str:
        """One line for the user."""
        skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rejected.items())) or "0"
        return (
            f"{self.split or 'all'}: {self.counts.documents} documents, {self.counts.tokens} tokens,"
            f" {self.counts.bytes_per_token:.3f} bytes per token, skipped {skipped} -> {self.prefix}.bin"
        )


def publish(
    corpus: Corpus,
    assembly: Assembly,
    journal: Journal,
    output_prefix: str,
    tokenizer: Tokenizer,
    engine: str,
    options: PreprocessOptions,
) -> list[Summary]:
    """Rename everything to its final name; doing it again after an interruption does the rest."""
    folder = journal.folder
    summaries: list[Summary] = []
    renames: list[tuple[Path, Path]] = []
    for output in assembly.outputs.values():
        split = next(split for split in corpus.splits if split.name == output.split)
        for index, shard in enumerate(output.shards):
            prefix = output.prefix(index)
            name = Path(prefix).name
            if (folder / f"{name}.idx").exists():
                manifest = _manifest(corpus, assembly, output, index, tokenizer, engine, options)
                (folder / f"{name}.json.out").write_text(manifest.to_json(), encoding="utf-8")
            sources = dict(sorted(shard.sources.items()))
            rejected = split.rejected if index == 0 else {}
            summaries.append(Summary(output.split, prefix, shard.counts, sources, rejected))
            ours = {".json": ".json.out"}
            renames += [(folder / (name + ours.get(end, end)), Path(prefix + end)) for end in SUFFIXES]
    for old, new in renames:
        if old.suffix == ".bin" and old.exists():
            new.with_suffix(".idx").unlink(missing_ok=True)  # an old index must never meet a new .bin
        if old.exists():
            os.replace(old, new)
    rejects = Path(f"{output_prefix}_{options.text_key}_rejects.jsonl")
    if not assembly.rejects_bytes:
        rejects.unlink(missing_ok=True)  # of what is replaced
    elif assembly.rejects.exists():
        os.replace(assembly.rejects, rejects)
    _remove_further_shards(assembly, options)
    if options.by_source or options.shard_bytes is not None:
        _write_blends(corpus, assembly, output_prefix, options.text_key)
    journal.remove()
    order = {name: index for index, name in enumerate(corpus.order)}
    return sorted(summaries, key=lambda summary: (order[summary.split], summary.prefix))


def check_new(output_prefix: str, splits: Iterable[str], options: PreprocessOptions) -> None:
    """Raises FileExistsError naming the first output file of a finished run that is there already."""
    if options.by_source or options.shard_bytes is not None:
        blends = [blend_path(output_prefix, split, options.text_key) for split in splits]
        for path in (path for path in blends if path.exists()):
            raise FileExistsError(f"{path} exists")
    else:
        check_free(output_prefix_of(output_prefix, split, options.text_key) for split in splits)


def _remove_further_shards(assembly: Assembly, options: PreprocessOptions) -> None:
    """Shards of what is replaced, behind the last one of this run."""
    for output in assembly.outputs.values():
        index = len(output.shards)
        while options.shard_bytes is not None and any(
            os.path.exists(output.prefix(index) + suffix) for suffix in SUFFIXES
        ):
            for suffix in SUFFIXES:
                Path(output.prefix(index) + suffix).unlink(missing_ok=True)
            index += 1


def _write_blends(corpus: Corpus, assembly: Assembly, output_prefix: str, text_key: str) -> None:
    """`WEIGHT PREFIX` of each of several files, as --data-args-path and --data-path take them."""
    for split in corpus.splits:
        rows = [
            f"{shard.tokens} {output.prefix(index)}"
            for (name, _), output in sorted(assembly.outputs.items())
            for index, shard in enumerate(output.shards)
            if name == split.name
        ]
        path = blend_path(output_prefix, split.name, text_key)
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _manifest(
    corpus: Corpus,
    assembly: Assembly,
    output: Output,
    index: int,
    tokenizer: Tokenizer,
    engine: str,
    options: PreprocessOptions,
) -> Manifest:
    split = next(split for split in corpus.splits if split.name == output.split)
    # Paths below their common folder: the manifest travels with the token file to other machines.
    items = [(file, corpus.inputs[file]) for file in split.files]
    paths = [os.path.abspath(item.parent) for _, item in items if isinstance(item, Path)]
    folder = os.path.commonpath(paths) if paths else ""
    inputs = [
        InputFile(
            os.path.relpath(os.path.abspath(item), folder) if isinstance(item, Path) else str(item),
            corpus.sizes[file],
            assembly.hashes.get(file),
        )
        for file, item in items
    ]
    shard = output.shards[index]
    record = TokenizerRecord(
        options.tokenizer["tokenizer_type"],
        tokenizer.describe(),
        tokenizer.vocab_size,
        tokenizer.sha256,
        engine,
        "parsed" if options.parse_special_tokens else "text",
    )
    sharded = options.shard_bytes is not None
    return Manifest(
        tool_version=megatron_sharedproj.__version__,
        split=output.split,
        text_key=options.text_key,
        dtype=token_dtype(tokenizer.vocab_size).name,
        append_eod=options.append_eod,
        eod=tokenizer.eod,
        tokenizer=record,
        counts=shard.counts,
        sources=dict(sorted(shard.sources.items())),
        created=utc_now(),
        cut_document=output.cut and index == len(output.shards) - 1,
        shard=index if sharded else None,
        shards=len(output.shards) if sharded else None,
        excluded_sources=dict(split.excluded),
        rejected=dict(sorted(split.rejected.items())),
        inputs=inputs,
        checksums=shard.checksums,
    )
