"""Which tasks a name means, whether their data can be read, and what guessing scores on them.

Imports lm-eval, so only the sub-command that runs it imports this.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from megatron_sharedproj.evaluation.task_data import PAPER_GROUP, PAPER_TASKS

# Metrics that are the share of documents where the right choice won: guessing has a level on them.
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


def default_tasks(include_path: Path | None) -> tuple[str, ...]:
    """The paper's five tasks: the local group of them where a folder has it, else lm-eval's own."""
    if include_path is not None and (include_path / f"{PAPER_GROUP}.yaml").is_file():
        return (PAPER_GROUP,)
    return PAPER_TASKS


def find_tasks(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """The task manager that knows all of ``names``.

    Local tasks alone are indexed where they suffice: reading lm-eval's own 14,000 files takes seconds.

    Raises:
        ValueError: for a folder without tasks, or a name that no task, group or tag has.
    """
    local: TaskManager | None = None
    if include_path is not None:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if not local.all_tasks:
            raise ValueError(
                f"--include-path {include_path}: no task in it (no YAML file with a `task:` or `group:`); "
                "write one there, or fetch some with tools/fetch_eval_tasks.py"
            )
        if all(_is_complete(name, local) for name in names):
            return local
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            close = difflib.get_close_matches(name, manager.all_tasks, n=4, cutoff=0.6)
            hint = f"close to it: {', '.join(close)}" if close else "`lm_eval ls tasks` lists them all"
            raise ValueError(f"--tasks {name}: no task, group or tag has this name; {hint}")
    return manager


def _is_complete(name: str, manager: TaskManager) -> bool:
    """Whether a name and, if it is a group, all its members are indexed."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(isinstance(member, str) and _is_complete(member, manager) for member in members)


def load_tasks(names: Sequence[str], manager: TaskManager) -> dict[str, Any]:
    """Load tasks with their documents: lm-eval's dict of ``tasks`` and ``groups``.

    Raises:
        ValueError: where a data set cannot be read, or a task is given twice.
    """
    try:
        return dict(manager.load(list(names)))
    except Exception as error:  # datasets and the tasks' own code raise many types
        for name in names:
            try:
                manager.load([name])
            except Exception as first:
                raise ValueError(_no_data(name, first)) from None
        raise ValueError(_no_data(",".join(names), error)) from None


def check_shots(loaded: Mapping[str, Any], shots: Sequence[int]) -> None:
    """Raise ValueError for examples before a task that is asked without: lm-eval gives it none either."""
    for name, task in loaded["tasks"].items():
        if max(shots) and task.get_config("num_fewshot") == 0:
            raise ValueError(
                f"--num-fewshot {max(shots)}: {name} is asked without examples by its own definition; run it "
                "by itself with --num-fewshot 0"
            )


def check_answer(answer: Sequence[int], max_length: int) -> None:
    """Raise ValueError for an answer that cannot be scored; its tokens are given."""
    if len(answer) > max_length:
        raise ValueError(
            f"--tasks: an answer of {len(answer)} tokens does not fit into the model's {max_length} "
            "positions; leave this task out"
        )
    if not answer:
        raise ValueError("--tasks: an empty answer has no likelihood; repair the task's documents")


def prompt_room(new_tokens: int, max_length: int) -> int:
    """Tokens that a prompt may have. Raises ValueError where it may have none."""
    if new_tokens >= max_length:
        raise ValueError(
            f"--tasks: {new_tokens} new tokens leave no room for a prompt in the model's {max_length} "
            "positions; lower max_gen_toks in the task's generation_kwargs"
        )
    return max_length - new_tokens


def _no_data(name: str, error: Exception) -> str:
    words = (str(error) or "no message").splitlines()[0][:160]
    offline = any(os.environ.get(f"HF_{part}_OFFLINE", "0") not in ("", "0") for part in ("HUB", "DATASETS"))
    return (
        f"--tasks {name}: its data cannot be loaded{' (offline mode)' if offline else ''}: "
        f"{type(error).__name__}: {words}; python tools/fetch_eval_tasks.py --output DIR fetches data of the "
        "paper's tasks, which --include-path DIR then uses"
    )


def chance_level(task: Any, limit: int | None) -> float | None:
    """Accuracy of guessing: the mean share of right choices; None without choices or with own scoring."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    shares = []
    for _, doc in task.doc_iterator(limit=limit):
        # doc_to_choice counts WinoGrande's kind too: one continuation, and as many contexts as choices.
        right = [] if task.multiple_input else task.doc_to_target(doc)
        count = len(set(right)) if isinstance(right, list) else 1
        shares.append(max(count, 1) / len(task.doc_to_choice(doc)))
    return sum(shares) / len(shares)


def group_chance(
    group: Any, metric: str, chances: Mapping[str, float], sizes: Mapping[str, int]
) -> float | None:
    """What guessing scores on a group that averages ``metric`` over its tasks, weighed as the group does."""
    aggregate = next((item for item in group.aggregate_metric_list or [] if item.metric == metric), None)
    names = [task.task_name for task in group.get_all_tasks()]
    if aggregate is None or not all(name in chances for name in names):
        return None
    weights = [sizes[name] if aggregate.weight_by_size else 1 for name in names]
    return sum(weight * chances[name] for weight, name in zip(weights, names, strict=True)) / sum(weights)
