#!/usr/bin/env python3
"""Text to .bin/.idx: tools/preprocess_slimpajama.py beside other tools, as whole processes, in one run.

    python benchmarks/fetch_corpus.py --output corpus/slim
    python benchmarks/preprocess.py --corpus corpus/slim --tokenizer corpus/gpt2 --repeat-input 4 \\
        --datatrove-python VENV/bin/python --megatron-lm Megatron-LM --output results.csv

Each tool tokenizes the same documents with the same tokenizer and number of workers on the same cores:

    ours-zst, ours-jsonl   tools/preprocess_slimpajama.py on the tree's train split, and on the plain .jsonl
    megatron-style         in the manner of Megatron-LM's classic tool: Pool.imap over lines, its builder
    hf-batches             Hugging Face tokenizers, batches on the library's own threads, our writer
    datatrove              datatrove's MegatronDocumentTokenizer on the tree (one .bin a worker)
    megatron-lm            Megatron-LM's tools/preprocess_data.py, from a checkout
    megatron-lm-fast       Megatron-LM's tools/preprocess_data_fast.py --use-gigatoken, from a checkout

A figure is of a whole process, from the start of its interpreter to its end; inputs are in the page cache,
outputs written but (except by ours, which calls fsync) not flushed. Rounds are interleaved. CPU seconds are
user and system time of the process and all its descendants. Peak memory is the proportional set size (PSS,
shared pages counted once) summed over the process tree, sampled every 50 ms, or more rarely where reading it
takes long. --repeat-input K also runs ours on K copies of the input: the difference is its rate without
start-up ("steady": of text seen before, so with warm caches), and the peaks show whether memory grows. Ratios
are to ours on the same kind of input; same_as_ours says whether the .bin has the bytes of ours-jsonl.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Always: this tree, not an installed copy, is what is measured.
sys.path.insert(0, str(ROOT))

from megatron_sharedproj.command_line import Parser, UsageError  # noqa: E402

TOOLS = ("ours", "megatron-style", "hf-batches", "datatrove", "megatron-lm", "megatron-lm-fast")
SLOW_SECONDS = 30.0
SAMPLE_SECONDS = 0.05
PR_SET_CHILD_SUBREAPER = 36
END_OF_TEXT = "<|endoftext|>"
VERSIONS = "megatron-core torch numpy tokenizers fastokens gigatoken zstandard orjson datatrove".split()
COLUMNS = (
    "date commit cpu cores workers tool status rounds documents tokens text_mb wall_s wall_min_s wall_max_s"
    " cpu_s mb_per_s mtok_per_s mtok_per_cpu_s peak_mb wall_ratio cpu_ratio same_as_ours sha256 versions"
).split()
SHOWN = (
    "tool status rounds wall_s cpu_s mb_per_s mtok_per_s mtok_per_cpu_s peak_mb wall_ratio cpu_ratio"
    " same_as_ours"
).split()


# The baselines run as `preprocess.py --baseline NAME ...`, datatrove's with another interpreter.
_baseline_tokenizer: Any = None


def _load_tokenizer(folder: str) -> None:
    global _baseline_tokenizer
    from tokenizers import Tokenizer

    _baseline_tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))


def _encode_line(line: str) -> list[int]:
    text = json.loads(line)["text"]
    ids: list[int] = _baseline_tokenizer.encode(text, add_special_tokens=False).ids
    return [*ids, _baseline_tokenizer.token_to_id(END_OF_TEXT)]


def megatron_style(args: argparse.Namespace) -> None:
    """One JSON line at a time through a pool, in order; Megatron-Core's builder in this process."""
    import multiprocessing

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load_tokenizer(args.tokenizer)
    dtype = DType.optimal_dtype(_baseline_tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{args.prefix}.bin", dtype=dtype)
    with (
        open(args.input, encoding="utf-8") as lines,
        multiprocessing.Pool(args.workers, _load_tokenizer, (args.tokenizer,)) as pool,
    ):
        for ids in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{args.prefix}.idx")


def hf_batches(args: argparse.Namespace) -> None:
    """Batches of 1000 documents through encode_batch_fast on RAYON_NUM_THREADS threads."""
    import numpy as np

    from megatron_sharedproj.data.indexed import IndexedWriter

    _load_tokenizer(args.tokenizer)
    end = _baseline_tokenizer.token_to_id(END_OF_TEXT)
    writer = IndexedWriter(args.prefix, _baseline_tokenizer.get_vocab_size())
    with open(args.input, encoding="utf-8") as lines, writer:
        while texts := [json.loads(line)["text"] for line in islice(lines, 1000)]:
            encodings = _baseline_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            arrays = [np.array([*encoding.ids, end]) for encoding in encodings]
            writer.add(np.concatenate(arrays), np.array([len(a) for a in arrays], dtype=np.int32))
        writer.close()
        writer.publish()


def datatrove(args: argparse.Namespace) -> None:
    """As many tasks as workers: task i takes the files i, i + workers, ..., and writes one .bin.

    Batches of 1000 documents: its default of 10,000 took 13.6 GB here, and is no faster.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    tokenizer = os.path.join(args.tokenizer, "tokenizer.json")
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(args.input),
            MegatronDocumentTokenizer(args.prefix, "out", tokenizer, END_OF_TEXT, batch_size=1000),
        ],
        tasks=args.workers,
        workers=args.workers,
        logging_dir=f"{args.prefix}-logs",
    ).run()


BASELINES: dict[str, Callable[[argparse.Namespace], None]] = {
    "megatron-style": megatron_style,
    "hf-batches": hf_batches,
    "datatrove": datatrove,
}


def run_baseline(argv: list[str]) -> int:
    parser = Parser(description="one baseline, run by the benchmark")
    parser.add_argument("--baseline", choices=sorted(BASELINES), required=True)
    for name in ("--input", "--tokenizer", "--prefix"):
        parser.add_argument(name, required=True)
    parser.add_argument("--workers", type=int, required=True)
    args = parser.parse_args(argv)
    BASELINES[args.baseline](args)
    return 0


@dataclass(frozen=True)
class Sample:
    """One run of a tool. `status` is ok or what went wrong; times in seconds, peak in bytes."""

    status: str
    wall: float
    cpu: float
    peak: int


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # the thread ended meanwhile
            continue
        for child in found:
            yield from _tree(int(child))


def tree_memory(pid: int) -> int:
    """Bytes of proportional set size of a process and its descendants (of resident size without PSS)."""
    total = 0
    for process in _tree(pid):
        try:
            try:
                text = Path(f"/proc/{process}/smaps_rollup").read_text()
                total += int(text.partition("\nPss:")[2].split(maxsplit=1)[0]) << 10
            except (PermissionError, IndexError):
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                total += pages * resource.getpagesize()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return total


def measure(command: list[str], env: dict[str, str], cores: set[int], timeout: float, log: Path) -> Sample:
    """Run a command on `cores`, its output into `log`; its whole tree is ended at the timeout."""
    # The CPU time of a tool's orphans counts too: this process becomes their parent.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    peak, done = 0, threading.Event()

    def sample(pid: int) -> None:
        nonlocal peak
        while not done.is_set():
            began = time.perf_counter()
            peak = max(peak, tree_memory(pid))
            # At most a twentieth of one core goes to the measurement.
            done.wait(max(SAMPLE_SECONDS, 20 * (time.perf_counter() - began)))

    before, start = _children_cpu(), time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    sampler = threading.Thread(target=sample, args=(process.pid,), daemon=True)
    limit = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
    try:
        sampler.start()
        limit.start()
        # Popen.wait(timeout) polls, 50 ms late at worst. Not reaped yet: its id stays its own for killpg.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    finally:
        wall = time.perf_counter() - start
        limit.cancel()
        done.set()
        os.killpg(process.pid, signal.SIGKILL)  # its own session: what it left behind, or Ctrl-C here
        process.wait()
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-process.pid, 0)
    sampler.join()
    if wall >= timeout:
        status = f"stopped after {timeout:g} s"
    else:
        status = "ok" if process.returncode == 0 else f"failed: {_last_line(log)}"
    return Sample(status, wall, _children_cpu() - before, peak)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip().replace(f"{ROOT}/", "")[:200] if lines else "no output"


@dataclass
class Tool:
    """What to run with `python`; "{out}" in `command` stands for the folder that its .bin files go to."""

    name: str
    python: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    compared_with: str = "ours-jsonl"
    copies: int = 1
    shards: bool = False  # one .bin a worker: files interleaved
    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    sha256: str = ""
    checkout: Path | None = None

    @property
    def status(self) -> str:
        bad = [sample.status for sample in self.samples if sample.status != "ok"]
        return bad[0] if bad else "ok" if self.samples else "not run"


def read_index(bin_file: Path) -> tuple[list[int], int]:
    """(document lengths in tokens, bytes of a token) of a .bin, from its .idx."""
    data = bin_file.with_suffix(".idx").read_bytes()
    _, _, code, count, _ = struct.unpack_from("<9sQBQQ", data)
    lengths = struct.unpack_from(f"<{count}i", data, struct.calcsize("<9sQBQQ"))
    return list(lengths), {4: 4, 8: 2}[code]


def inspect_output(tool: Tool, folder: Path, file_documents: list[int]) -> None:
    """Count a tool's tokens and hash its .bin; files spread over workers are hashed in the input's order."""
    files = sorted(folder.rglob("*.bin"))
    indices = [read_index(file) for file in files]
    tool.documents = sum(len(lengths) for lengths, _ in indices)
    tool.tokens = sum(sum(lengths) for lengths, _ in indices)
    if not tool.shards and len(files) != 1:
        raise UsageError(f"{tool.name} left {len(files)} .bin files where one was expected")
    digest, taken = hashlib.sha256(), [0] * len(files)
    streams = [open(file, "rb") for file in files]
    for index, count in enumerate(file_documents if tool.shards else ()):
        worker = index % len(files)
        lengths, width = indices[worker]
        digest.update(streams[worker].read(sum(lengths[taken[worker] : taken[worker] + count]) * width))
        taken[worker] += count
    for stream in streams:  # all of a single file; of shards nothing, unless a tool wrote more than it read
        while block := stream.read(1 << 24):
            digest.update(block)
        stream.close()
    tool.sha256 = digest.hexdigest()


def build_tools(args: argparse.Namespace, work: Path) -> list[Tool]:
    """The tools that --only names and that are there; a missing one is skipped with its reason."""
    tree, plain = Path(args.corpus, "train"), Path(f"{args.corpus.rstrip('/')}.jsonl")
    for path in (tree, plain, Path(args.tokenizer, "tokenizer.json")):
        if not path.exists():
            raise UsageError(f"{path}: no such file or directory; benchmarks/fetch_corpus.py makes it")
    wanted = args.only or TOOLS
    tools: list[Tool] = []
    model = "--append-eod --tokenizer-type HuggingFaceTokenizer --tokenizer-model".split() + [args.tokenizer]
    common = ["--workers", str(args.workers)]

    def ours(name: str, source: Path, copies: int = 1) -> None:
        command = [str(ROOT / "tools/preprocess_slimpajama.py"), "--input", str(source), *common, *model]
        command += ["--overwrite", "--output-prefix", "{out}/ours"]
        tools.append(Tool(name, sys.executable, command, compared_with=name, copies=copies))

    def baseline(name: str, python: str, source: Path, env: dict[str, str], **more: Any) -> None:
        flags = ["--input", str(source), "--tokenizer", args.tokenizer, "--prefix", "{out}/out", *common]
        tools.append(Tool(name, python, [str(Path(__file__)), "--baseline", name, *flags], env, **more))

    def megatron_lm(name: str, script: Path, *flags: str) -> None:
        command = [str(script), "--input", str(plain), "--output-prefix", "{out}/out", *model, *flags]
        # Without it an installed Megatron-Core wins over the checkout, which the tool appends to its path.
        path = {"PYTHONPATH": str(script.parents[1])}
        tools.append(Tool(name, args.megatron_lm_python, command, path, checkout=script.parents[1]))

    if "ours" in wanted:
        ours("ours-zst", tree)
        ours("ours-jsonl", plain)
        if args.repeat_input > 1:
            k = args.repeat_input
            ours(f"ours-zst x{k}", _copies(sorted(tree.rglob("*.zst")), work / "zst" / "train", k), k)
            ours(f"ours-jsonl x{k}", _copies([plain], work / "plain", k), k)
    if "megatron-style" in wanted:
        # The library forbids its threads after a fork, and warns about each one.
        baseline("megatron-style", sys.executable, plain, {"TOKENIZERS_PARALLELISM": "false"})
    if "hf-batches" in wanted:
        threads = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(args.workers)}
        baseline("hf-batches", sys.executable, plain, threads)
    if "datatrove" in wanted:
        if args.datatrove_python is None:
            print("skipping datatrove: no --datatrove-python", file=sys.stderr)
        else:
            more: dict[str, Any] = {"compared_with": "ours-zst", "shards": True}
            baseline("datatrove", args.datatrove_python, tree, {}, **more)
    for name, script, flags in (
        ("megatron-lm", "preprocess_data.py", common),
        ("megatron-lm-fast", "preprocess_data_fast.py", ["--use-gigatoken"]),
    ):
        if name not in wanted:
            continue
        if args.megatron_lm is None:
            print(f"skipping {name}: no --megatron-lm checkout", file=sys.stderr)
            continue
        path = Path(args.megatron_lm, "tools", script).resolve()
        if not path.is_file():
            raise UsageError(f"--megatron-lm {args.megatron_lm}: has no tools/{script}; name a checkout")
        megatron_lm(name, path, *flags)
    if not tools:
        raise UsageError("nothing to run; see the reasons above")
    return tools


def _copies(files: list[Path], folder: Path, count: int) -> Path:
    """`count` times the files, as hard links where they can be: a symbolic link is the same file again."""
    for copy in range(count):
        for index, file in enumerate(files):
            target = folder / f"copy{copy}" / f"file{index}{''.join(file.suffixes)}"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
    return folder


def run_rounds(tools: list[Tool], args: argparse.Namespace, work: Path, file_documents: list[int]) -> None:
    """Interleaved rounds over the tools, each with what runs and the time left."""
    cores = set(sorted(os.sched_getaffinity(0))[: args.cores or args.workers])
    for number in range(args.repeats):
        for position, tool in enumerate(tools):
            is_slow = any(sample.wall > SLOW_SECONDS for sample in tool.samples)
            if tool.samples and (tool.status != "ok" or is_slow and number >= args.slow_repeats):
                continue
            left = _time_left(tools, position, number, args)
            print(f"round {number + 1}/{args.repeats}: {tool.name}{left}", file=sys.stderr, flush=True)
            folder = work / "out"
            folder.mkdir()
            os.sync()  # what the tool before it wrote is not on this one's bill
            log = work / "log.txt"
            command = [tool.python, *(part.replace("{out}", str(folder)) for part in tool.command)]
            tool.samples.append(measure(command, tool.env, cores, args.timeout, log))
            last = tool.samples[-1]
            if last.status == "ok" and not tool.sha256:
                inspect_output(tool, folder, file_documents)
            note = "" if last.status == "ok" else f", {last.status}"
            print(f"  {last.wall:.1f} s, peak {last.peak / 1e6:.0f} MB{note}", file=sys.stderr, flush=True)
            shutil.rmtree(folder)


def _time_left(tools: list[Tool], position: int, number: int, args: argparse.Namespace) -> str:
    seconds = 0.0
    for index, tool in enumerate(tools):
        if not tool.samples:
            return f" (its limit is {args.timeout:g} s)"
        runs = min(args.repeats, args.slow_repeats) if tool.samples[-1].wall > SLOW_SECONDS else args.repeats
        done = number + (index < position)
        seconds += max(0, runs - done) * tool.samples[-1].wall * (tool.status == "ok")
    return f" (about {seconds:.0f} s left)"


class Figures(NamedTuple):
    """Medians over a tool's runs (seconds), and what it made of how much; or a difference of two such."""

    wall: float
    cpu: float
    tokens: float
    text_bytes: float

    @classmethod
    def of(cls, tool: Tool, text_bytes: int) -> Figures:
        walls, cpus = [s.wall for s in tool.samples], [s.cpu for s in tool.samples]
        return cls(statistics.median(walls), statistics.median(cpus), tool.tokens, text_bytes * tool.copies)


def rows_of(tools: list[Tool], text_bytes: int) -> list[dict[str, str]]:
    """One row a tool, and one of ours' rate without start-up; empty cells where a tool failed."""
    by_name = {tool.name: tool for tool in tools if tool.status == "ok"}
    rows = []
    for tool in tools:
        row = {"tool": tool.name, "status": tool.status, "rounds": str(len(tool.samples))}
        row["versions"] = _versions(tool.python, tool.checkout)
        rows.append(row)
        if tool.status != "ok":
            continue
        found = Figures.of(tool, text_bytes)
        row |= _rates(found)
        row["wall_min_s"] = f"{min(sample.wall for sample in tool.samples):.2f}"
        row["wall_max_s"] = f"{max(sample.wall for sample in tool.samples):.2f}"
        row["peak_mb"] = f"{max(sample.peak for sample in tool.samples) / 1e6:.0f}"
        row["documents"], row["sha256"] = str(tool.documents), tool.sha256
        ours = by_name.get(tool.compared_with)
        if ours is not None and tool.copies == 1:
            base = Figures.of(ours, text_bytes)
            row["wall_ratio"] = f"{found.wall / base.wall:.2f}"
            row["cpu_ratio"] = f"{found.cpu / base.cpu:.2f}"
        reference = by_name.get("ours-jsonl")
        if reference is not None and tool is not reference and tool.copies == 1:
            row["same_as_ours"] = "yes" if tool.sha256 == reference.sha256 else "no"
        small = by_name.get(tool.name.partition(" x")[0])
        if tool.copies > 1 and small is not None:
            base = Figures.of(small, text_bytes)
            difference = Figures(*(big - less for big, less in zip(found, base, strict=True)))
            if difference.wall > 0 and difference.cpu > 0:
                steady = {"tool": f"{small.name} steady", "status": "ok", "versions": row["versions"]}
                rows.append({**steady, "rounds": row["rounds"], **_rates(difference)})
    return rows


def _rates(found: Figures) -> dict[str, str]:
    return {
        "tokens": f"{found.tokens:.0f}",
        "text_mb": f"{found.text_bytes / 1e6:.1f}",
        "wall_s": f"{found.wall:.2f}",
        "cpu_s": f"{found.cpu:.2f}",
        "mb_per_s": f"{found.text_bytes / 1e6 / found.wall:.2f}",
        "mtok_per_s": f"{found.tokens / 1e6 / found.wall:.3f}",
        "mtok_per_cpu_s": f"{found.tokens / 1e6 / found.cpu:.3f}",
    }


def _versions(python: str, checkout: Path | None) -> str:
    """What the tool's interpreter has installed, of what matters here, and the version of a checkout."""
    script = (
        "import sys, platform, importlib.metadata as m\nprint('python', platform.python_version(), end='')\n"
        "for name in sys.argv[1:]:\n  try: print(';', name, m.version(name), end='')\n"
        "  except m.PackageNotFoundError: pass"
    )
    done = subprocess.run([python, "-c", script, *VERSIONS], capture_output=True, text=True, check=False)
    if checkout is None:
        return done.stdout.strip()
    from megatron_sharedproj.profiling.attention_results import commit

    info = (checkout / "megatron/core/package_info.py").read_text()
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", info, re.MULTILINE)
    return f"{done.stdout.strip()}; Megatron-LM checkout {'.'.join(numbers)} {commit(checkout)}".strip()


def count_corpus(corpus: str) -> tuple[int, list[int]]:
    """(UTF-8 bytes of the train texts, documents of each .zst file in order); fills the page cache."""
    import zstandard

    text_bytes, documents = 0, []
    for file in sorted(Path(corpus, "train").rglob("*.zst")):
        with open(file, "rb") as stream:
            data = zstandard.ZstdDecompressor().stream_reader(stream).read()
        lines = data.splitlines()
        text_bytes += sum(len(json.loads(line)["text"].encode()) for line in lines)
        documents.append(len(lines))
    Path(f"{corpus.rstrip('/')}.jsonl").read_bytes()
    return text_bytes, documents


def print_table(rows: Iterable[dict[str, str]]) -> None:
    table = [SHOWN, *([row.get(name, "") for name in SHOWN] for row in rows)]
    widths = [min(40, max(len(line[i]) for line in table)) for i in range(len(SHOWN))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--corpus", required=True, metavar="DIR", help="a tree of fetch_corpus.py")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="has tokenizer.json")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of each tool (default: 2)")
    parser.add_argument("--cores", type=int, metavar="N", help="to pin each tool to (default: --workers)")
    parser.add_argument("--only", metavar="NAMES", help=f"comma-separated, of {', '.join(TOOLS)}")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")
    slow = f"rounds of a tool that takes over {SLOW_SECONDS:g} s (default: 3)"
    parser.add_argument("--slow-repeats", type=int, default=3, metavar="N", help=slow)
    parser.add_argument("--repeat-input", type=int, default=1, metavar="K", help="also ours on K copies")
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS", help="of one run")
    parser.add_argument("--datatrove-python", metavar="PATH", help="an interpreter that has datatrove")
    parser.add_argument("--megatron-lm", metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-lm-python", default=sys.executable, metavar="PATH", help="default: this")
    parser.add_argument("--work", metavar="DIR", help="for outputs, 2 bytes a token (default: temporary)")
    parser.add_argument("--output", metavar="CSV", help="write the figures there, too")
    return parser


def run(args: argparse.Namespace) -> int:
    for flag in ("workers", "repeats", "slow_repeats", "repeat_input"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: use 1 or more")
    args.only = args.only.split(",") if args.only else None
    unknown = [name for name in args.only or () if name not in TOOLS]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: no such tool; known are {', '.join(TOOLS)}")
    with tempfile.TemporaryDirectory(prefix="preprocess-benchmark-", dir=args.work) as folder:
        work = Path(folder)
        tools = build_tools(args, work)
        text_bytes, file_documents = count_corpus(args.corpus)
        print(f"{sum(file_documents)} documents, {text_bytes / 1e6:.1f} MB of text", file=sys.stderr)
        run_rounds(tools, args, work, file_documents)
    rows = rows_of(tools, text_bytes)
    # These import torch, whose memory no fork of a tool should copy.
    from megatron_sharedproj.profiling.attention_results import commit
    from megatron_sharedproj.profiling.timing import Machine

    common = {
        "date": date.today().isoformat(),
        "commit": commit(ROOT),
        "cpu": Machine().name,
        "cores": str(args.cores or args.workers),
        "workers": str(args.workers),
    }
    print_table(rows)
    if args.output:
        with open(args.output, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows({**common, **row} for row in rows)
    return 0 if all(tool.status == "ok" for tool in tools) else 1


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all ran, 1 a tool failed or ran into its limit, 2 a mistake in the flags, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if "--baseline" in argv[:1]:
        return run_baseline(argv)
    try:
        return run(build_parser().parse_args(argv))
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
