"""An output folder is whole or absent, deletes nothing but its own kind, and cleans up after killed runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sharedproj.conversion.staging import check_output, staged_folder

REPO = Path(__file__).resolve().parents[2]


def write(output: Path, text: str = "new", overwrite: bool = False) -> None:
    with staged_folder(output, overwrite) as folder:
        (folder / "record").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out", "with space", "[x]*", "\u6a21\u578b", ".hidden"])
def test_it_appears_and_is_replaced(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "old")
    check_output(tmp_path / name, True, record="record")
    write(tmp_path / name, overwrite=True)
    assert (tmp_path / name / "record").read_text() == "new" and names(tmp_path) == [name]


@pytest.mark.parametrize("target", ["there", "absent"])
def test_a_link_stays_one(target: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    if target == "there":
        write(tmp_path / target, "old")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / target / "record").read_text() == "new"
    assert names(tmp_path) == sorted(["link", target])


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", True) as folder:
        (folder / "record").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "record").read_text() == "old" and names(tmp_path) == ["out"]


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError), staged_folder(tmp_path / "out"):
        write(tmp_path / "out", "another's")
    assert (tmp_path / "out" / "record").read_text() == "another's" and names(tmp_path) == ["out"]


def test_an_old_folder_comes_back_if_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name == "new":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "record").read_text() == "old" and names(tmp_path) == ["out"]


_HANGS = """
import sys, time
from pathlib import Path
from megatron_sharedproj.conversion.staging import staged_folder
with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "record").write_text("half")
    print("there", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_cleaned_up_and_a_live_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.tmp").mkdir()  # not ours
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", _HANGS, str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        write(out)
        assert len(names(tmp_path)) == 3
        process.send_signal(signal.SIGKILL)
    write(out, overwrite=True)
    assert names(tmp_path) == [".out.tmp", "out"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """What was replaced is in the scratch folder, nothing under the name: it comes back."""
    scratch = tmp_path / ".out.tmpabcd_123"
    (scratch / "old").mkdir(parents=True)
    (scratch / "old" / "record").write_text("old")
    (scratch / "lock").touch()
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", True):
        raise RuntimeError
    assert (tmp_path / "out" / "record").read_text() == "old" and names(tmp_path) == ["out"]


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    (mine / "below").mkdir(parents=True)
    write(out)
    with pytest.raises(ValueError, match="--output .*: is not empty; give another folder, or --overwrite"):
        check_output(out, False, record="record")
    with pytest.raises(ValueError, match="holds no export"):
        check_output(mine, True, record="record")
    with pytest.raises(ValueError, match="holds .*input, which --overwrite would delete"):
        (out / "input").mkdir()
        check_output(out, True, record="record", keep=[str(mine), out / "input"])
    monkeypatch.chdir(mine / "below")
    for current in (".", "..", str(mine)):
        with pytest.raises(ValueError, match="is the current folder or holds it"):
            check_output(Path(current), True, record="record")
    with pytest.raises(ValueError, match="is not a folder"):
        check_output(out / "record", True, record="record")
    with pytest.raises(ValueError, match="is not a folder that can be written"):
        check_output(tmp_path / "no" / "parent", True, record="record")
    with pytest.raises(ValueError, match="is a mount point"):
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
        check_output(out, True, record="record")


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with staged_folder(tmp_path / "out") as folder:
            os.close(os.open(folder / "record", os.O_CREAT | os.O_WRONLY, 0o600))
        assert (tmp_path / "out" / "record").stat().st_mode & 0o777 == 0o644
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)
