"""The inspection of a token file as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_sharedproj.data.inspection import Report
from megatron_sharedproj.data.manifest import Manifest


def report_lines(report: Report, texts: Mapping[str, Any]) -> list[str]:
    """Counts, lengths, sources, decoded text, what was not checked, warnings and faults.

    Args:
        texts: "samples", "document" and "search" as tools/inspect_data.py --json prints them; each may lack.
    """
    lines = [
        *_manifest_lines(report.manifest),
        *_count_lines(report),
        *(_source_table(report.manifest) if report.manifest else []),
        *_text_lines(texts),
        *(f"not checked: {line}" for line in report.not_checked),
        *(f"warning: {line}" for line in report.warnings),
        *(f"fault: {line}" for line in report.faults),
        "sound" if report.sound else "damaged",
    ]
    return [report.prefix, *(f"  {line}" for line in lines)]


def _manifest_lines(manifest: Manifest | None) -> Iterator[str]:
    if manifest is None:
        return
    split = f"{manifest.split} split, " if manifest.split else ""
    made = f" on {manifest.created}" if manifest.created else ""
    yield f"{split}made{made} by version {manifest.tool_version} with {manifest.tokenizer.description}"
    if manifest.shard is not None:
        yield f"shard {manifest.shard + 1} of {manifest.shards}"
    for name, left_out in (("excluded", manifest.excluded_sources), ("rejected", manifest.rejected)):
        if left_out:
            yield f"{name}: {', '.join(f'{count} {kind}' for kind, count in left_out.items())}"


def _count_lines(report: Report) -> Iterator[str]:
    file, manifest, lengths = report.file, report.manifest, report.lengths
    if file is not None:
        highest = f", highest id {report.max_id}" if report.max_id is not None else ""
        ratio = f", {manifest.bytes_per_token:.4f} text bytes per token" if manifest else ""
        yield f"{file.documents} documents, {file.tokens} tokens ({file.dtype.name}{highest}){ratio}"
    if lengths is not None:
        longer = ""
        if lengths.longer_share is not None:
            longer = f"; {100 * lengths.longer_share:.2f} % are longer than {lengths.seq_length}"
        yield (
            f"tokens per document: min {lengths.min}, median {lengths.median}, mean {lengths.mean:.1f}, "
            f"p95 {lengths.p95}, max {lengths.max}{longer}"
        )


def _source_table(manifest: Manifest) -> list[str]:
    """Counts per source with their shares, the most tokens first."""
    rows = [["source", "documents", "%", "text bytes", "%", "tokens", "%", "bytes per token"]]
    total = manifest.counts
    ordered = sorted(manifest.sources.items(), key=lambda item: (-item[1].tokens, item[0]))
    for name, counts in [*ordered, ("total", total)]:
        row = [printable(name) or "(none)"]
        for value, whole in (
            (counts.documents, total.documents),
            (counts.text_bytes, total.text_bytes),
            (counts.tokens, total.tokens),
        ):
            row += [str(value), f"{100 * value / whole if whole else 0:.2f}"]
        rows.append([*row, f"{counts.bytes_per_token:.4f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return lines


def _text_lines(texts: Mapping[str, Any]) -> Iterator[str]:
    shown = [*texts.get("samples", []), *([texts["document"]] if "document" in texts else [])]
    for item in shown:
        yield f"document {item['document']}:"
        yield from (f"  {line}" for line in printable(item["text"]).split("\n"))
    if "search" in texts:
        search = texts["search"]
        more = "" if search["complete"] else ", and maybe more (--max-results)"
        yield f"{search['text']!r} is in {len(search['matches'])} document(s){more}"
        for match in search["matches"]:
            yield f"  document {match['document']}: {match['excerpt']!r}"


def printable(text: str) -> str:
    """Web text for a terminal: control characters (an escape sequence would be obeyed) as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
