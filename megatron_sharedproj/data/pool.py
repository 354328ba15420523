"""Worker processes that are given tasks one at a time, and replaced when they die.

concurrent.futures gives a pool up when one of its processes dies, and does not say which or on what; here the
task goes to a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

# Makes, in the worker, the function that does a task, called with it and a function to send progress by.
TaskMaker = Callable[..., Callable[[Any, Callable[..., None]], Any]]


@dataclass(frozen=True)
class Event:
    """What a worker reported of its task: kind is progress, done, error or died (while it had a task).

    Attributes:
        value: what was sent, the result, the exception, or the reason in words.
    """

    kind: str
    worker: int
    task: Any
    value: Any


@dataclass
class _Worker:
    number: int
    process: Any
    connection: Any
    task: Any = None


def start_method() -> str:
    """fork where nothing else runs in this process: a worker then starts in milliseconds. Else spawn."""
    alone = sys.platform == "linux" and threading.active_count() == 1
    return "fork" if alone else "spawn"


class WorkerPool:
    """`make(*arguments)` is called once in each process; what it returns does the tasks."""

    def __init__(self, count: int, make: TaskMaker, arguments: tuple[Any, ...]) -> None:
        self._make, self._arguments = make, arguments
        self._context = multiprocessing.get_context(start_method())
        self._workers: dict[int, _Worker] = {}
        self._count = count

    def __enter__(self) -> WorkerPool:
        for number in range(self._count):
            self._start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.process.kill()  # SIGTERM can be lost between a fork and the child's own handler
        for worker in self._workers.values():
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def idle(self) -> list[int]:
        """Numbers of the workers without a task."""
        return [worker.number for worker in self._workers.values() if worker.task is None]

    def give(self, number: int, task: Any) -> None:
        """Hand an idle worker a task. One that has died meanwhile shows in `wait`."""
        worker = self._workers[number]
        worker.task = task
        try:
            worker.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def wait(self, timeout: float) -> Iterator[Event]:
        """What the workers report within `timeout` seconds; a dead one has been replaced when it shows."""
        ready = connection.wait([worker.connection for worker in self._workers.values()], timeout)
        for worker in [worker for worker in self._workers.values() if worker.connection in ready]:
            task = worker.task
            try:
                kind, value = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                why = self._replace(worker)
                if task is not None:  # else nothing is lost
                    yield Event("died", worker.number, task, why)
                continue
            if kind != "progress":
                worker.task = None
            yield Event(kind, worker.number, task, value)

    def restart(self, number: int) -> None:
        """A fresh process for an idle worker: libraries keep caches that grow with what they have seen."""
        worker = self._workers[number]
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self._start(number)

    def _replace(self, worker: _Worker) -> str:
        worker.process.join()
        code = worker.process.exitcode
        worker.connection.close()
        self._start(worker.number)
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"worker {worker.number} (pid {worker.process.pid}) died by {how}{hint}"

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        others = [worker.connection for worker in self._workers.values()]
        # Ctrl-C is answered by this process alone: a worker inherits the blocked signal. SIGTERM must not
        # meet a worker that still has the handler of this process.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads of numpy's own
                forked = self._context.get_start_method() == "fork"
                arguments = (theirs, [ours, *others] if forked else [], self._make, self._arguments)
                process = self._context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        theirs.close()
        self._workers[number] = _Worker(number, process, ours)


def _work(pipe: Any, inherited: list[Any], make: TaskMaker, arguments: tuple[Any, ...]) -> None:
    for other in inherited:  # or a worker would not see that the parent is gone
        other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked child has its parent's handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        work = make(*arguments)
        while True:
            task = pipe.recv()
            result = work(task, lambda *values: pipe.send(("progress", values)))
            pipe.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) or not _travels(error):
            error = RuntimeError(traceback.format_exc())  # a fault of ours: its place has to be known
        pipe.send(("error", error))


def _travels(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
