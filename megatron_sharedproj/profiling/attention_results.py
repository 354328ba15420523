"""A run of the attention benchmark: its table on the screen, and CSV rows that a later run can continue."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from megatron_sharedproj.duration import format_duration
from megatron_sharedproj.profiling.attention_bench import Result, refusal, run_case, sdpa_backend
from megatron_sharedproj.profiling.attention_cases import CASE_FIELDS, Case
from megatron_sharedproj.profiling.roofline import measure_bandwidth, measure_roofline
from megatron_sharedproj.profiling.timing import Machine

COLUMNS = (
    "date", "commit", "device", "torch", "cuda", "threads",
    "op", "implementation", "layout", "dtype", "batch", "seq_q", "seq_k", "heads", "groups", "head_size",
    "causal", "page_size", "ms_median", "ms_p10", "ms_p90", "repeats", "tflops", "gbps_algorithmic", "bytes",
    "percent_of_roofline", "ratio_vs_sdpa_separate", "ratio_vs_sdpa_alias", "max_error",
    "error_ratio_vs_reference_dtype", "peak_memory_mb",
)  # fmt: skip
# What tells one measurement from another.
_IDENTITY = ("device", "threads", "implementation", *CASE_FIELDS)

Row = dict[str, str]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def commit(folder: Path) -> str:
    """The commit that is checked out in `folder`, "+changes" after it where files differ; "" outside git."""
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        head, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head}+changes" if changed else head


def environment(machine: Machine, folder: Path) -> Row:
    """The columns that are the same for a whole run; `folder` is the repository."""
    return {
        "commit": commit(folder),
        "device": machine.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "threads": str(torch.get_num_threads()),
    }


def _case_columns(case: Case, implementation: str) -> Row:
    columns = {name: str(getattr(case, name)) for name in CASE_FIELDS}
    return {**columns, "causal": str(case.causal).lower(), "implementation": implementation}


def row_of(result: Result, run: Mapping[str, str]) -> Row:
    """A result as CSV columns; `run` is its environment()."""
    times, peak = result.times, result.peak_bytes
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **run,
        **_case_columns(result.case, result.implementation),
        "ms_median": _number(times.median * 1e3),
        "ms_p10": _number(times.p10 * 1e3),
        "ms_p90": _number(times.p90 * 1e3),
        "repeats": str(times.repeats),
        "tflops": _number(result.tflops),
        "gbps_algorithmic": _number(result.gbps),
        "bytes": str(result.bytes),
        "percent_of_roofline": _number(result.percent_of_roofline),
        "ratio_vs_sdpa_separate": _number(result.ratios.get("sdpa_separate")),
        "ratio_vs_sdpa_alias": _number(result.ratios.get("sdpa_alias")),
        "max_error": _number(result.error),
        "error_ratio_vs_reference_dtype": _number(result.error_ratio),
        "peak_memory_mb": _number(None if peak is None else peak / 1e6),
    }


class ResultFile:
    """A CSV file that only grows: a case's rows are added together, complete or not at all.

    Args:
        path: the file; made with the first rows.
        resume: continue one that exists.
    Raises:
        ValueError: where it exists and resume is off, or has other columns.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.rows: list[Row] = []
        if not path.exists():
            return
        if not resume:
            raise ValueError(f"--output {path}: exists; add --resume to continue it, or give another name")
        text = path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # the writer was killed in the middle of a row
            path.write_text(complete, encoding="utf-8")
        reader = csv.DictReader(io.StringIO(complete))
        if complete and tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"--output {path}: has other columns than this benchmark's; give another name")
        self.rows = list(reader)

    def missing(self, case: Case, implementations: Iterable[str], run: Mapping[str, str]) -> list[str]:
        """The implementations of a case that the file lacks for this device and number of threads."""
        known = {self._key(row) for row in self.rows}
        keys = {name: self._key({**run, **_case_columns(case, name)}) for name in implementations}
        return [name for name, key in keys.items() if key not in known]

    def add(self, rows: Sequence[Row]) -> None:
        """Append the rows of a case."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not self.path.exists() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerows(rows)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    @staticmethod
    def _key(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in _IDENTITY)


# Heading, column, width, digits; the implementation comes before them.
_TABLE = (
    ("ms", "ms_median", 9, 4), ("p10", "ms_p10", 9, 4), ("p90", "ms_p90", 9, 4), ("repeats", "repeats", 7, 0),
    ("TFLOP/s", "tflops", 8, 3), ("GB/s", "gbps_algorithmic", 7, 3),
    ("% of roof", "percent_of_roofline", 9, 3), ("x separate", "ratio_vs_sdpa_separate", 10, 3),
    ("x alias", "ratio_vs_sdpa_alias", 7, 3), ("error", "max_error", 8, 2),
    ("x plain's", "error_ratio_vs_reference_dtype", 9, 2), ("peak MB", "peak_memory_mb", 8, 4),
)  # fmt: skip
_NAME_WIDTH = 18


def table_header() -> str:
    """The line above the table's rows."""
    return (
        "  " + "implementation".ljust(_NAME_WIDTH) + "".join(f"  {title:>{w}}" for title, _, w, _ in _TABLE)
    )


def table_line(row: Mapping[str, str]) -> str:
    """A row as a line under table_header()."""
    cells = [f"  {_short(row[column], digits):>{width}}" for _, column, width, digits in _TABLE]
    return "  " + row["implementation"].ljust(_NAME_WIDTH) + "".join(cells)


def _short(value: str, digits: int) -> str:
    if not value:
        return "-"
    if not digits:
        return value
    number = float(value)
    if abs(number) >= 10**digits:
        return f"{number:.0f}"
    return f"{number:.{digits}g}"


def benchmark(
    cases: Sequence[Case],
    implementations: Sequence[str],
    machine: Machine,
    budget: float,
    run: Mapping[str, str],
    file: ResultFile | None = None,
) -> list[Row]:
    """Measure cases, printing a table line by line.

    Args:
        implementations: names in IMPLEMENTATIONS; one that cannot run is named with the reason, and left out.
        budget: seconds of measurement for each case.
        run: its environment().
        file: takes each case's rows as soon as they are measured; a case that it has is skipped, but measured
            as a whole again where it lacks an implementation: what is compared comes from one run.
    Returns:
        the file's rows, or those of this run.
    """
    rows = file.rows if file else []
    todo = list(cases)
    if file:
        possible = {case: [x for x in implementations if not refusal(case, x, machine)] for case in cases}
        todo = [case for case in cases if file.missing(case, possible[case], run)]
        if len(todo) < len(cases):
            print(f"{len(cases) - len(todo)} of {len(cases)} cases are in {file.path}")
    if not todo:
        return rows
    cuda = f", CUDA {run['cuda']}" if run["cuda"] else ""
    print(f"{run['device']}, {run['threads']} threads, torch {run['torch']}{cuda}", flush=True)
    roofline = measure_roofline([case.torch_dtype for case in todo], machine)
    print(f"measured roofline: {roofline.how}")
    print(f"{len(todo)} cases, {budget:g} s of measurement each\n{table_header()}")
    start = time.monotonic()
    for index, case in enumerate(todo):
        elapsed = time.monotonic() - start
        left = format_duration(elapsed / index * (len(todo) - index)) if index else "?"
        backend = sdpa_backend(case, machine.device)
        chosen = f"; SDPA: {backend}" if backend else ""
        if case.op == "decode":
            # A shared machine's memory is faster at one time than at another: measured beside each case.
            roofline = replace(roofline, bandwidth=measure_bandwidth(machine)[0])
            chosen += f"; memory: {roofline.bandwidth / 1e9:.4g} GB/s"
        print(f"[{index + 1}/{len(todo)}, ETA {left}] {case}{chosen}", flush=True)
        results, skipped = run_case(case, implementations, machine, roofline, budget)
        new = {result.implementation: row_of(result, run) for result in results}
        for name in implementations:
            print(
                table_line(new[name]) if name in new else f"  {name:{_NAME_WIDTH}}  left out: {skipped[name]}"
            )
        sys.stdout.flush()
        if file:
            file.add(list(new.values()))
        else:
            rows += new.values()
    return rows
