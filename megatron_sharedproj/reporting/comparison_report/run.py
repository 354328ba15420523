"""One run of a comparison: its settings, log, evaluations and job records, and what is wrong with them.

Needs neither torch nor Megatron.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import DATA_PROTOCOLS, RunConfig
from megatron_sharedproj.reporting.compare import EVALUATION
from megatron_sharedproj.reporting.plots import Run, load_run

RECALL = "recall.json"
TRAINING = "training"  # the job that trained, beside those named by what they evaluate

# What was measured together -> its figures in SeedRun.values.
MEASURED = {
    "packed": ("packed_perplexity", "packed_loss", "bits_per_byte"),
    "padded": ("padded_perplexity", "padded_loss"),
    "recall": ("recall", "recall_chance", "recall_stderr", "recall_argmax"),
}


@dataclass
class SeedRun:
    """One training run and what was measured on it.

    Attributes:
        name: the run folder's name; folder: where it is.
        status: finished, not evaluated, unfinished, missing or damaged.
        steps: the last logged iteration.
        config, log: of the trainer, None where they can't be read.
        values: figure -> number: packed_perplexity, packed_loss (nats per token), bits_per_byte,
            padded_perplexity, padded_loss; recall, recall_argmax, recall_chance and recall_stderr (shares,
            means of evaluation/recall.py's cells); train_tokens_per_second (median of the log),
            validation_loss (the log's last). Empty until the training is complete.
        records: the JSON objects behind them: perplexity, recall.
        jobs: ``training`` and evaluations -> {"command": words, "seconds": seconds}.
        problems: what a reader has to know, in words.
    """

    name: str
    seed: int
    folder: Path
    status: str = "missing"
    steps: int = 0
    config: RunConfig | None = None
    log: Run | None = None
    values: dict[str, float] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        """Whether the training went to its end."""
        return self.status in ("finished", "not evaluated")


def read_run(folder: Path, seed: int, jobs: Path) -> SeedRun:
    """Read a run folder and its job records; what is wrong goes into ``status`` and ``problems``."""
    run = SeedRun(folder.name, seed, folder)
    for path in [jobs / f"{run.name}.json", *sorted(jobs.glob(f"{run.name}_*.json"))]:
        if path.is_file():
            try:
                record = read_object(path)
                words, seconds = entry_of(record, "command", list, path), float(record["seconds"])
            except (ValueError, KeyError, TypeError) as error:
                run.problems.append(f"job record not read: {error}")
                continue
            kind = path.stem.removeprefix(run.name).removeprefix("_") or TRAINING
            run.jobs[kind] = {"command": [str(word) for word in words], "seconds": seconds}
    if not (folder / files.RUN_CONFIG).is_file():
        return run
    try:
        run.config = files.checkpoint_config(folder)
        run.log = load_run(folder)
    except ValueError as error:
        waiting = run.config is not None and "no loss in it yet" in str(error)
        run.status = "unfinished" if waiting else "damaged"
        run.problems.append("no loss logged yet" if waiting else str(error))
        return run
    run.steps = max((record["iteration"] for record in run.log.training), default=0)
    steps = run.config.train.train_iters
    if run.steps < steps:
        run.status = "unfinished"
        run.problems.append(f"stopped at step {run.steps:,} of {steps:,}")
        return run
    run.status = "not evaluated"
    speeds = sorted(float(r["tokens_per_second"]) for r in run.log.training if r.get("tokens_per_second"))
    if speeds:
        run.values["train_tokens_per_second"] = speeds[len(speeds) // 2]
    if run.log.validation:
        run.values["validation_loss"] = float(run.log.validation[-1]["validation_lm_loss"])
    _read_evaluations(run)
    if "packed_perplexity" in run.values:
        run.status = "finished"
    return run


def _read_evaluations(run: SeedRun) -> None:
    for kind, read, place in (
        ("perplexity", _perplexities, EVALUATION),
        ("recall", _recall, RECALL),
    ):
        path = run.folder / place
        if not path.is_file():
            continue
        try:
            record = read_object(path)
            values = read(record)
            bad = [figure for figure, value in values.items() if not math.isfinite(value)]
            if bad:
                raise ValueError(f"{bad[0]} is {values[bad[0]]}")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            run.problems.append(f"{place} can't be used ({reason}); train or evaluate again")
            continue
        iteration = files.iteration_of(Path(str(record.get("checkpoint", ""))))
        if iteration is not None and iteration != run.steps:
            run.problems.append(f"{place} is of step {iteration:,}, not {run.steps:,}; evaluate again")
            continue
        run.records[kind] = record
        run.values.update(values)


def _perplexities(record: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for protocol in (name for name in DATA_PROTOCOLS if name in record):
        part = record[protocol]
        for figure in ("perplexity", "loss"):
            found[f"{protocol}_{figure}"] = float(part[figure])
        int(part["tokens"]), int(part["real_tokens"])
        if protocol == "packed" and "bits_per_byte" in part:
            found["bits_per_byte"] = float(part["bits_per_byte"])
    return found


def _recall(record: Mapping[str, Any]) -> dict[str, float]:
    cells, mean = record["cells"], record["mean"]
    for cell in cells:
        float(cell["accuracy"]), float(cell["chance"]), int(cell["pairs"]), int(cell["keys"])
    return {
        "recall": float(mean["accuracy"]),
        "recall_chance": float(mean["chance"]),
        "recall_stderr": math.hypot(*(float(cell["stderr"]) for cell in cells)) / len(cells),
        "recall_argmax": float(mean["argmax_accuracy"]),
    }


def measured_on(run: SeedRun, kind: str) -> str:
    """What a figure was measured on, in words: figures compare only where it is the same."""
    if kind == "recall":
        record = run.records["recall"]
        loads = ", ".join(f"{cell['pairs']} of {cell['keys']}" for cell in record["cells"])
        return f"{record.get('sequences')} prompts of {loads} pairs, seed {record.get('seed')}"
    part = run.records["perplexity"][kind]
    return f"{part['tokens']} tokens in rows of {part.get('seq_length')}"


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ValueError: naming the file, where it holds none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def entry_of(content: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """An entry of a file's object. Raises ValueError naming file and entry, where it is of another kind."""
    if not isinstance(content.get(name), kind):
        raise ValueError(f"{path}: {name} is {content.get(name)!r}, not a {kind.__name__}")
    return content[name]
