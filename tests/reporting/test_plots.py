"""Loss curves: what is read from a log, what is drawn, and the tool's messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sharedproj.reporting.plots import load_run, loss_figure, plot_loss_curves, smoothed
from scripts import load

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "plot_runs.py"
TOKENS = 4096  # per iteration


def training(iteration: int, loss: float) -> dict[str, object]:
    return {
        "iteration": iteration,
        "consumed_tokens": iteration * TOKENS,
        "lm_loss": loss,
        "learning_rate": 1e-3,
        "tokens_per_second": 1000.0,
        "grad_norm": 0.5,
    }


def validation(iteration: int, loss: float) -> dict[str, object]:
    return {"iteration": iteration, "validation_lm_loss": loss, "validation_perplexity": 2.718**loss}


def write_log(folder: Path, records: list[dict[str, object]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


def curve(offset: float) -> list[dict[str, object]]:
    records = []
    for iteration in range(10, 210, 10):
        records.append(training(iteration, offset + 6.0 / iteration**0.2))
        if iteration % 50 == 0:
            records.append(validation(iteration, offset + 0.1 + 6.0 / iteration**0.2))
    return records


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("name", ["", "log.jsonl"])
def test_reads_a_run_folder_or_its_log(tmp_path: Path, name: str) -> None:
    folder = write_log(tmp_path / "run", [training(10, 5.0), validation(10, 5.5), training(20, 4.0)])
    run = load_run(folder / name)
    assert run.training_curve() == ([10.0, 20.0], [5.0, 4.0])
    assert run.validation_curve() == ([10.0], [5.5])


def test_a_resumed_run_replaces_what_followed_its_checkpoint(tmp_path: Path) -> None:
    before = [
        training(10, 5.0),
        validation(10, 5.1),
        training(20, 4.0),
        validation(20, 4.4),
        training(30, 3.9),
    ]
    resumed = [training(15, 4.5), training(25, 4.1), validation(25, 4.2), validation(25, 4.3)]
    run = load_run(write_log(tmp_path, before + resumed))
    assert run.training_curve() == ([10.0, 15.0, 25.0], [5.0, 4.5, 4.1])
    assert run.validation_curve() == ([10.0, 25.0], [5.1, 4.3])


def test_smoothing_is_a_debiased_moving_average() -> None:
    losses = [4.0, 2.0, float("nan"), 3.0]
    first, second = 4.0, (0.5 * 0.5 * 4 + 0.5 * 2) / 0.75
    fourth = (0.5 * 0.5 * 0.5 * 4 + 0.5 * 0.5 * 2 + 0.5 * 3) / 0.875
    assert smoothed(losses, 0.5) == pytest.approx([first, second, second, fourth])
    assert smoothed([5.0] * 4, 0.9) == pytest.approx([5.0] * 4)
    assert smoothed([1.0, 2.0], 0.0) == [1.0, 2.0]


def test_smoothed_line_over_the_losses_themselves(tmp_path: Path) -> None:
    run = load_run(write_log(tmp_path, curve(0)))
    (axes,) = loss_figure({"a": run}, smoothing=0.9, y_range=(2.0, 3.0)).axes
    raw, line, marked = axes.get_lines()
    assert list(raw.get_ydata()) == run.training_curve()[1]
    assert list(line.get_ydata()) == smoothed(run.training_curve()[1], 0.9)
    assert raw.get_alpha() < line.get_alpha() and marked.get_label() == "a, validation"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a, training", "a, validation"]
    assert axes.get_ylim() == (2.0, 3.0)


def test_padded_validation_is_named(tmp_path: Path) -> None:
    record = {"iteration": 20, "validation_lm_loss": 1.6, "validation_padded_perplexity": 5.0}
    run = load_run(write_log(tmp_path, [training(10, 5.0), record]))
    (axes,) = loss_figure({"a": run}).axes
    assert axes.get_lines()[1].get_label() == "a, validation (padded)"


def test_validation_lies_on_the_token_axis_of_its_training_records(tmp_path: Path) -> None:
    records = [training(10, 5.0), training(20, 4.0), *(validation(i, 4.5) for i in (5, 10, 15, 25))]
    run = load_run(write_log(tmp_path, records))
    assert run.training_curve("consumed_tokens")[0] == [10 * TOKENS, 20 * TOKENS]
    assert run.validation_curve("consumed_tokens")[0] == [i * TOKENS for i in (5, 10, 15, 25)]


def test_token_axis_without_token_counts_is_an_error(tmp_path: Path) -> None:
    run = load_run(write_log(tmp_path, [validation(10, 4.5)]))
    with pytest.raises(ValueError, match=r"--x consumed_tokens: .*log\.jsonl has no record.*--x iteration"):
        run.validation_curve("consumed_tokens")
    with pytest.raises(ValueError, match="--x epoch: choose one of iteration, consumed_tokens"):
        run.validation_curve("epoch")


def test_a_torn_last_line_is_ignored_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(write_log(tmp_path, [training(10, 5.0)], tail='{"iteration": 20, "lm_lo'))
    assert run.training_curve() == ([10.0], [5.0])
    captured = capsys.readouterr()
    assert captured.err == f"note: {tmp_path / 'log.jsonl'}:2: incomplete last line ignored\n"
    assert captured.out == ""


def test_a_complete_last_line_without_newline_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(write_log(tmp_path, [training(10, 5.0)], tail=json.dumps(training(20, 4.0))))
    assert run.training_curve() == ([10.0, 20.0], [5.0, 4.0])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"iteration": 20, "lm_lo', "not JSON"),
        ("[1, 2]", "no integer iteration"),
        ('{"lm_loss": 3.0}', "no integer iteration"),
        ('{"iteration": "20", "lm_loss": 3.0}', "no integer iteration"),
        ('{"iteration": 20, "lm_loss": null}', "lm_loss is None"),
        ('{"iteration": 20, "validation_lm_loss": "low"}', "validation_lm_loss is 'low'"),
    ],
)
def test_any_other_bad_line_is_an_error_with_its_place(tmp_path: Path, line: str, reason: str) -> None:
    write_log(tmp_path, [training(10, 5.0)], tail=line + "\n" + json.dumps(training(30, 4.0)) + "\n")
    with pytest.raises(ValueError) as error:
        load_run(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'log.jsonl'}:2: ")
    assert reason in str(error.value)


def test_no_log_and_an_empty_log_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no log.jsonl there; give the --save folder"):
        load_run(tmp_path)
    write_log(tmp_path, [])
    with pytest.raises(ValueError, match="no loss in it yet"):
        load_run(tmp_path)


def test_token_axis_is_labelled_in_thousands_and_millions(tmp_path: Path) -> None:
    runs = {"a": load_run(write_log(tmp_path, curve(0)))}
    (axes,) = loss_figure(runs, x="consumed_tokens").axes
    text = axes.xaxis.get_major_formatter()
    assert axes.get_xlabel() == "consumed tokens"
    assert [text(value) for value in (0, 500, 250e3, 1.5e6, 10e9)] == ["0", "500", "250k", "1.5M", "10B"]


@pytest.mark.parametrize("x", ["iteration", "consumed_tokens"])
def test_plot_is_a_png_of_1000_by_600_and_leaves_nothing_else(tmp_path: Path, x: str) -> None:
    runs = {name: load_run(write_log(tmp_path / name, curve(i))) for i, name in enumerate(("qkv", "K=V"))}
    output = tmp_path / "plots" / "curves.png"
    plot_loss_curves(runs, output, x=x, unigram_entropy=5.2, title="two runs")
    assert png_size(output) == (1000, 600)
    assert os.listdir(output.parent) == ["curves.png"]


def test_what_is_drawn(tmp_path: Path) -> None:
    runs = {name: load_run(write_log(tmp_path / name, curve(i))) for i, name in enumerate(("qkv", "K=V"))}
    (axes,) = loss_figure(runs, unigram_entropy=5.25, title="two runs").axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == [
        "qkv, training", "qkv, validation", "K=V, training", "K=V, validation", "unigram entropy, 5.250",
    ]  # fmt: skip
    for name, run in runs.items():
        thin, marked = lines[f"{name}, training"], lines[f"{name}, validation"]
        assert (list(thin.get_xdata()), list(thin.get_ydata())) == run.training_curve()
        assert (list(marked.get_xdata()), list(marked.get_ydata())) == run.validation_curve()
        assert thin.get_color() == marked.get_color()
        assert thin.get_linewidth() < marked.get_linewidth()
        assert marked.get_marker() == "o"
    assert lines["qkv, training"].get_color() != lines["K=V, training"].get_color()
    assert list(lines["unigram entropy, 5.250"].get_ydata()) == [5.25, 5.25]
    assert axes.get_xlabel() == "iteration"
    assert axes.get_ylabel() == "lm loss (nats per token)"
    assert axes.get_title() == "two runs"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)


def test_a_plot_replaces_the_old_one_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    run = load_run(write_log(tmp_path / "run", curve(0)))
    output = tmp_path / "out" / "curves.png"
    output.parent.mkdir()
    output.write_text("old")
    plot_loss_curves({"a": run}, output)
    assert png_size(output) == (1000, 600)
    (output.parent / "folder.png").mkdir()
    with pytest.raises(OSError):
        plot_loss_curves({"a": run}, output.parent / "folder.png")
    assert sorted(os.listdir(output.parent)) == ["curves.png", "folder.png"]


def test_no_run_and_no_matplotlib_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no run to plot"):
        plot_loss_curves({}, tmp_path / "curves.png")
    run = load_run(write_log(tmp_path / "run", curve(0)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"^matplotlib is not installed; .*pip install -e \.\[plot\]"):
        plot_loss_curves({"a": run}, tmp_path / "curves.png")


def test_tool_writes_the_plot_from_a_bare_clone(tmp_path: Path) -> None:
    # Another folder and no PYTHONPATH: the tool finds the package beside itself.
    for name in ("a", "b"):
        write_log(tmp_path / name, curve(0))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clone = tmp_path / "clone"
    (clone / "tools").mkdir(parents=True)
    shutil.copy(TOOL, clone / "tools")
    (clone / "megatron_sharedproj").symlink_to(REPO / "megatron_sharedproj")
    command = [sys.executable, str(clone / "tools" / TOOL.name), "a", "b/log.jsonl", "--output", "c.png"]
    done = subprocess.run(
        [*command, "--labels", "qkv,K=V", "--x", "consumed_tokens"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "c.png: 2 run(s)\n"
    assert png_size(tmp_path / "c.png") == (1000, 600)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The tool's main() in this process, in a folder with the runs a, b and x/a."""
    monkeypatch.chdir(tmp_path)
    plot_runs = load("tools/plot_runs.py")
    for name in ("a", "b", "x/a"):
        write_log(tmp_path / name, curve(0))

    def call(*args: str) -> tuple[int, str]:
        try:
            code = plot_runs.main(list(args))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "args, expected",
    [
        (["a"], ["--output", "required"]),
        (["a", "--output", "c.pdf"], ["--output c.pdf", "ends in .png"]),
        (["a", "b", "--labels", "one", "--output", "c.png"], ["--labels one", "1 label(s) for 2 run(s)"]),
        (["a", "b", "--labels", "one,one", "--output", "c.png"], ["--labels one,one", "distinct"]),
        (["a", "a", "--output", "c.png"], ["RUN a", "given twice"]),
        (["none", "--output", "c.png"], ["none: no log.jsonl there", "--save folder"]),
        (["a", "--smoothing", "1", "--output", "c.png"], ["--smoothing 1", "[0, 1)"]),
        (["a", "--y-range", "5,3", "--output", "c.png"], ["--y-range 5,3", "lower loss first"]),
        (["a", "--y-range", "5", "--output", "c.png"], ["--y-range", "like 3.2,5"]),
        (["a", "--x", "time", "--output", "c.png"], ["--x", "time", "consumed_tokens"]),
    ],
)
def test_tool_mistakes_are_one_line_and_exit_2(in_process, args: list[str], expected: list[str]) -> None:
    code, message = in_process(*args)
    assert code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    for part in expected:
        assert part in message
    assert not Path("c.png").exists()


def test_tool_labels_runs_by_folder_or_by_path(in_process) -> None:
    plot_runs = load("tools/plot_runs.py")
    assert plot_runs.labels_of(["a", "b/log.jsonl"], None) == ["a", "b"]
    assert plot_runs.labels_of(["a", "x/a"], None) == ["a", "x/a"]
    assert in_process("a", "x/a", "--output", "c.png") == (0, "")
