"""The recall probe as tasks of lm-eval, for exported models and other people's: local files, a task per cell.

Prompts and answers are those of evaluation/recall.py, a document for each query: on a checkpoint the accuracy
is the probe's own. The folder can be moved and copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_sharedproj.evaluation.recall import Prompts

GROUP = "recall"
LOADER = "recall_documents"

_LOADER_CODE = '''"""Documents of the tasks here, from the JSON lines beside this file."""

import json
from pathlib import Path


def load(file, **_):
    """The documents of one task."""
    from datasets import Dataset, DatasetDict

    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))
'''


def task_name(prompts: Prompts) -> str:
    """ "recall_64_keys_4_pairs"."""
    return f"{GROUP}_{prompts.keys}_keys_{prompts.pairs}_pairs"


def write_task(folder: Path, every: Sequence[Prompts]) -> list[str]:
    """Write the folder: all of it, or nothing.

    Args:
        folder: to make; every: prompts, one task for each.
    Returns:
        names of the tasks, the group of all first.
    Raises:
        ValueError: for a folder that exists, or has no parent.
    """
    check_folder(folder)
    staging = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    names = [task_name(prompts) for prompts in every]
    try:
        staging.mkdir()
        (staging / f"{LOADER}.py").write_text(_LOADER_CODE, encoding="utf-8")
        for name, prompts in zip(names, every, strict=True):
            lines = (json.dumps(document) for document in documents(prompts))
            (staging / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (staging / f"{name}.yaml").write_text(_task(name), encoding="utf-8")
        (staging / f"{GROUP}.yaml").write_text(_group(names), encoding="utf-8")
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [GROUP, *names]


def check_folder(folder: Path) -> None:
    """Raise ValueError where :func:`write_task` cannot make the folder."""
    if folder.exists():
        raise ValueError(f"--write-task {folder}: exists; give a new folder, or remove it")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"--write-task {folder}: {folder.absolute().parent} is not a folder")


def documents(prompts: Prompts) -> list[dict[str, object]]:
    """A document for each query: ``context``, ``choices`` (without their space) and ``answer``."""
    return [
        {"context": text[:end], "choices": choices, "answer": int(answer)}
        for text, ends, choices, answers in zip(
            prompts.texts, prompts.starts, prompts.choices, prompts.answers, strict=True
        )
        for end, answer in zip(ends, answers, strict=True)
    ]


def _task(name: str) -> str:
    return f"""task: {name}
custom_dataset: !function {LOADER}.load
dataset_kwargs:
  file: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def _group(names: Sequence[str]) -> str:
    return f"""group: {GROUP}
task: [{", ".join(names)}]
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: false
metadata:
  version: 1.0
"""
