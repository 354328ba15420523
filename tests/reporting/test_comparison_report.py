"""The report of comparisons: its files, its links, what it says, and the tool's messages."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from megatron_sharedproj.reporting import figures
from megatron_sharedproj.reporting.comparison_report.curves import band
from megatron_sharedproj.reporting.comparison_report.pages import write_report
from megatron_sharedproj.reporting.comparison_report.reading import read_comparison
from scripts import load

Writer = Callable[..., Path]
PLOTS = ("change", "cost", "gap", "loss", "loss_end", "perplexity", "recall")


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of these tests are not looked at: the coarser, the faster."""
    monkeypatch.setattr(figures, "_DPI", 30)


class Page(HTMLParser):
    """Links, anchors and text of a page; a tag that closes another one fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.links += [found["href"]] if "href" in found else []
        self.images += [found["src"]] if "src" in found else []
        self.anchors |= {found["id"]} if "id" in found else set()
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_links(folder: Path) -> tuple[Page, str]:
    """Every link of both pages leads to an anchor of its page or to a file that is there."""
    page = Page((folder / "report.html").read_text(encoding="ascii"))
    text = (folder / "report.md").read_text(encoding="ascii")
    anchors = set(re.findall(r'<a id="([^"]*)"></a>', text))
    in_text = re.findall(r"\]\(([^)]*)\)", text)
    assert set(page.links) <= set(in_text) and len(page.links) > 20
    for links, known in ((page.links, page.anchors), (in_text, anchors)):
        for link in set(links):
            if link.startswith("#"):
                assert link[1:] in known, link
            else:
                assert (folder / unquote(link)).is_file(), link
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    return page, text


def test_report_of_one_comparison(write_comparison: Writer, tmp_path: Path) -> None:
    folder = write_comparison(missing=["qk_eq_v_1236"])
    output = tmp_path / "out" / "report"
    written = write_report([read_comparison(folder)], output)
    assert [path.name for path in written] == ["report.html", "report.md", "figures.csv", "figures.json"]
    moved = tmp_path / "moved"
    output.rename(moved)
    shutil.rmtree(folder)
    page, text = check_links(moved)
    assert len(page.images) == len(PLOTS)
    for name in PLOTS:
        assert (moved / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for said in (text, page.text):
        assert "K=V, seed 1236: missing" in said
        assert "higher by more than the seeds allow: K=V +2.12 %" in said
        assert "not told apart from it: MQA +0.03 % (-1.33 to +1.40)" in said
        assert "K=V 6.1 % fewer and 50 % fewer" in said
        assert "Not finished: 1 of 15 runs" in said
        assert "Too close to conclude an order: MQA and QKV; K=V and Q=K=V; " in said
        assert "nan" not in said and str(tmp_path) not in said and "/elsewhere" not in said
    assert "| [QKV](#qkv) | [73.98 +- 2.60](#qkv) | - | - | baseline |" in text
    assert sorted(path.name for path in (moved / "runs" / "qkv_1234").iterdir()) == [
        "command.json", "log.jsonl", "perplexity.json", "recall.json", "run_config.json",
    ]  # fmt: skip
    record = json.loads((moved / "runs/qkv_1234/command.json").read_text())
    assert record["commit"] == "0123456789ab" and set(record["jobs"]) == {"training", "perplexity"}
    assert record["jobs"]["perplexity"]["command"][0] == "tools/evaluate.py"
    for path in moved.rglob("*.json*"):
        assert str(tmp_path) not in path.read_text()


def test_raw_figures(write_comparison: Writer, tmp_path: Path) -> None:
    models = ("qkv", "qk_eq_v", "qk_eq_v_matched")
    comparison = read_comparison(write_comparison(models=models))
    write_report([comparison], tmp_path / "out")
    with open(tmp_path / "out/figures.csv") as file:
        rows = {(row["model"], int(row["seed"])): row for row in csv.DictReader(file)}
    raw = json.loads((tmp_path / "out/figures.json").read_text())
    assert len(rows) == len(raw["runs"]) == 9
    for model, run in comparison.runs():
        row = rows[model.name, run.seed]
        assert float(row["packed_perplexity"]) == run.values["packed_perplexity"]
        assert (tmp_path / "out" / row["log"]).is_file()
    found = {(row["family"], row["model"], row["figure"]): row for row in raw["models"]}
    assert found["architecture", "qk_eq_v", "packed_perplexity"]["verdict"] == "higher"
    assert found["parameters", "qk_eq_v_matched", "recall"]["unit"] == "difference"
    assert len(raw["pairs"]) == 1 + 1


def test_chapters_have_records_plots_and_anchors_of_their_own(
    write_comparison: Writer, tmp_path: Path
) -> None:
    models = ("qkv", "qk_eq_v")
    folders = [
        write_comparison("a", models=models),
        write_comparison("b/a", models=models, protocol="padded"),
    ]
    write_report([read_comparison(folder) for folder in folders], tmp_path / "out")
    page, text = check_links(tmp_path / "out")
    assert len(page.images) == 2 * len(PLOTS)
    assert "## Side by side" in text and "trained on padded rows" in text
    for place in ("runs/a/qkv_1234", "runs/a-2/qkv_1234"):
        assert (tmp_path / "out" / place / "log.jsonl").is_file()
    assert (tmp_path / "out/a-2-loss.png").is_file() and "loss (nats per token), padding scored" not in text


def test_without_copies_links_lead_to_the_comparison(write_comparison: Writer, tmp_path: Path) -> None:
    folder = write_comparison(models=("qkv",))
    write_report([read_comparison(folder)], tmp_path / "x" / "out", copies=False)
    page, _ = check_links(tmp_path / "x" / "out")
    assert "../../comparison/runs/qkv_1234/log.jsonl" in page.links
    assert "../../comparison/jobs/qkv_1234.json" in page.links
    assert not (tmp_path / "x" / "out" / "runs").exists()


@pytest.mark.parametrize("models, seeds", [(("qkv",), (1234,)), (("qkv", "qk_eq_v"), (1235,))])
def test_few_runs(
    write_comparison: Writer, tmp_path: Path, models: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    write_report([read_comparison(write_comparison(models=models, seeds=seeds))], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "+-" not in text.split("## Method")[0] and "nan" not in text


def test_nothing_trained_yet(write_comparison: Writer, tmp_path: Path) -> None:
    folder = write_comparison(models=("qkv", "qk_eq_v"), seeds=(1234,), missing=("qkv_1234", "qk_eq_v_1234"))
    write_report([read_comparison(folder)], tmp_path / "out")
    page = Page((tmp_path / "out/report.html").read_text())
    assert "there is nothing to compare" in page.text and page.images == []
    assert "QKV, seed 1234: missing" in page.text and "Loss" not in page.text


def test_a_second_report_replaces_the_first_and_takes_no_other_file(
    write_comparison: Writer, tmp_path: Path
) -> None:
    folder, output = write_comparison(models=("qkv",), seeds=(1234,)), tmp_path / "out"
    write_report([read_comparison(folder)], output)
    (output / "runs/qkv_1234/notes.txt").write_text("mine")
    (folder / "runs/qkv_1234/recall.json").unlink()
    write_report([read_comparison(folder)], output)
    assert (output / "runs/qkv_1234/notes.txt").read_text() == "mine"
    assert not (output / "runs/qkv_1234/recall.json").exists()


def test_band_is_mean_lowest_and_highest_where_all_are() -> None:
    made = band([([1.0, 2.0, 3.0], [5.0, 4.0, 3.0]), ([2.0, 3.0, 4.0], [6.0, 2.0, 1.0])])
    assert (made.places, made.mean, made.low, made.high) == ([2, 3], [5, 2.5], [4, 2], [6, 3])
    assert band([]).places == []


def test_tool(write_comparison: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_comparison(models=("qkv", "qk_eq_v"), missing=["qk_eq_v_1236"])
    report = load("tools/report.py")
    assert report.main([str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{folder}/report/report.html, ")
    assert printed.err == "note: K=V, seed 1236: missing\n"
    (tmp_path / "file").touch()
    for args, message in (
        ([str(tmp_path / "none")], "no comparison.json there"),
        ([str(folder), str(folder)], "a folder is given twice"),
        ([str(folder), "--output-dir", str(folder)], "holds the runs themselves; give another folder"),
        ([str(folder), "--output-dir", str(tmp_path / "file")], "is a file; give a folder"),
    ):
        assert report.main(args) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert report.main([str(folder), "--output-dir", "/proc/report"]) == 1
    assert capsys.readouterr().err.startswith("error: --output-dir /proc/report: cannot be written (")
