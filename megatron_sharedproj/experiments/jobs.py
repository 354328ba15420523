"""Commands that run some at a time, each once: what is finished stays, what was interrupted goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sharedproj.config import write_json
from megatron_sharedproj.profiling.progress import ProgressBar

ROOT = Path(__file__).resolve().parents[2]  # of the source tree: jobs run there
_POLL_SECONDS = 0.5
_LINES_SHOWN = 8
_STOP_SECONDS = 120


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of its record and log, ``jobs/NAME.json`` and ``.log``, in the experiment's folder.
        command: its words, run in ROOT; the folder's finished jobs are known by them.
        cost: any unit that is proportional to time.
        after: names of jobs that have to be done before.
        share: how much of it is done by now, from 0 to 1.
    """

    name: str
    command: tuple[str, ...]
    cost: float = 1.0
    after: tuple[str, ...] = ()
    share: Callable[[], float] = lambda: 0.0


def torchrun(processes: int, *words: str) -> tuple[str, ...]:
    """The words of a torchrun launch of this interpreter on this machine."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return (sys.executable, *launch, *words)


def script(path: str, *words: str) -> tuple[str, ...]:
    """The words of a script of the source tree: tools/evaluate.py, say."""
    return (sys.executable, path, *words)


def steps_share(run: Path, steps: int) -> Callable[[], float]:
    """How much of ``steps`` the newest line of a run folder's log.jsonl says is done."""

    def share() -> float:
        try:
            with open(run / "log.jsonl", "rb") as stream:
                stream.seek(max(0, os.path.getsize(run / "log.jsonl") - 4096))
                lines = stream.read().splitlines()[-1:]
            return min(1.0, json.loads(lines[0]).get("iteration", 0) / steps) if lines else 0.0
        except (OSError, ValueError):
            return 0.0

    return share


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    at_once: int = 1,
    places: Sequence[Mapping[str, str]] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Run what has not run yet, with a progress bar over all of it.

    A child gets Ctrl-C too, and is waited for: a training saves first.

    Args:
        jobs: started in this order, those that wait for others (``after``) when these are done.
        at_once: how many run at a time.
        places: instead, environment variables for each that runs at a time (see places_for_runs).
    Raises:
        ValueError: for a finished job that had another command, or one that failed (with its last lines).
        KeyboardInterrupt: saying how much is done.
    """
    records = folder / "jobs"
    records.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not _done_before(job, folder, records)]
    done = {job.name for job in jobs} - {job.name for job in waiting}
    if done:
        say(f"{len(done)} of {len(jobs)} jobs are done already")
    bar = ProgressBar(sum(job.cost for job in waiting))
    behind, running = 0.0, list[_Child]()
    free = list(places or [{}] * at_once)
    try:
        while waiting or running:
            for child in running:
                if child.process.poll() is not None:
                    bar.clear()
                    child.finish()
                    done.add(child.job.name)
                    behind += child.job.cost
                    free.insert(0, child.place)
                    seconds = time.monotonic() - child.start
                    say(f"{child.job.name} ({len(done)} of {len(jobs)}): {seconds:.0f} s")
            running = [child for child in running if child.job.name not in done]
            ready = [job for job in waiting if done.issuperset(job.after)]
            for job in ready[: len(free)]:
                waiting.remove(job)
                running.append(_Child(job, records, free.pop(0)))
            now = sum(child.job.share() * child.job.cost for child in running)
            bar.show(behind + now, ", ".join(child.job.name for child in running))
            time.sleep(_POLL_SECONDS)
    except BaseException as error:
        bar.clear()
        for child in running:
            child.stop()
        if isinstance(error, KeyboardInterrupt):
            text = f"{len(done)} of {len(jobs)} jobs are done; the same command goes on"
            raise KeyboardInterrupt(text) from None
        raise
    bar.clear()


def _done_before(job: Job, folder: Path, records: Path) -> bool:
    record = records / f"{job.name}.json"
    if not record.exists():
        return False
    if json.loads(record.read_text())["command"] != list(job.command[1:]):
        raise ValueError(
            f"{folder}: {job.name} ran there with other settings; give another folder, or delete {record} "
            "and what it made"
        )
    return True


class _Child:
    """A job under way."""

    def __init__(self, job: Job, records: Path, place: Mapping[str, str]):
        self.job, self.start, self.place = job, time.monotonic(), place
        self.log, self.record = records / f"{job.name}.log", records / f"{job.name}.json"
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **place}
        with open(self.log, "w") as output:
            # In a session of its own: a terminal's Ctrl-C reaches it through us only, once.
            self.process = subprocess.Popen(
                job.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def finish(self) -> None:
        """Note that it is done; ValueError if it failed."""
        code = self.process.returncode
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LINES_SHOWN:])
            raise ValueError(f"{self.job.name}: failed with exit code {code}; {self.log} ends with\n{tail}")
        # Without the interpreter: a folder may be gone on with by another environment.
        words, seconds = list(self.job.command[1:]), time.monotonic() - self.start
        write_json(self.record, {"command": words, "seconds": seconds})

    def stop(self) -> None:
        """Interrupt and wait; kill what does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=_STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
