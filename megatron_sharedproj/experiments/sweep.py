"""A grid of short trainings, each a cell with settings: some at a time, each once, results kept at once."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj.experiments.jobs import ROOT
from megatron_sharedproj.profiling.attention_results import commit
from megatron_sharedproj.profiling.progress import ProgressBar
from megatron_sharedproj.profiling.timing import get_machine

RESULTS = "results.jsonl"
_POLL_SECONDS = 0.5

Settings = Mapping[str, Any]


def cell_name(settings: Settings) -> str:
    """Settings in one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _differences(cells: Sequence[Settings]) -> set[str]:
    """What tells cells from one another."""
    keys = {key for cell in cells for key in cell}
    return {key for key in keys if len({json.dumps(cell.get(key)) for cell in cells}) > 1}


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records of a sweep.

    Each has ``settings``, ``result``, ``seconds``, ``commit``, ``date``, ``device`` and ``torch``. A last
    line that a killed run left incomplete is dropped.

    Raises:
        ValueError: naming the file and the line that is no record.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            record["settings"], record["result"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: line {number} is not a result; delete the line, or give another folder"
            ) from None
        records.append(record)
    return records


def run_sweep(
    cells: Sequence[Settings],
    run: Callable[[Settings], dict[str, Any]],
    folder: Path,
    *,
    cost: Callable[[Settings], float] = lambda _: 1.0,
    at_once: int = 1,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run what ``folder/results.jsonl`` lacks, and add a line for each cell as it ends.

    Args:
        cells: settings that JSON can hold, each set once; run in this order.
        run: settings -> what was measured, JSON too. A function of a module (it runs in other processes, on
            one thread each); ValueError for settings that can't be.
        cost: any unit that is proportional to a cell's time.
        at_once: how many run at a time.
    Returns:
        the records (see read_results) of all cells, in the order of ``cells``.
    Raises:
        ValueError: for a cell that failed, named; the others' results are kept.
        KeyboardInterrupt: saying how much is done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(folder / RESULTS)
    found = {_key(record["settings"]): record for record in read_results(folder)}
    waiting = [cell for cell in cells if _key(cell) not in found]
    done = len(cells) - len(waiting)
    if done:
        say(f"{done} of {len(cells)} cells are done already")
    if not waiting:
        return [found[_key(cell)] for cell in cells]
    notes = {"commit": commit(ROOT), "device": get_machine("cpu").name, "torch": torch.__version__}
    bar, behind, shown = ProgressBar(sum(map(cost, waiting))), 0.0, _differences(cells)
    queue, running = list(waiting), dict[Future[Any], Settings]()
    pool = ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _start_worker)
    try:
        while queue or running:
            while queue and len(running) < at_once:
                cell = queue.pop(0)
                running[pool.submit(_timed, run, cell)] = cell
            now = {key: value for key, value in next(iter(running.values())).items() if key in shown}
            bar.show(behind, f"{cell_name(now)} ({done} of {len(cells)} done)")
            ended = wait(running, _POLL_SECONDS, FIRST_COMPLETED).done
            if not ended and _worker_ended(pool):
                raise BrokenProcessPool
            # What succeeded is kept before a failure beside it ends the sweep.
            for future in sorted(ended, key=lambda future: future.exception() is not None):
                cell = running[future]
                result, seconds = _result_of(future, cell)
                del running[future]
                date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                record = {"settings": dict(cell), "result": result, "seconds": seconds, "date": date, **notes}
                _append(folder / RESULTS, record)
                found[_key(cell)] = record
                done, behind = done + 1, behind + cost(cell)
    except BaseException as error:
        bar.clear()
        for process in list((pool._processes or {}).values()):  # no public way to end cells under way
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            text = f"{done} of {len(cells)} cells are done; the same command goes on"
            raise KeyboardInterrupt(text) from None
        if isinstance(error, BrokenProcessPool):  # which of them it was, the pool does not tell
            names = "; ".join(map(cell_name, running.values()))
            text = f"{names}: a process was killed (out of memory?); give a lower --at-once"
            raise ValueError(text) from None
        raise
    pool.shutdown()
    bar.clear()
    return [found[_key(cell)] for cell in cells]


def _worker_ended(pool: ProcessPoolExecutor) -> bool:
    """Whether a worker was killed. CPython's pool misses one that it started while it was waiting already."""
    sentinels = [process.sentinel for process in list((pool._processes or {}).values())]
    return bool(multiprocessing.connection.wait(sentinels, timeout=0))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the parent ends the cells
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """A killed parent leaves its workers waiting for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _timed(run: Callable[[Settings], dict[str, Any]], cell: Settings) -> tuple[dict[str, Any], float]:
    start = time.perf_counter()
    return run(cell), time.perf_counter() - start


def _result_of(future: Future[Any], cell: Settings) -> tuple[dict[str, Any], float]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except ValueError as error:
        raise ValueError(f"{cell_name(cell)}: {error}") from error
    except Exception as error:
        error.add_note(f"in the cell {cell_name(cell)}")
        raise


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)


def _append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
