"""Jobs: order, what is done stays, failures and interrupts leave the rest to do."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sharedproj.experiments.jobs import Job, run_jobs, steps_share
from megatron_sharedproj.experiments.statistics import spread

ROOT = Path(__file__).resolve().parents[2]


def job(folder: Path, name: str, *, after: tuple[str, ...] = (), code: str = "") -> Job:
    """Adds its name to a file."""
    line = f"open({str(folder / 'order')!r}, 'a').write({name + ' '!r}); {code}"
    return Job(name, (sys.executable, "-c", line), after=after)


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


@pytest.mark.parametrize("at_once", [1, 3])
def test_each_runs_once_behind_those_it_waits_for(tmp_path: Path, at_once: int) -> None:
    jobs = [job(tmp_path, "c", after=("a", "b")), job(tmp_path, "a"), job(tmp_path, "b", after=("a",))]
    said: list[str] = []
    run_jobs(jobs, tmp_path, at_once=at_once, say=said.append)
    assert order(tmp_path) == ["a", "b", "c"] and len(said) == 3
    run_jobs([*jobs, job(tmp_path, "d")], tmp_path, at_once=at_once, say=said.append)
    assert order(tmp_path) == ["a", "b", "c", "d"]
    assert said[3] == "3 of 4 jobs are done already"


def test_several_at_once(tmp_path: Path) -> None:
    """Each waits for the other's file: alone neither would end."""
    meet = "import time; from pathlib import Path; Path({0!r}).touch()\n"
    meet += "while not Path({1!r}).exists(): time.sleep(.01)"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    jobs = [Job(name, (sys.executable, "-c", meet.format(mine, theirs)))
            for name, mine, theirs in (("one", one, two), ("two", two, one))]  # fmt: skip
    run_jobs(jobs, tmp_path, at_once=2, say=lambda text: None)


def test_each_takes_a_place_of_its_own_and_gives_it_back(tmp_path: Path) -> None:
    code = (
        "import os, time; from pathlib import Path; time.sleep(.3); Path({0!r}).write_text(os.environ['GPU'])"
    )
    jobs = [Job(name, (sys.executable, "-c", code.format(str(tmp_path / name)))) for name in "abcd"]
    run_jobs(jobs, tmp_path, places=[{"GPU": "0"}, {"GPU": "1"}], say=lambda text: None)
    assert sorted((tmp_path / name).read_text() for name in "ab") == ["0", "1"]
    assert {(tmp_path / name).read_text() for name in "cd"} <= {"0", "1"}


def test_a_failure_shows_its_last_lines_and_what_is_done_stays(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", code="raise SystemExit('disk is full')")]
    with pytest.raises(ValueError, match=r"^b: failed with exit code 1; .*b\.log ends with\ndisk is full"):
        run_jobs(jobs, tmp_path, say=lambda text: None)
    run_jobs([jobs[0], job(tmp_path, "b")], tmp_path, say=lambda text: None)
    assert order(tmp_path) == ["a", "b", "b"]


def test_other_settings_are_refused_before_anything_runs(tmp_path: Path) -> None:
    run_jobs([job(tmp_path, "a")], tmp_path, say=lambda text: None)
    changed = [job(tmp_path, "z"), job(tmp_path, "a", code="pass")]
    with pytest.raises(ValueError, match="a ran there with other settings; give another folder, or delete"):
        run_jobs(changed, tmp_path, say=lambda text: None)
    assert order(tmp_path) == ["a"]


_CHILD = """
import time
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
"""
_INTERRUPTED = """
import sys
from pathlib import Path
from megatron_sharedproj.experiments.jobs import Job, run_jobs
jobs = [Job("a", (sys.executable, "-c", sys.argv[2])), Job("b", (sys.executable, "-c", ""))]
try:
    run_jobs(jobs, Path(sys.argv[1]))
except KeyboardInterrupt as interrupt:
    print(interrupt)
"""


def test_ctrl_c_reaches_the_child_and_is_waited_for(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path), _CHILD]
    driver = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would this.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "jobs" / "a.log"
    while not (log.exists() and log.read_text()):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert "0 of 2 jobs are done; the same command goes on" in said
    assert log.read_text().split() == ["up", "saved"]
    assert not list((tmp_path / "jobs").glob("*.json"))


def test_share_of_a_training(tmp_path: Path) -> None:
    share = steps_share(tmp_path, 200)
    assert share() == 0.0
    (tmp_path / "log.jsonl").write_text('{"iteration": 10}\n{"iteration": 50}\n')
    assert share() == 0.25
    (tmp_path / "log.jsonl").write_text('{"iteration": 10}\n{"iterat')
    assert share() == 0.0


def test_spread() -> None:
    assert spread([1.0, 3.0]) == "2.00 +- 1.41"
    assert spread([1.25], 1) == "1.2"
