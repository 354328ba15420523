"""A Slurm job on this machine: srun starts each "node" here, scontrol notes what it was asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
echo "$*" >> "$JOB/srun"
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" & pids+=($!)
done
echo "${pids[*]}" > "$JOB/tasks.tmp" && mv "$JOB/tasks.tmp" "$JOB/tasks"
worst=0
for pid in "${pids[@]}"; do
    code=0; wait "$pid" || code=$?
    [ $code -le $worst ] || worst=$code
done
exit $worst
"""
_SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$JOB/scontrol"
if [ "$1 $2" = "show hostnames" ]; then
    for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo localhost; done
fi
"""


class Job:
    """A batch script that runs as Slurm would run it.

    Attributes:
        folder: of the stand-ins' notes: `srun` and `scontrol`, a line per call, and the output, `log`.
    """

    def __init__(self, folder: Path, *flags: str, nodes: int = 1, **environment: str):
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir(parents=True)
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        # sbatch runs a copy.
        script = folder / "slurm_script"
        script.write_text((ROOT / "examples" / "slurm" / "pretrain.sbatch").read_text())
        job = {
            "JOB": str(folder),
            "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "node[0-1]",
        }
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", script, *flags], env={**os.environ, **job, **environment}, stdout=log, stderr=log
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the output has a text."""
        end = time.monotonic() + seconds
        while text not in self.text():
            assert self.process.poll() is None and time.monotonic() < end, self.text()[-4000:]
            time.sleep(0.05)

    def signal_tasks(self, number: signal.Signals) -> None:
        """Signal the tasks of the step, as Slurm does: not what they started."""
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)

    def finish(self, seconds: float = 120) -> int:
        """The exit code."""
        return self.process.wait(timeout=seconds)

    def calls(self, name: str) -> list[str]:
        """What `srun` or `scontrol` was called with."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []
