"""Sweeps: each cell once, whatever ends a run before its time."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sharedproj.experiments.sweep import RESULTS, read_results, run_sweep

ROOT = Path(__file__).resolve().parents[2]


def run_one(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell is told to do, in a worker."""
    if "wait_for" in settings:
        while not Path(settings["wait_for"]).exists():
            time.sleep(0.01)
    if "pid_file" in settings:
        Path(settings["pid_file"]).write_text(str(os.getpid()))
        time.sleep(600)
    if settings.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.get("fail"):
        Path(settings["fail"]).touch()
        raise settings.get("bug") and RuntimeError("a bug") or ValueError("lists of 0")
    return {"double": 2 * settings["n"], "process": os.getpid(), "threads": torch.get_num_threads()}


def no_output(_: str) -> None:
    pass


def test_each_once_in_order_and_gone_on_with(tmp_path: Path) -> None:
    first = run_sweep([{"n": 2}, {"n": 1}], run_one, tmp_path, say=no_output)
    assert [record["result"]["double"] for record in first] == [4, 2]
    assert {record["result"]["threads"] for record in first} == {1}
    assert os.getpid() not in {record["result"]["process"] for record in first}
    assert set(first[0]) == {"settings", "result", "seconds", "date", "commit", "device", "torch"}
    assert read_results(tmp_path) == first
    # A killed run's last line, and the results of other settings.
    with (tmp_path / RESULTS).open("a") as stream:
        stream.write(json.dumps({"settings": {"n": 1, "lr": 0.1}, "result": {"double": 9}}) + "\n")
        stream.write('{"settings": {"n": 3}, "resu')
    said: list[str] = []
    cells = [{"n": 1}, {"n": 3}, {"n": 2}]
    second = run_sweep(cells, run_one, tmp_path, say=said.append)
    assert [record["result"]["double"] for record in second] == [2, 6, 4]
    assert second[0] == first[1] and second[2] == first[0] and said == ["2 of 3 cells are done already"]
    assert len(read_results(tmp_path)) == 4  # the other settings' line too
    text = (tmp_path / RESULTS).read_bytes()
    assert run_sweep(cells, run_one, tmp_path, say=no_output) == second
    assert (tmp_path / RESULTS).read_bytes() == text


def test_a_failing_cell_is_named_and_earlier_results_are_kept(tmp_path: Path) -> None:
    failed = str(tmp_path / "failed")
    cells = [{"n": 1}, {"n": 2, "fail": failed, "bug": True}, {"n": 3}]
    with pytest.raises(RuntimeError, match="a bug") as caught:
        run_sweep(cells, run_one, tmp_path, say=no_output)
    assert f"in the cell n 2, fail {failed}, bug True" in caught.value.__notes__
    assert [record["settings"] for record in read_results(tmp_path)] == [{"n": 1}]


def test_what_succeeded_beside_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have ended when the sweep looks, whichever it is handed first."""
    from megatron_sharedproj.experiments import sweep

    def wait_for_all(futures: Any, *_: Any) -> Any:
        return original(futures)

    original = sweep.wait
    monkeypatch.setattr(sweep, "wait", wait_for_all)
    cells = [{"n": 1, "fail": str(tmp_path / "failed")}, {"n": 2}, {"n": 3}]
    with pytest.raises(ValueError, match="^n 1, fail .*: lists of 0$"):
        run_sweep(cells, run_one, tmp_path, at_once=3, say=no_output)
    assert {record["settings"]["n"] for record in read_results(tmp_path)} == {2, 3}


def test_a_killed_worker_names_all_that_ran(tmp_path: Path) -> None:
    never = str(tmp_path / "never")
    cells = [{"n": 1, "wait_for": never}, {"n": 2, "kill": True}]
    with pytest.raises(ValueError, match=r"n 1, .*; n 2, kill True: a process was killed .*--at-once"):
        run_sweep(cells, run_one, tmp_path, at_once=2, say=no_output)
    assert read_results(tmp_path) == []


def test_a_worker_that_the_pool_does_not_watch_yet_is_missed_by_no_sweep() -> None:
    """As ProcessPoolExecutor keeps them: one that waits, then one that was killed."""
    from megatron_sharedproj.experiments.sweep import _worker_ended

    waiting, killed = (
        multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,)) for _ in "ab"
    )
    pool = types.SimpleNamespace(_processes={1: waiting, 2: killed})
    try:
        waiting.start(), killed.start()
        assert not _worker_ended(pool)
        killed.kill()
        killed.join()
        assert _worker_ended(pool)
        pool._processes = None  # what a broken pool leaves
        assert not _worker_ended(pool)
    finally:
        for process in (waiting, killed):
            process.kill()
            process.join()


def test_several_at_once(tmp_path: Path) -> None:
    """The first waits for what the second leaves."""
    mark = str(tmp_path / "mark")
    cells = [{"n": 1, "wait_for": mark}, {"n": 2, "wait_for": str(tmp_path)}]
    with pytest.raises(ValueError, match="n 3"):
        run_sweep([*cells, {"n": 3, "fail": mark}], run_one, tmp_path, at_once=2, say=no_output)
    assert {"n": 2, "wait_for": str(tmp_path)} in [record["settings"] for record in read_results(tmp_path)]


_DRIVER = """
import sys
from pathlib import Path
from megatron_sharedproj.experiments.sweep import run_sweep
from test_sweep import run_one
try:
    run_sweep([{"n": 1}, {"n": 2, "pid_file": sys.argv[2]}], run_one, Path(sys.argv[1]))
except KeyboardInterrupt as interrupt:
    print(interrupt)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_keeps_what_is_done_and_leaves_no_process(tmp_path: Path, how: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    pid_file = tmp_path / "pid"
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(tmp_path), str(pid_file)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so would this.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not (pid_file.exists() and pid_file.read_text()):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(how)
    said, _ = driver.communicate(timeout=120)
    if how == signal.SIGINT:
        assert said == "1 of 2 cells are done; the same command goes on\n"
    assert [record["settings"] for record in read_results(tmp_path)] == [{"n": 1}]
    worker = int(pid_file.read_text())
    end = time.monotonic() + 60
    while _alive(worker):
        assert time.monotonic() < end, "the worker goes on without its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("line", ["not JSON", "[]", '{"settings": {}}'])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / RESULTS).write_text('{"settings": {}, "result": {}}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl: line 2 is not a result; delete the line"):
        run_sweep([{"n": 1}], run_one, tmp_path, say=no_output)
    assert line in (tmp_path / RESULTS).read_text()


def test_an_empty_folder_has_no_results(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
