"""The record of an lm-eval run: what was measured, how, and what came out.

Needs neither torch nor lm-eval, so that records are compared without them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_sharedproj.config import write_json, write_text

RECORD = "megatron_sharedproj lm-eval results"
_PACKAGES = (
    "lm-eval",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "megatron-core",
    "megatron_sharedproj",
)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        tasks: names of tasks, groups or tags; shots: numbers of examples before the question, one run each.
        limit: documents of each task, the first ones (None: all); seed: of the examples' choice.
        include_path: folder with further tasks.
    """

    tasks: tuple[str, ...]
    shots: tuple[int, ...] = (0,)
    limit: int | None = None
    seed: int = 1234
    include_path: Path | None = None
    log_samples: bool = False

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if not self.tasks:
            raise ValueError("--tasks: names no task; for example --tasks piqa,arc_easy")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks {','.join(self.tasks)}: names a task twice")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            shown = ",".join(map(str, self.shots))
            raise ValueError(f"--num-fewshot {shown}: give different whole numbers from 0, as 0,5")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit}: must be at least 1; leave it out for all documents")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"--include-path {self.include_path}: is not a folder")


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        metric: lm-eval's name; filter: what was applied to the answers before it ("none": nothing).
        stderr: standard error of value, None where lm-eval gives none.
        chance: what guessing scores, None where that has no meaning; documents: how many were scored.
    """

    task: str
    shots: int
    metric: str
    value: float
    stderr: float | None = None
    chance: float | None = None
    documents: int = 0
    filter: str = "none"
    higher_is_better: bool | None = None
    is_group: bool = False


@dataclass
class Outcome:
    """Scores of all shots, and lm-eval's own results by number of shots; on other ranks than 0: empty.

    Attributes:
        truncated: requests that were longer than the model and lost tokens on the left.
    """

    scores: list[Score] = field(default_factory=list)
    lm_eval: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    truncated: int = 0


def as_json(value: Any) -> Any:
    """What json.dumps does not know: NumPy's numbers as numbers, functions by name, anything else as text."""
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "__qualname__"):  # its text would hold an address, another one in each run
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def make_record(
    outcome: Outcome, plan: Plan, model: Mapping[str, Any], *, batch_size: int, command: str, commit: str
) -> dict[str, Any]:
    """What is written: scores, lm-eval's results, and what is needed to run it again."""
    return {
        "record": RECORD,
        "model": dict(model),
        "tasks": list(plan.tasks),
        "num_fewshot": list(plan.shots),
        "limit": plan.limit,
        "seed": plan.seed,
        "batch_size": batch_size,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": {name: _version(name) for name in _PACKAGES},
        "truncated": outcome.truncated,
        "scores": [asdict(score) for score in outcome.scores],
        "lm_eval": outcome.lm_eval,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def output_file(output: Path) -> Path:
    """The JSON file that --output means. Raises ValueError where it cannot be written."""
    file = output if output.suffix == ".json" and not output.is_dir() else output / "lm_eval.json"
    folder = output.parent if file is output else output
    existing = folder if folder.exists() else folder.parent
    if not existing.is_dir() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--output {output}: {existing} is not a folder")
    return file


def write_record(file: Path, record: Mapping[str, Any], outcome: Outcome) -> list[Path]:
    """Write the record, and beside it one file of JSON lines per task with samples; returns the files."""
    file.parent.mkdir(exist_ok=True)
    written = []
    for name, samples in outcome.samples.items():
        path = file.with_name(f"{file.stem}_samples_{name.replace('/', '_')}.jsonl")
        lines = (json.dumps(sample, default=as_json, ensure_ascii=False) for sample in samples)
        write_text(path, "".join(line + "\n" for line in lines))
        written.append(path)
    write_json(file, record)
    return [file, *written]
