"""From a trained checkpoint or a Hugging Face directory to a K=V checkpoint that the trainer takes.

The result is a checkpoint like any other: `--load DIR --finetune` trains it, and with `--distill-teacher` the
source teaches it. A Hugging Face directory is imported first, to DIR/teacher, which stays: the teacher.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sharedproj import formulas
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.config import DistillConfig, RunConfig, write_json
from megatron_sharedproj.conversion.hf_import import import_folder, tokenizer_fields
from megatron_sharedproj.conversion.megatron_checkpoint import check_target, model_state, write_checkpoint
from megatron_sharedproj.conversion.weights import to_hugging_face, to_megatron
from megatron_sharedproj.data.inspection import validate_indexed
from megatron_sharedproj.duration import format_duration
from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity, read_tokens
from megatron_sharedproj.inference.loading import LoadedModel, load_model
from megatron_sharedproj.retrofit.calibration import calibrate, calibration_rows
from megatron_sharedproj.retrofit.surgery import (
    Attention,
    Plan,
    emulated,
    make_plan,
    merge_calibrated,
    merge_closed,
    operate,
)

RECORD = "retrofit.json"
TEACHER = "teacher"


@dataclass
class Options:
    """What tools/retrofit.py is asked for; the names are its flags'.

    Attributes:
        calibration_tokens: of ``calibration_data``; 0: all. sequential: see calibration.calibrate.
        eval_tokens: of ``eval_data``; 0: all. seq_length: of both; 0: the source's.
        tokenizer: fields of DataConfig that replace the source's.
    """

    load: Path
    output: Path
    merge: str
    num_query_groups: int = 0
    kv_rotary: str = ""
    rotary_percent: float | None = None
    calibration_data: str = ""
    calibration_tokens: int = 32768
    sequential: bool = True
    key_weight: float = 1.0
    value_weight: float = 1.0
    eval_data: str = ""
    eval_tokens: int = 0
    seq_length: int = 0
    overwrite: bool = False
    no_verify_integrity: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is a Hugging Face directory, not a checkpoint."""
    return (folder / "config.json").is_file() and not files.has_checkpoint(folder)


def _check(options: Options) -> None:
    """Everything that can be wrong with the flags alone. Raises ValueError."""
    check_target(options.output, options.overwrite, "--output")
    if options.output.resolve() == options.load.resolve():
        raise ValueError(f"--output {options.output}: is --load; give another folder")
    if options.merge == "least_squares" and not options.calibration_data:
        raise ValueError("--merge least_squares: needs --calibration-data PREFIX, tokens like the training's")
    if options.merge != "least_squares" and options.calibration_data:
        raise ValueError(
            f"--calibration-data {options.calibration_data}: --merge {options.merge} reads no text; drop it"
        )
    for name in ("calibration_tokens", "eval_tokens", "seq_length"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must not be negative")
    for flag, prefix in (
        ("--calibration-data", options.calibration_data),
        ("--eval-data", options.eval_data),
    ):
        for suffix in (".bin", ".idx"):
            if prefix and not Path(prefix + suffix).is_file():
                raise ValueError(f"{flag} {prefix}: {prefix}{suffix} does not exist")


def _load(options: Options, say: Callable[[str], None]) -> tuple[LoadedModel, Path]:
    """The source as a model of one process, and the folder that --distill-teacher takes."""
    teacher = options.load
    given = {name: value for name, value in options.tokenizer.items() if value}
    if is_hugging_face(options.load):
        teacher = options.output / TEACHER
        # What an interrupted run left there is replaced.
        import_folder(
            options.load, teacher, tokenizer=tokenizer_fields(options.load, given), overwrite=True, say=say
        )
        given = {}
    fields = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    arguments = argparse.Namespace(
        load=teacher, no_verify_integrity=options.no_verify_integrity, tensor_model_parallel_size=1,
        bf16=False, **{name: given.get(name) for name in fields},
    )  # fmt: skip
    loaded = load_model(arguments, parallel_output=True)
    for name, value in given.items():
        setattr(loaded.config.data, name, value)
    return loaded, teacher


def retrofit(options: Options, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do the surgery, measure it, and write the checkpoint.

    Returns:
        What is written to OUTPUT/retrofit.json: source, teacher, merge, shapes, bytes of cache, errors that
        least squares leaves (by layer and group), perplexity before and after (with ``eval_data``).
    Raises:
        ValueError: naming the flag and what is wrong. OSError: if the output cannot be written. Then nothing
            of it is left.
    """
    _check(options)
    began = time.perf_counter()
    before = options.output.exists()
    made = False
    try:
        loaded, teacher = _load(options, say)
        made = is_hugging_face(options.load)
        plan = make_plan(
            loaded.config.model,
            options.merge,
            num_query_groups=options.num_query_groups,
            kv_rotary=options.kv_rotary,
            rotary_percent=options.rotary_percent,
            key_weight=options.key_weight,
            value_weight=options.value_weight,
        )
        return _retrofit(options, plan, loaded, teacher, began, say)
    except BaseException:
        import shutil

        if not before:
            shutil.rmtree(options.output, ignore_errors=True)
        elif made:
            shutil.rmtree(options.output / TEACHER, ignore_errors=True)
        raise


def _retrofit(
    options: Options,
    plan: Plan,
    loaded: LoadedModel,
    teacher: Path,
    began: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    rows = None
    length = options.seq_length or min(
        loaded.config.train.seq_length, loaded.config.model.max_position_embeddings
    )
    for prefix in {options.eval_data, options.calibration_data} - {""}:
        validate_indexed(prefix, loaded.tokenizer.vocab_size)
    if options.calibration_data:
        tokens, _ = read_tokens(options.calibration_data, options.calibration_tokens)
        rows = calibration_rows(tokens, length, options.calibration_data)
    source_perplexity = _perplexity(loaded, options, length)
    # The source's values: calibration changes its weights as it goes.
    original = {name: tensor.clone() for name, tensor in model_state(loaded.model).items()}
    tensors = to_hugging_face(plan.source, original, plan.source.padded_vocab_size)
    layers, errors = new_layers(plan, tensors, loaded.model, rows, sequential=options.sequential)
    result = operate(plan, tensors, layers)
    run = student_run(loaded.config, plan)
    perplexity = _perplexity(student(loaded, run, result), options, length) if options.eval_data else None

    source = f"{options.load.resolve().name}" + (
        f"/{loaded.folder.name}" if teacher == options.load else ", a Hugging Face directory"
    )
    origin = f"{source}, a qkv model, by surgery to {plan.target.attention_variant}: {plan.describe()}"
    if rows is not None:
        order = "layer after layer" if options.sequential else "on the source's activations"
        origin += f" on {rows.numel():,} tokens, {order}"
    record: dict[str, Any] = {
        "source": str(options.load),
        "teacher": str(teacher),
        "origin": origin,
        "merge": plan.merge,
        "num_query_groups": [plan.source.num_query_groups, plan.target.num_query_groups],
        "kv_rotary": plan.target.kv_rotary,
        "parameters": [formulas.parameters(model)["total"] for model in (plan.source, plan.target)],
        "cache_bytes_per_token": [
            formulas.kv_cache_bytes_per_token(model) for model in (plan.source, plan.target)
        ],
        "calibration_tokens": 0 if rows is None else rows.numel(),
        "sequential": options.sequential if rows is not None else None,
        "errors": errors,
        "eval_data": options.eval_data,
        "perplexity_before": source_perplexity,
        "perplexity_after": perplexity,
        "seconds": time.perf_counter() - began,
    }
    written = write_checkpoint(options.output, run, result, train_state={"imported_from": origin})
    record["checkpoint"] = str(written)
    write_json(options.output / RECORD, record)
    return record


def new_layers(
    plan: Plan, tensors: dict[str, Tensor], model: Any, rows: Tensor | None, *, sequential: bool = True
) -> tuple[list[dict[str, Tensor]], list[list[float]]]:
    """The new attention of every layer, and the errors of each group where it is calibrated.

    Args:
        tensors: of the source by their Hugging Face names.
        model: the source; where it is calibrated its attentions become the new ones on the way.
        rows: [n, s] tokens to calibrate with, or None.
    """
    count = plan.source.num_layers
    if rows is None:
        return [merge_closed(plan, Attention.of(plan.source, tensors, i)) for i in range(count)], []
    layers: list[dict[str, Tensor]] = []
    errors: list[list[float]] = []
    length, began = rows.shape[1], time.perf_counter()

    def each(index: int, moments: Any) -> None:
        layer = Attention.of(plan.source, tensors, index)
        found, error = merge_calibrated(plan, layer, moments, length)
        layers.append(found)
        errors.append(error)
        _write(plan, model, index, emulated(plan, found))

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            left = format_duration((time.perf_counter() - began) / done * (total - done))
            end = "\n" if done == total else ""
            sys.stderr.write(f"\r\033[Kcalibrated {done}/{total} layers  ETA {left}{end}")
            sys.stderr.flush()

    calibrate(model, rows, each, sequential=sequential, say=progress)
    return layers, errors


def _write(plan: Plan, model: Any, index: int, found: dict[str, Tensor]) -> None:
    """Put a layer's attention into the source's model."""
    from megatron_sharedproj.conversion.weights import name_map
    from megatron_sharedproj.retrofit.surgery import attention_names

    prefix, named = attention_names(index), dict(model.named_parameters())
    for entry in name_map(plan.source):
        parts = [found.get(name.removeprefix(prefix)) for name in entry.names]
        if entry.names[0].startswith(prefix) and all(part is not None for part in parts):
            parameter = named[entry.megatron]
            value = entry.join([part for part in parts if part is not None])
            with torch.no_grad():
                parameter.copy_(value.to(parameter.dtype))


def student_run(source: RunConfig, plan: Plan) -> RunConfig:
    """The result's RunConfig: the source's data, lengths and precision, and its new shape."""
    run = copy.deepcopy(source)
    run.model = plan.target
    run.checkpoint, run.distill = type(run.checkpoint)(), DistillConfig()
    run.parallel = type(run.parallel)()
    return run


def student(loaded: LoadedModel, run: RunConfig, tensors: dict[str, Tensor]) -> LoadedModel:
    """The result as a model of one process, in float32."""
    from megatron_sharedproj.model import build_model

    model = build_model(run.model)
    model.load_state_dict(to_megatron(run.model, tensors), strict=False)
    return dataclasses.replace(loaded, model=model.to(loaded.device).eval(), config=run)


def _perplexity(loaded: LoadedModel, options: Options, length: int) -> dict[str, Any] | None:
    if not options.eval_data:
        return None
    return evaluate_perplexity(
        loaded,
        options.eval_data,
        seq_length=length,
        max_tokens=options.eval_tokens,
        show_progress=sys.stderr.isatty(),
    )


def table(record: dict[str, Any]) -> str:
    """Source and result side by side, as Markdown."""
    rows: list[tuple[str, ...]] = [("", "source", "result")]
    for name, title in (
        ("num_query_groups", "key/value heads"),
        ("parameters", "parameters"),
        ("cache_bytes_per_token", "cache, bytes per token (2 per element)"),
    ):
        rows.append((title, *(f"{value:,}" for value in record[name])))
    if record["perplexity_before"]:
        figures = record["perplexity_before"], record["perplexity_after"]
        rows.append(("packed perplexity", *(f"{figure['perplexity']:.2f}" for figure in figures)))
        rows.append(("loss, nats per token", *(f"{figure['loss']:.4f}" for figure in figures)))
    rows.insert(1, ("---",) * 3)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
