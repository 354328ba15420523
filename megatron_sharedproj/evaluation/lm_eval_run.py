"""Running lm-eval's tasks on a model: lm-eval itself is imported when something is run."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sharedproj import distributed
from megatron_sharedproj.evaluation.lm_eval_record import Outcome, Plan, Score, as_json


def require_lm_eval() -> None:
    """Raise ValueError where lm-eval is not installed; hear only its errors where it is."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("lm-eval is not installed; install it with `pip install -e .[eval]`") from None
    for name in ("lm_eval", "datasets"):  # warnings of every default that a flag replaces
        logging.getLogger(name).setLevel(logging.ERROR)


def run(lm: Any, plan: Plan, manager: Any) -> Outcome:
    """Evaluate. Collective over the ranks of ``lm``; its rank 0 gets the outcome.

    Args:
        lm: a model of lm-eval's interface; manager: a TaskManager that knows the plan's tasks.
    """
    from lm_eval.evaluator import evaluate

    outcome = Outcome()
    for shots in plan.shots:
        # As `lm_eval --seed` does, so that examples and shuffled choices are the same; Python's own generator
        # starts from 0 where no seed is given.
        random.seed(0 if plan.seed == Plan.seed else plan.seed)
        np.random.seed(plan.seed % 2**32)
        torch.manual_seed(plan.seed)
        # Loaded anew: a task keeps the shots that were set, and 0 of them cannot be changed again.
        loaded = manager.load(list(plan.tasks))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=plan.seed)
        results = evaluate(lm=lm, task_dict=loaded, limit=plan.limit, log_samples=plan.log_samples)
        if results is not None:
            for task, samples in results.pop("samples", {}).items():
                outcome.samples[f"{task}_{shots}shot"] = samples
            outcome.lm_eval[str(shots)] = json.loads(json.dumps(results, default=as_json))
            outcome.scores += _scores(outcome.lm_eval[str(shots)], loaded, shots, plan.limit)
    outcome.truncated = sum(lm.gather_object(lm.truncated) or [])
    return outcome


def _scores(
    results: Mapping[str, Any], loaded: Mapping[str, Any], shots: int, limit: int | None
) -> list[Score]:
    from megatron_sharedproj.evaluation.lm_eval_tasks import ACCURACIES, chance_level, group_chance

    sizes = {name: counts["effective"] for name, counts in results["n-samples"].items()}
    levels = {name: chance_level(task, limit) for name, task in loaded["tasks"].items()}
    chances = {name: level for name, level in levels.items() if level is not None}
    scores = []
    for name, metrics in results["results"].items():
        group = loaded["groups"].get(name)
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            chance = None
            if metric in ACCURACIES:
                chance = group_chance(group, metric, chances, sizes) if group else chances.get(name)
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            scores.append(
                Score(
                    task=name,
                    shots=shots,
                    metric=metric,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    chance=chance,
                    documents=int(metrics.get("sample_len", sizes.get(name, 0))),
                    filter=chosen,
                    higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                    is_group=group is not None,
                )
            )
    return scores


def load_checkpoint(args: Any) -> Any:
    """The checkpoint that the flags of add_loading_args name, under lm-eval's interface."""
    from megatron_sharedproj.evaluation.lm_eval_model import MegatronSharedProjLM

    if args.device or args.dtype:
        flag = "--device" if args.device else "--dtype"
        raise ValueError(
            f"{flag}: goes with --hf; a checkpoint runs where torchrun puts it, in fp32 or with --bf16"
        )
    return MegatronSharedProjLM(
        args.load,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        bf16=args.bf16,
        batch_size=args.batch_size,
    )


def load_exported(args: Any) -> Any:
    """lm-eval's own ``hf`` model on an exported directory, with log-likelihoods in float32.

    Runs the Python files of the directory (trust_remote_code).

    Raises:
        ValueError: naming what is wrong with the directory or the flags.
    """
    directory, device = args.hf, args.device
    for flag in ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "bf16"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')}: goes with --load; --hf takes --dtype and its own tokenizer"
            )
    if distributed.world_size() > 1:
        raise ValueError("--hf: runs in one process; start it without torchrun (--load runs under it)")
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"--hf {directory}: no config.json there; give a directory that tools/convert_to_hf.py wrote "
            "(a Megatron checkpoint goes to --load)"
        )
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--hf {directory}: config.json is not JSON ({error}); export it again") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU is visible here; use cpu")
    try:
        from transformers.utils.logging import set_verbosity_error

        from megatron_sharedproj.evaluation.lm_eval_exported import ExportedLM
    except ImportError as error:
        raise ValueError(f"--hf: {error}; install what it needs with `pip install -e .[eval]`") from None
    options: dict[str, Any] = {}
    if config.get("model_type") == "sharedproj" or (directory / "conversion.json").is_file():
        # Our export, whatever its format: training puts the end-of-document token before each text and
        # nothing else, whatever BOS there is.
        options = {"add_bos_token": False, "prefix_token_id": config.get("eos_token_id")}
    try:
        lm = ExportedLM(
            pretrained=str(directory),
            device=device,
            dtype=args.dtype or "auto",
            softmax_dtype="float32",
            batch_size=args.batch_size,
            trust_remote_code=True,
            **options,
        )
    except Exception as error:  # transformers and the directory's own code raise many types
        words = (str(error) or "no message").splitlines()[0]
        raise ValueError(f"--hf {directory}: cannot be loaded: {type(error).__name__}: {words}") from None
    set_verbosity_error()  # what it says of loading is wanted; that a text is long is counted by us
    return lm


def hugging_face_description(directory: Path, lm: Any) -> dict[str, Any]:
    """The ``model`` entry of a record."""
    return {
        "source": "hf",
        "name": directory.resolve().name,
        "path": str(directory),
        "shape": lm.config.to_dict(),
        "dtype": str(lm.model.dtype),
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
    }


def megatron_description(loaded: Any, tensor_model_parallel_size: int) -> dict[str, Any]:
    """The ``model`` entry of a record."""
    from megatron_sharedproj import formulas

    folder = Path(loaded.folder)
    return {
        "source": "megatron",
        "name": f"{folder.resolve().parent.name}/{folder.name}",
        "path": str(folder),
        "shape": asdict(loaded.config.model),
        "dtype": str(loaded.model.config.params_dtype),
        "parameters": formulas.parameters(loaded.config.model)["total"],
        "tokenizer": loaded.tokenizer.describe(),
        "tensor_model_parallel_size": tensor_model_parallel_size,
    }
