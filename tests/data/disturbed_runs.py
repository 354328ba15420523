"""Runs of tools/preprocess_slimpajama.py that can be disturbed; see test_survival.py.

Every run is a process group of its own that executes main() of the tool, forked by one process that has
everything imported, as most of them last for a tenth of a second.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "preprocess_slimpajama.py"
UNIT = 4096

# A request is one JSON object: flags, and how the run is to be disturbed. The answer: what became of it.
LAUNCHER = """
import functools, glob, json, os, resource, signal, sys, time
sys.path[:0] = [{repository!r}, {tests!r}]
from scripts import load
from megatron_sharedproj.data import assembly, journal, pool, preprocess, publish, readers
from megatron_sharedproj.data.engines import choose_engine
from megatron_sharedproj.data.tokenizers import build_tokenizer

tool = load("tools/preprocess_slimpajama.py")

# The libraries that a run imports.
choose_engine(build_tokenizer("HuggingFaceTokenizer", {tokenizer!r}), "auto", False).encode(["a"])
with open({parquet!r}, "rb") as stream:
    import pyarrow.parquet
    pyarrow.parquet.read_schema(stream)
import pyarrow.ipc, zstandard


def run(request):
    main = os.getpid()
    os.setpgid(main, main)
    for number in (1, 2):
        os.dup2(os.open(request["log"] + str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preprocess._SAVE_SECONDS = request.get("save", -1.0)  # whenever something was appended
    preprocess.PreprocessOptions = functools.partial(
        preprocess.PreprocessOptions, unit_bytes=request.get("unit", {unit})
    )
    readers.MAX_LINE_BYTES = request.get("line", readers.MAX_LINE_BYTES)
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))

    def die_at(call, function):
        def counted(*arguments, **keywords):
            if os.getpid() == main:
                request["calls"] -= 1
                if request["calls"] == 0:
                    os.killpg(main, signal.SIGKILL)
                    time.sleep(60)
            return function(*arguments, **keywords)
        return counted

    def interrupt_at_line(frame, event, _):
        if not frame.f_code.co_filename.endswith(("assembly.py", "outputs.py", "indexed.py", "journal.py")):
            return None
        if event == "line" and os.getpid() == main:
            request["lines"] -= 1
            if request["lines"] == 0:
                os.kill(main, signal.SIGINT)
        return interrupt_at_line

    if "lines" in request:
        sys.settrace(interrupt_at_line)
    if "calls" in request:
        for name in request["names"]:
            setattr(os, name, die_at(name, getattr(os, name)))
    make = preprocess._make_encoder

    def disturbed(*arguments):
        work = make(*arguments)

        def delayed(task, progress):
            time.sleep(request.get("delay", 0.0))
            if [task.file, task.unit] == request.get("deadly"):
                with open(request["log"] + "deaths", "ab") as stream:
                    stream.write(b"x")
                    deaths = stream.tell()
                if deaths <= request["deaths"]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return work(task, progress)

        return delayed

    preprocess._make_encoder = disturbed
    return tool.main(request["flags"])


def kill(pid, request):
    if "after" in request:
        time.sleep(request["after"])
    else:
        while not any(os.path.getsize(path) for path in glob.glob(request["when"])):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.005)
    os.killpg(pid, request["signal"])


print(flush=True)
for line in sys.stdin:
    request = json.loads(line)
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            code = run(request)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    if "signal" in request:
        try:
            os.setpgid(pid, pid)  # as the child does: whoever comes first
            kill(pid, request)
        except ProcessLookupError:
            pass
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    answer = dict(pid=pid, code=os.waitstatus_to_exitcode(status), seconds=seconds, rss=usage.ru_maxrss)
    print(json.dumps(answer), flush=True)
"""


class Run:
    """What became of a run: exit code (negative: the signal), output, seconds and peak KiB of a process."""

    def __init__(self, answer: dict[str, Any], log: Path) -> None:
        self.pid, self.code = answer["pid"], answer["code"]
        self.seconds, self.rss = answer["seconds"], answer["rss"]
        self.out, self.err = (Path(f"{log}{number}").read_text() for number in (1, 2))

    @property
    def errors(self) -> list[str]:
        assert "Traceback" not in self.err, self.err
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Launcher:
    def __init__(self, directory: Path, tokenizer: str) -> None:
        parquet = directory / "empty.parquet"
        pq.write_table(pa.table({"text": ["a"]}), parquet)
        script = directory / "launcher.py"
        values = dict(
            repository=str(REPOSITORY),
            tests=str(REPOSITORY / "tests"),
            tokenizer=tokenizer,
            parquet=str(parquet),
            unit=UNIT,
        )
        text = LAUNCHER
        for name, value in values.items():
            text = text.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", repr(value))
        script.write_text(text)
        self._tokenizer, self._log = tokenizer, directory / "log"
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def start(self, source: Path, prefix: Path, *flags: str, **disturbed: Any) -> None:
        required = ["--input", str(source), "--output-prefix", str(prefix)]
        required += ["--tokenizer-model", self._tokenizer, "--workers", "2", "--verify", "3"]
        assert self._process.stdin is not None
        request = {"flags": [*required, *flags], "log": str(self._log), **disturbed}
        print(json.dumps(request), file=self._process.stdin, flush=True)

    def finish(self) -> Run:
        return Run(json.loads(self._answer()), self._log)

    def __call__(self, source: Path, prefix: Path, *flags: str, **disturbed: Any) -> Run:
        Path(f"{self._log}deaths").unlink(missing_ok=True)
        self.start(source, prefix, *flags, **disturbed)
        return self.finish()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the launcher is gone"
        return line
