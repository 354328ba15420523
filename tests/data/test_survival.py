"""Runs that are killed, interrupted, starved and fed with damaged files end in the bytes of a calm run."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from disturbed_runs import TOOL, Launcher

from megatron_sharedproj.data.inspection import validate_indexed
from megatron_sharedproj.data.tokenizers import train_bpe

SENTENCE = "The state of the union is the sum of its parts, caf\u00e9 and \u6f22\u5b57 included. "


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe([SENTENCE], 300, directory)
    return str(directory)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: str) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"), tokenizer_dir)
    yield launcher
    launcher.close()


def documents(name: str, count: int) -> str:
    sources = ("RedPajamaC4", "RedPajamaBook", "RedPajamaGithub")
    numbers = random.Random(name)
    return "".join(
        json.dumps(
            {
                "text": f"{name} {index} {numbers.random()}. " + SENTENCE * numbers.randint(1, 9),
                "meta": {"redpajama_set_name": numbers.choice(sources)},
            }
        )
        + "\n"
        for index in range(count)
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 units in every format, with bad records in each file that has lines."""
    root = tmp_path_factory.mktemp("tree")
    for directory in ("train/chunk1", "train/chunk2", "validation"):
        (root / directory).mkdir(parents=True)
    bad = '{"text": 3}\n{\n{"text": ""}\n'

    def mixed(name: str, count: int) -> bytes:
        return (documents(name, count // 2) + bad + documents(name + "b", count // 2) + bad).encode()

    (root / "train/chunk1/a.jsonl.zst").write_bytes(zstandard.compress(mixed("a", 500)))
    (root / "train/chunk1/b.jsonl").write_bytes(mixed("b", 200))
    (root / "train/chunk1/c.jsonl.zst").write_bytes(
        zstandard.compress(mixed("c", 100)) + zstandard.compress(mixed("cut", 40))[:-20]
    )
    (root / "train/chunk2/d.jsonl.gz").write_bytes(gzip.compress(mixed("d", 100)))
    rows = [json.loads(line) for line in documents("rows", 100).splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), root / "train/chunk2/e.parquet", row_group_size=10)
    (root / "validation/a.jsonl").write_bytes(mixed("held out", 20))
    return root


def contents(directory: Path) -> dict[str, Any]:
    """Every file by name; of manifests all but the time, and of blends no directory."""
    found: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
            assert found[path.name].pop("created")
        elif path.name.endswith("_blend.txt"):
            found[path.name] = path.read_text().replace(str(directory), "")
        else:
            found[path.name] = path.read_bytes()
    return found


PLAIN = ("--on-error", "skip")
DIVIDED = (*PLAIN, "--split-by-source", "--shard-size", "20000")
MODES = {
    "plain": PLAIN,
    "divided": DIVIDED,
    "shards": (*PLAIN, "--shard-size", "50000"),
    "budget": (*PLAIN, "--target-tokens", "90000", "--splits", "train"),
}


@pytest.fixture(scope="module")
def calm(
    launch: Launcher, tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """What an undisturbed run of each mode gives."""
    found = {}
    for name, flags in MODES.items():
        directory = tmp_path_factory.mktemp(name)
        run = launch(tree, directory / "x", *flags, "--workers", "1")
        assert run.code == 0, run.err
        found[name] = contents(directory)
    yield found


def test_a_calm_run_is_what_the_others_are_compared_with(calm: dict[str, dict[str, Any]]) -> None:
    assert list(calm["plain"]) == [
        "x_text_rejects.jsonl",
        *(f"x_train_text_document.{suffix}" for suffix in ("bin", "idx", "json")),
        *(f"x_validation_text_document.{suffix}" for suffix in ("bin", "idx", "json")),
    ]
    manifest = calm["plain"]["x_train_text_document.json"]
    assert manifest["rejected"]["truncated_file"] == 1 and manifest["rejected"]["invalid_json"] >= 6
    assert all(item["sha256"] for item in manifest["inputs"])
    assert sum(name.endswith(".bin") for name in calm["divided"]) > 6
    assert "x_train_text_blend.txt" in calm["divided"]
    assert calm["budget"]["x_train_text_document.json"]["counts"]["tokens"] == 90000


def clear(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def killed_runs(
    launch: Launcher, tree: Path, directory: Path, mode: str, kills: int, expected: dict[str, Any], seed: str
) -> int:
    """Kill runs at random moments, resuming each one until it is done, and again from the start."""
    numbers, rounds = random.Random(seed), 0
    directory.mkdir()
    length = launch(tree, directory / "x", *MODES[mode], "--overwrite").seconds
    resumed = False
    while kills:
        if not resumed:
            clear(directory)
            rounds += 1
        moment = numbers.uniform(0.0, length)
        run = launch(tree, directory / "x", *MODES[mode], signal=signal.SIGKILL, after=moment)
        assert run.code in (0, -signal.SIGKILL), run.err
        resumed = run.code != 0
        kills -= resumed
        if not resumed:
            assert contents(directory) == expected
        elif list(directory.glob("x_*_document*.idx")) and not list(directory.glob("*.unfinished/[!l]*")):
            resumed = False  # killed when all was done
    finish(launch, tree, directory, MODES[mode])
    assert contents(directory) == expected
    return rounds


@pytest.mark.parametrize("mode", ["plain", "divided"])
def test_killed_at_random_moments(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, dict[str, Any]], mode: str
) -> None:
    killed_runs(launch, tree, tmp_path / "out", mode, 10, calm[mode], mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_killed_thirty_times(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, dict[str, Any]], mode: str
) -> None:
    assert killed_runs(launch, tree, tmp_path / "out", mode, 30, calm[mode], mode + " slow") > 1


def finish(launch: Launcher, source: Path, directory: Path, flags: tuple[str, ...]) -> None:
    """Resume a run, unless all was there and nothing but its empty folder was left to remove."""
    folder = directory / "x_text.unfinished"
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if left <= {"lock"} and list(directory.glob("x_*_document*.idx")):
        (folder / "lock").unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()
        return
    run = launch(source, directory / "x", *flags)
    assert run.code == 0, run.err


def killed_at_calls(
    launch: Launcher, source: Path, directory: Path, flags: tuple[str, ...], expected: Any, step: int
) -> int:
    """Kill a run before its k-th change of names or flush to disk, for every `step`-th k, and resume it."""
    directory.mkdir()
    call = 1
    while True:
        clear(directory)
        names = ["replace", "unlink", "fsync", "truncate", "rmdir"]
        run = launch(source, directory / "x", *flags, names=names, calls=call)
        if run.code == 0:
            assert contents(directory) == expected
            return call
        assert run.code == -signal.SIGKILL, run.err
        finish(launch, source, directory, flags)
        assert contents(directory) == expected, call
        call += step


@pytest.fixture(scope="module")
def few_units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    (root / "train").mkdir()
    (root / "train" / "a.jsonl").write_text(documents("a", 8) + "{\n" + documents("b", 4))
    (root / "validation").mkdir()
    (root / "validation" / "a.jsonl").write_text(documents("c", 3))
    return root


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        (PLAIN, 2),
        ((*PLAIN, "--split-by-source", "--shard-size", "1000"), 9),
        pytest.param(PLAIN, 1, marks=pytest.mark.slow),
        pytest.param((*PLAIN, "--split-by-source", "--shard-size", "1000"), 1, marks=pytest.mark.slow),
        pytest.param((*PLAIN, "--shard-size", "2000"), 1, marks=pytest.mark.slow),
    ],
)
def test_killed_before_each_change_on_disk(
    launch: Launcher, few_units: Path, tmp_path: Path, flags: tuple[str, ...], step: int
) -> None:
    assert launch(few_units, tmp_path / "calm" / "x", *flags).code == 0
    expected = contents(tmp_path / "calm")
    assert killed_at_calls(launch, few_units, tmp_path / "out", flags, expected, step) > 20


def group(pid: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_say_how_to_go_on_and_leave_nobody(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, Any], number: signal.Signals, code: int
) -> None:
    when = str(tmp_path / "x_text.unfinished" / "*.bin")
    for moment in ({"when": when}, {"after": 0.3}, {"after": 0.4}):
        run = launch(tree, tmp_path / "x", *PLAIN, delay=0.1, signal=number, **moment)
        assert run.code == code and run.errors == []
        assert "the same command goes on from there" in run.err.splitlines()[-1]
        assert group(run.pid) == []
        assert [path.name for path in tmp_path.iterdir()] == ["x_text.unfinished"]
    run = launch(tree, tmp_path / "x", *PLAIN)
    assert run.code == 0 and f"resuming {tmp_path / 'x_text.unfinished'}: " in run.err
    assert contents(tmp_path) == calm["plain"]


@pytest.mark.parametrize("step", [97, pytest.param(13, marks=pytest.mark.slow)])
def test_interrupted_between_two_lines_of_the_writer(
    launch: Launcher, few_units: Path, tmp_path: Path, step: int
) -> None:
    """What is in memory then is half of something, and must not be saved as the state."""
    flags = (*PLAIN, "--split-by-source", "--shard-size", "1000")
    assert launch(few_units, tmp_path / "calm" / "x", *flags).code == 0
    expected, lines, out = contents(tmp_path / "calm"), step, tmp_path / "out"
    while True:
        # With states in between, or none at all.
        run = launch(few_units, out / "x", *flags, "--workers", "1", lines=lines, save=lines % 2 - 0.5)
        if run.code == 0:
            break
        assert run.code == 130 and run.errors == [], run.err
        finish(launch, few_units, out, flags)
        assert contents(out) == expected, lines
        clear(out)
        lines += step
    assert lines > 1000


def test_a_killed_worker_is_named_and_its_unit_read_again(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, dict[str, Any]]
) -> None:
    run = launch(tree, tmp_path / "x", *PLAIN, deadly=[1, 2], deaths=2)
    assert run.code == 0, run.err
    said = [line for line in run.err.splitlines() if " died by " in line]
    assert len(said) == 2
    for line in said:
        assert line.startswith("worker ") and "died by signal SIGKILL (out of memory?)" in line
        assert line.endswith(f"on unit 2 of {tree}/train/chunk1/a.jsonl.zst: it is read again")
    assert contents(tmp_path) == calm["plain"]


def test_a_unit_that_kills_every_worker_stops_the_run(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, dict[str, Any]]
) -> None:
    run = launch(tree, tmp_path / "x", *PLAIN, deadly=[1, 5], deaths=99)
    assert run.code == 1 and len(run.errors) == 1
    assert f"unit 5 of {tree}/train/chunk1/a.jsonl.zst" in run.errors[0]
    assert "the 3rd time" in run.errors[0] and run.err.count(" died by ") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x_text.unfinished"]
    run = launch(tree, tmp_path / "x", *PLAIN, deadly=[1, 3], deaths=99)  # of which the part was kept
    assert run.code == 0 and "resuming" in run.err
    assert contents(tmp_path) == calm["plain"]


@pytest.mark.parametrize(
    ("mode", "limit"), [(mode, limit) for mode in ("plain", "divided") for limit in (1500, 4000, 15000)]
)
def test_a_file_size_limit_stops_cleanly(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, dict[str, Any]], limit: int, mode: str
) -> None:
    """EFBIG, at whatever file meets it first: a part, the state, a token file."""
    for _ in range(2):
        run = launch(tree, tmp_path / "x", *MODES[mode], "--max-reported-errors", "0", file_size=limit)
        assert run.code == 1 and len(run.errors) == 1, run.err
        assert "File too large" in run.errors[0] and "the same command goes on from there" in run.errors[0]
        assert not list(tmp_path.glob("x*_document*"))
    run = launch(tree, tmp_path / "x", *MODES[mode])
    assert run.code == 0, run.err
    assert contents(tmp_path) == calm[mode]


def test_a_full_disk_stops_cleanly(
    launch: Launcher, tree: Path, tmp_path: Path, calm: dict[str, dict[str, Any]]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for mode in ("plain", "divided"):
        for kilobytes in (120, 300, 500):
            mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("cannot mount a tmpfs")
            try:
                run = launch(tree, disk / "x", *MODES[mode])
                assert run.code == 1 and len(run.errors) == 1, run.err
                assert "No space left on device" in run.errors[0]
                assert not list(disk.glob("x*.idx"))
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                run = launch(tree, disk / "x", *MODES[mode])
                assert run.code == 0, run.err
                assert contents(disk) == calm[mode]
            finally:
                subprocess.run(["umount", str(disk)], check=True)


GOOD = documents("good", 30)


def damaged_files(root: Path) -> dict[str, tuple[bytes, dict[str, int]]]:
    """Name -> content and what is to be counted; the other records of the file are good."""
    good, noise = GOOD.encode(), random.Random(3).randbytes(20_000).hex()
    frames = [zstandard.compress(line(f"{name} {noise[:9000]}")) for name in ("one", "two", "three")]
    pq.write_table(pa.table({"text": [noise[:9000] + str(index) for index in range(9)]}), root / "whole")
    table = (root / "whole").read_bytes()
    (root / "whole").unlink()
    lone = b'{"text": "half of a pair: \\ud83d"}\n'
    return {
        "a_frame.jsonl.zst": (frames[0] + frames[1][:20] + bytes(40) + frames[2], {"damaged_file": 1}),
        "b_cut.jsonl.zst": (zstandard.compress(good)[:-5], {"truncated_file": 1}),
        "c_cut.jsonl.gz": (gzip.compress(good)[:-5], {"truncated_file": 1}),
        "d_cut.parquet": (table[:-100], {"damaged_file": 1}),
        "e_json.jsonl": (good + b'{"text": "a"\n[1]\nnull\n"text"\n' + good, {"invalid_json": 4}),
        "f_missing.jsonl": (good + b'{"body": 1}\n{"text": null}\n' + good, {"missing_text": 2}),
        "g_type.jsonl": (good + b'{"text": 3}\n{"text": ["a"]}\n' + good, {"non_string_text": 2}),
        "h_utf8.jsonl": (good + b'{"text": "\xff\xfe"}\n' + good, {"invalid_utf8": 1}),
        "i_lone.jsonl": (good + lone + good, {"invalid_utf8": 1}),
        "j_zeros.jsonl": (good + b"\0\0\0\0\n" + good, {"invalid_json": 1}),
        "k_empty.jsonl": (b"", {"empty_file": 1}),
        "l_nothing.jsonl": (good + b'{"text": ""}\n' + good, {"empty_document": 1}),
        "m_long.jsonl": (good + line(noise) + good, {"overlong_line": 1}),
        "n_nul.jsonl": (good + b'{"text": "a\\u0000b"}\n' + good, {}),
    }


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


FILE_KINDS = {"damaged_file", "truncated_file", "empty_file", "unreadable_file"}


def test_bad_input_is_counted_and_listed(launch: Launcher, tmp_path: Path, tokenizer_dir: str) -> None:
    """All of it in one run, with a directory that is named as a file is."""
    root = tmp_path / "in"
    (root / "x.jsonl").mkdir(parents=True)
    (root / "x.jsonl" / "inner.jsonl").write_text(GOOD)
    files = damaged_files(tmp_path)
    for name, (content, _) in files.items():
        (root / name).write_bytes(content)
    (root / "o_row.parquet").write_bytes(b"")
    run = launch(root, tmp_path / "out" / "x", *PLAIN, unit=9000, line=30_000)
    assert run.code == 0, run.err
    found = contents(tmp_path / "out")
    manifest = found["x_text_document.json"]
    expected = Counter({"empty_file": 1})
    for _, counts in files.values():
        expected.update(counts)
    assert manifest["rejected"] == expected
    rejects = [json.loads(row) for row in found["x_text_rejects.jsonl"].decode().splitlines()]
    assert all(row.keys() == {"file", "record", "kind", "reason"} for row in rejects)
    assert Counter(row["kind"] for row in rejects) == expected
    for name, (content, counts) in files.items():
        listed = [row for row in rejects if row["file"] == str(root / name)]
        assert Counter(row["kind"] for row in listed) == counts
        if counts.keys() <= FILE_KINDS:
            continue
        # 30 good lines come first.
        assert [row["record"] for row in listed] == list(range(31, 31 + sum(counts.values())))
        assert 60 + sum(counts.values()) == content.count(b"\n")
    total, _ = validate_indexed(tmp_path / "out" / "x_text_document", 300)
    assert total == manifest["counts"]["documents"]


@pytest.mark.parametrize("name", ["lines", "stop"])
def test_no_record_is_lost(launch: Launcher, tmp_path: Path, name: str) -> None:
    """Documents and rejected records are all there are; without --on-error skip each file stops."""
    for file, (content, counts) in damaged_files(tmp_path).items():
        source = tmp_path / name / file
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(content)
        prefix = tmp_path / f"out-{file}" / "x"
        if name == "lines":
            if counts.keys() & FILE_KINDS:
                continue
            run = launch(source, prefix, *PLAIN, line=30_000)
            assert run.code == 0, run.err
            manifest = json.loads(Path(f"{prefix}_text_document.json").read_text())
            assert manifest["rejected"] == counts
            records = content.count(b"\n")
            assert manifest["counts"]["documents"] + sum(manifest["rejected"].values()) == records
            continue
        run = launch(source, prefix, line=30_000)
        if not counts:
            assert run.code == 0
            continue
        assert run.code == 2 and len(run.errors) == 1, run.err
        place = f"{source}: " if counts.keys() & FILE_KINDS else f"{source}:31: "
        assert run.errors[0].startswith(f"error: --input {place}") and "--on-error skip" in run.errors[0]
        assert not list(prefix.parent.glob("*_document*"))


def test_a_file_that_cannot_be_read_is_skipped_when_told(launch: Launcher, tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl").write_text(GOOD)
    (root / "b.jsonl").symlink_to(tmp_path / "absent")
    run = launch(root, tmp_path / "x")
    assert run.code == 2 and len(run.errors) == 1
    assert run.errors[0].startswith(f"error: --input {root / 'b.jsonl'}: cannot be read: No such file")
    assert not list(tmp_path.glob("x*_document*"))
    run = launch(root, tmp_path / "x", *PLAIN)
    assert run.code == 0, run.err
    manifest = json.loads((tmp_path / "x_text_document.json").read_text())
    assert manifest["rejected"] == {"unreadable_file": 1} and manifest["counts"]["documents"] == 30
    assert [item["sha256"] is None for item in manifest["inputs"]] == [False, True]


def test_one_run_at_a_time_and_only_with_its_own_flags(
    launch: Launcher, tree: Path, tmp_path: Path, tokenizer_dir: str
) -> None:
    out = tmp_path / "out"
    when = str(out / "x_text.unfinished" / "*.bin")
    launch.start(tree, out / "x", *PLAIN, delay=0.2, signal=signal.SIGKILL, when=str(tmp_path / "go"))
    end = time.monotonic() + 20
    while not (out / "x_text.unfinished" / "state.json").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    command = [sys.executable, str(TOOL), "--input", str(tree), "--output-prefix", str(out / "x")]
    command += ["--tokenizer-model", tokenizer_dir, *PLAIN]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [text for text in second.stderr.splitlines() if text.startswith("error: ")]
    assert second.returncode == 2 and len(errors) == 1 and "Traceback" not in second.stderr
    assert f"{out / 'x_text.unfinished'} is in use by another process" in errors[0]
    (tmp_path / "go").write_text("on")
    assert launch.finish().code == -signal.SIGKILL

    launch(tree, out / "x", *PLAIN, delay=0.02, signal=signal.SIGKILL, when=when)
    run = launch(tree, out / "x", *PLAIN, "--no-append-eod")
    assert run.code == 2 and len(run.errors) == 1
    assert "unfinished run with another --append-eod (True, now False)" in run.errors[0]
    assert "--overwrite" in run.errors[0]
    run = launch(tree / "validation", out / "x", *PLAIN)
    assert run.code == 2 and "another set of inputs" in run.errors[0]
    run = launch(tree, out / "x", *PLAIN, "--no-append-eod", "--overwrite")
    assert run.code == 0, run.err
    assert launch(tree, tmp_path / "calm" / "x", *PLAIN, "--no-append-eod").code == 0
    assert contents(out) == contents(tmp_path / "calm")


def test_memory_does_not_grow_with_the_file(launch: Launcher, tmp_path: Path) -> None:
    numbers = random.Random(1)
    words = ["".join(numbers.choices("abcdefghij", k=numbers.randint(2, 9))) for _ in range(2000)]
    peaks = {}
    for megabytes in (16, 64):
        source = tmp_path / f"{megabytes}.jsonl.zst"
        with source.open("wb") as file, zstandard.ZstdCompressor(1).stream_writer(file) as stream:
            size = 0
            while size < megabytes << 20:
                text = line(" ".join(numbers.choices(words, k=3000)))
                stream.write(text)
                size += len(text)
        run = launch(source, tmp_path / str(megabytes) / "x", unit=1 << 20, save=1.0)
        assert run.code == 0, run.err
        peaks[megabytes] = run.rss
    assert peaks[64] < peaks[16] + 12_000, peaks  # KiB
