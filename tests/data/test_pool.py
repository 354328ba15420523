"""Workers that die, fail or are abandoned."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.data.pool import Event, WorkerPool
from megatron_sharedproj.data.readers import FileProblem
from megatron_sharedproj.data.records import SourceError

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 30.0


def make_worker(offset: int) -> Callable[[Any, Callable[..., None]], Any]:
    calls = 0

    def work(task: Any, progress: Callable[..., None]) -> Any:
        nonlocal calls
        calls += 1
        kind, value = task
        if kind == "add":
            progress(value, calls)
            return value + offset
        if kind == "pid":
            return os.getpid()
        if kind == "sleep":
            progress("asleep")
            time.sleep(value)
        if kind == "kill":
            os.kill(os.getpid(), value)
        if kind == "exit":
            os._exit(value)
        if kind == "raise":
            raise value
        return None

    return work


def make_nothing(error: Exception) -> Callable[[Any, Callable[..., None]], Any]:
    raise error


@pytest.fixture(params=["fork", "spawn"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    monkeypatch.setattr("megatron_sharedproj.data.pool.start_method", lambda: request.param)
    with WorkerPool(2, make_worker, (100,)) as pool:
        yield pool


def events(pool: WorkerPool, until: str, count: int = 1) -> list[Event]:
    """Everything up to the `count`-th event of a kind."""
    found: list[Event] = []
    end = time.monotonic() + LIMIT
    while sum(event.kind == until for event in found) < count:
        assert time.monotonic() < end, f"no {until} in {found}"
        found += pool.wait(0.1)
    return found


def test_tasks_progress_and_results(pool: WorkerPool) -> None:
    assert pool.idle() == [0, 1]
    pool.give(0, ("add", 1))
    assert pool.idle() == [1]
    pool.give(1, ("add", 2))
    found = events(pool, "done", 2)
    for number, value in ((0, 1), (1, 2)):
        assert [event for event in found if event.worker == number] == [
            Event("progress", number, ("add", value), (value, 1)),
            Event("done", number, ("add", value), value + 100),
        ]
    assert pool.idle() == [0, 1]
    pool.give(0, ("add", 3))  # the same process: `make` was called once
    assert events(pool, "progress")[-1].value == (3, 2)


def test_nothing_within_the_timeout_is_no_event(pool: WorkerPool) -> None:
    start = time.monotonic()
    assert list(pool.wait(0.05)) == []
    assert 0.04 < time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("task", "how"),
    [
        (("kill", signal.SIGKILL), "signal SIGKILL (out of memory?)"),
        (("kill", signal.SIGUSR1), "signal SIGUSR1"),
        (("exit", 7), "exit code 7"),
    ],
)
def test_a_dead_worker_is_named_and_replaced(pool: WorkerPool, task: Any, how: str) -> None:
    pool.give(1, ("pid", None))
    pid = events(pool, "done")[-1].value
    pool.give(1, task)
    died = events(pool, "died")[-1]
    assert died == Event("died", 1, task, f"worker 1 (pid {pid}) died by {how}")
    assert pool.idle() == [0, 1]
    pool.give(1, ("pid", None))
    assert events(pool, "done")[-1].value not in (pid, os.getpid())


def test_a_worker_that_is_killed_from_outside_while_it_works(pool: WorkerPool) -> None:
    pool.give(0, ("pid", None))
    pid = events(pool, "done")[-1].value
    pool.give(0, ("sleep", LIMIT))
    events(pool, "progress")
    os.kill(pid, signal.SIGKILL)
    died = events(pool, "died")[-1]
    assert died.task == ("sleep", LIMIT) and f"pid {pid}" in died.value
    pool.give(0, ("add", 1))  # the task can be given again
    assert events(pool, "done")[-1].value == 101


def test_a_worker_that_dies_idle_is_replaced_without_loss(pool: WorkerPool) -> None:
    pool.give(0, ("pid", None))
    pid = events(pool, "done")[-1].value
    os.kill(pid, signal.SIGKILL)
    assert list(pool.wait(0.5)) == []
    pool.give(0, ("pid", None))
    assert events(pool, "done")[-1].value != pid


def test_a_task_for_a_worker_that_has_just_died_is_not_lost(pool: WorkerPool) -> None:
    pool.give(0, ("pid", None))
    os.kill(events(pool, "done")[-1].value, signal.SIGKILL)
    time.sleep(0.1)
    pool.give(0, ("add", 1))
    assert events(pool, "died")[-1].task == ("add", 1)


def test_restart_is_another_process(pool: WorkerPool) -> None:
    pool.give(0, ("pid", None))
    pid = events(pool, "done")[-1].value
    pool.restart(0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    pool.give(0, ("pid", None))
    assert events(pool, "done")[-1].value != pid


class OddError(ValueError):
    """Cannot be unpickled: its arguments are not those of the constructor."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ids differ"),
        SourceError("a.jsonl:1: bad"),
        OSError(errno.ENOSPC, "No space left on device", "part"),
    ],
)
def test_errors_come_through_as_they_are(pool: WorkerPool, error: Exception) -> None:
    pool.give(0, ("raise", error))
    raised = events(pool, "error")[-1].value
    assert type(raised) is type(error) and str(raised) == str(error)
    assert not isinstance(error, OSError) or (raised.errno, raised.filename) == (errno.ENOSPC, "part")


@pytest.mark.parametrize("name", ["KeyError: 'x'", "OddError: odd", "FileProblem: f: gone"])
def test_faults_of_ours_come_with_their_place(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    errors = {
        "KeyError: 'x'": KeyError("x"),
        "OddError: odd": OddError(1, "odd"),
        "FileProblem: f: gone": FileProblem("unreadable_file", "f", "gone"),
    }
    monkeypatch.setattr("megatron_sharedproj.data.pool.start_method", lambda: "fork")
    with WorkerPool(1, make_nothing, (errors[name],)) as pool:
        pool.give(0, ("add", 1))
        raised = events(pool, "error")[-1].value
    assert type(raised) is RuntimeError
    assert name in str(raised) and "make_nothing" in str(raised)


def test_leaving_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sharedproj.data.pool.start_method", lambda: "fork")
    with WorkerPool(2, make_worker, (0,)) as pool:
        for number in (0, 1):
            pool.give(number, ("pid", None))
        pids = [event.value for event in events(pool, "done", 2) if event.kind == "done"]
        pool.give(0, ("sleep", LIMIT))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


SCRIPT = """
import sys, time
sys.path[:0] = [{repository!r}, {tests!r}]
from test_pool import make_worker
from megatron_sharedproj.data.pool import WorkerPool
if __name__ == "__main__":
    with WorkerPool(3, make_worker, (0,)) as pool:
        for number in pool.idle():
            pool.give(number, ("pid", None))
        pids = []
        while len(pids) < 3:
            pids += [event.value for event in pool.wait(0.1) if event.kind == "done"]
        pool.give(1, ("sleep", 60))
        print(*pids, flush=True)
        time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(repository=str(REPOSITORY), tests=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(alive, pids))
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_fork_is_for_processes_without_threads() -> None:
    from megatron_sharedproj.data.pool import start_method

    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert start_method() == "spawn"
    finally:
        stop.set()
        thread.join()
