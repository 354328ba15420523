"""The inspector's command line: exit codes, what it prints, the plot, and its messages."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sharedproj.data.indexed import IndexedWriter
from megatron_sharedproj.data.manifest import Counts, Manifest, TokenizerRecord
from megatron_sharedproj.data.tokenizers import train_bpe
from scripts import load

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "inspect_data.py"
SENTENCE = "The state of the union is the sum of its parts. "
TEXTS = [f"Number {i}: " + SENTENCE * (i % 9) + "caf\u00e9 \x1b[31m" for i in range(40)]

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([SENTENCE * 20], 290, folder)
    return str(folder)


@pytest.fixture
def tool(
    tmp_path: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Tool:
    """main() in a folder with the token file `data` and its manifest: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write("data", tokenizer_dir)
    inspect_data = load("tools/inspect_data.py")

    def call(*args: str) -> tuple[int, str, str]:
        try:
            code = inspect_data.main(list(args))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return call


def write(prefix: str, tokenizer_dir: str) -> None:
    from megatron_sharedproj.data.tokenizers import build_tokenizer

    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    sources: dict[str, Counts] = {"web": Counts(), "books": Counts()}
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for index, text in enumerate(TEXTS):
            ids = [*tokenizer.encode(text), tokenizer.eod]
            writer.add(np.array(ids), np.array([len(ids)], dtype=np.int32))
            sources["books" if index % 4 == 0 else "web"].add(Counts(1, len(text.encode()), len(ids)))
        writer.close()
        writer.publish()
    total = Counts()
    for counts in sources.values():
        total.add(counts)
    manifest = Manifest(
        tool_version="1",
        created="2026-01-31T12:00:00+00:00",
        split="train",
        text_key="text",
        dtype="uint16",
        append_eod=True,
        eod=tokenizer.eod,
        tokenizer=TokenizerRecord(
            "HuggingFaceTokenizer", tokenizer.describe(), tokenizer.vocab_size, tokenizer.sha256
        ),
        counts=total,
        sources=sources,
        rejected={"bad_json": 3},
        checksums={
            suffix: hashlib.sha256(Path(prefix + suffix).read_bytes()).hexdigest()
            for suffix in (".bin", ".idx")
        },
    )
    Path(f"{prefix}.json").write_text(manifest.to_json())


def test_a_sound_file(tool: Tool) -> None:
    code, out, err = tool("data", "--seq-length", "50")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    manifest = json.loads(Path("data.json").read_text())
    counts = manifest["counts"]
    assert lines[0] == "data" and lines[-1] == "  sound"
    ratio = counts["text_bytes"] / counts["tokens"]
    assert f"  40 documents, {counts['tokens']} tokens (uint16, highest id" in out
    assert f"{ratio:.4f} text bytes per token" in out and "  rejected: 3 bad_json" in lines
    books = next(line for line in lines if line.startswith("  books")).split()
    share = 100 * manifest["sources"]["books"]["tokens"] / counts["tokens"]
    assert books[1:3] == ["10", "25.00"] and books[6] == f"{share:.2f}"
    total = next(line for line in lines if line.startswith("  total")).split()
    assert total[1] == "40" and total[2] == total[4] == total[6] == "100.00"
    assert "% are longer than 50" in out and "not checked" not in out


def test_damage_is_exit_code_1(tool: Tool) -> None:
    data = Path("data.bin")
    whole = bytearray(data.read_bytes())
    whole[100:102] = struct.pack("<H", 5000)
    data.write_bytes(whole)
    code, out, _ = tool("data")
    assert code == 1 and out.endswith("  damaged\n")
    faults = [line for line in out.splitlines() if line.startswith("  fault: ")]
    assert len(faults) == 2 and "data.bin: byte 100 (token 50, document" in faults[0]
    assert "is id 5000, outside the vocabulary of" in faults[0] and "data.bin: sha256 is" in faults[1]
    code, out, _ = tool("data", "--no-checksums")
    assert (
        code == 1 and out.count("fault: ") == 1 and "not checked: sha256 of data.bin: --no-checksums" in out
    )


def test_json_has_everything(tool: Tool, tokenizer_dir: str) -> None:
    code, out, _ = tool(
        "data", "--json", "--tokenizer-model", tokenizer_dir, "--samples", "2", "--document", "3",
        "--search", "Number 7", "--seq-length", "64",
    )  # fmt: skip
    result = json.loads(out)
    (file,) = result["files"]
    assert code == 0 and result["sound"] is file["sound"] is True
    assert file["manifest"] == json.loads(Path("data.json").read_text())
    assert file["documents"] == 40 and file["lengths"]["seq_length"] == 64 and file["faults"] == []
    assert file["document"] == {"document": 3, "text": TEXTS[3]}
    assert [sample["text"] for sample in file["samples"]] == [
        TEXTS[sample["document"]] for sample in file["samples"]
    ]
    assert [match["document"] for match in file["search"]["matches"]] == [7]
    assert file["search"]["complete"] is True


def test_samples_are_chosen_by_the_seed(tool: Tool, tokenizer_dir: str) -> None:
    def chosen(*flags: str) -> list[str]:
        _, out, _ = tool("data", "--tokenizer-model", tokenizer_dir, "--samples", "5", *flags)
        return [line for line in out.splitlines() if line.startswith("  document ")]

    assert chosen() == chosen("--seed", "0") != chosen("--seed", "1")
    assert len(chosen()) == 5


def test_decoded_text_cannot_command_the_terminal(tool: Tool, tokenizer_dir: str) -> None:
    _, out, _ = tool("data", "--tokenizer-model", tokenizer_dir, "--document", "1", "--search", "caf\u00e9 ")
    assert "\x1b" not in out and "\\x1b[31m" in out and "caf\u00e9" in out
    assert "is in 10 document(s), and maybe more (--max-results)" in out


def test_sample_chars_and_max_results(tool: Tool, tokenizer_dir: str) -> None:
    base = ("data", "--json", "--tokenizer-model", tokenizer_dir)
    _, out, _ = tool(*base, "--samples", "40", "--sample-chars", "9")
    assert [item["text"] for item in json.loads(out)["files"][0]["samples"]] == [text[:9] for text in TEXTS]
    _, out, _ = tool(*base, "--search", "union", "--max-results", "3")
    search = json.loads(out)["files"][0]["search"]
    assert [match["document"] for match in search["matches"]] == [1, 2, 3] and not search["complete"]


def test_plot_is_a_png_with_something_on_it(tool: Tool) -> None:
    image = pytest.importorskip("matplotlib.image")
    assert tool("data", "--plot", "lengths.png", "--seq-length", "64")[0] == 0
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")
    pixels = image.imread("lengths.png")[..., :3]
    assert pixels.shape[:2] == (600, 1000)
    blue = (pixels[..., 2] > 0.6) & (pixels[..., 0] < 0.3)
    assert blue.mean() > 0.02  # the bars
    assert [path.name for path in Path(".").iterdir() if "tmp" in path.name] == []


def test_plot_of_two_files_differs_and_one_of_none_is_not_drawn(tool: Tool, tokenizer_dir: str) -> None:
    pytest.importorskip("matplotlib")
    write("other", tokenizer_dir)
    assert tool("data", "--plot", "one.png")[0] == tool("data", "other", "--plot", "two.png")[0] == 0
    assert Path("one.png").read_bytes() != Path("two.png").read_bytes()
    Path("data.idx").write_bytes(b"damaged")
    code, _, err = tool("data", "--plot", "none.png")
    assert code == 1 and "--plot none.png: not drawn" in err and not Path("none.png").exists()


def test_several_files_are_damaged_if_one_is(tool: Tool, tokenizer_dir: str) -> None:
    write("other", tokenizer_dir)
    Path("other.bin").write_bytes(Path("other.bin").read_bytes()[:-2])
    code, out, _ = tool("data", "other", "--tokenizer-model", tokenizer_dir, "--samples", "1")
    assert (
        code == 1 and "  sound\nother\n" in out and "the index is damaged, so no document is decoded" in out
    )


def test_another_tokenizer_is_refused(tool: Tool, tmp_path: Path) -> None:
    train_bpe(["other words " * 50], 280, tmp_path / "other")
    code, out, err = tool("data", "--tokenizer-model", "other", "--samples", "1")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: --tokenizer-model: this tokenizer (vocab_size 2")
    assert "is not the one that made data (HuggingFaceTokenizer tokenizer" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "PREFIX nothing: neither nothing.bin nor nothing.idx exists; give the path"),
        (["data.bin"], "PREFIX data.bin: neither data.bin.bin nor data.bin.idx exists; give data\n"),
        (["data", "data"], "PREFIX data: given twice"),
        (["data", "--samples", "3"], "--samples 3: needs the tokenizer; give --tokenizer-model DIR"),
        (["data", "--document", "3"], "--document 3: needs the tokenizer"),
        (["data", "--search", "x"], "--search x: needs the tokenizer"),
        (["data", "--search", ""], '--search "": no text to look for'),
        (["data", "--samples", "0"], "--samples 0: must be 1 or more"),
        (["data", "--sample-chars", "-1"], "--sample-chars -1: must be 1 or more"),
        (["data", "--vocab-size", "0"], "--vocab-size 0: must be 1 or more"),
        (["data", "--eod", "-1"], "--eod -1: must be 0 or more"),
        (["data", "--plot", "a.jpg"], "--plot a.jpg: must be a file name that ends in .png"),
        (["data", "--plot", "none/a.png"], "--plot none/a.png: none is not a folder"),
        (["data", "--tokenizer-model", "./none"], "--tokenizer-model ./none: no such file or directory"),
        (["data", "--samples"], "--samples: expected one argument; see --help"),
        ([], "PREFIX; see --help"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tool: Tool, flags: list[str], message: str) -> None:
    code, out, err = tool(*flags)
    assert (code, out) == (2, "") and message in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_document_that_is_not_there(tool: Tool, tokenizer_dir: str) -> None:
    code, _, err = tool("data", "--tokenizer-model", tokenizer_dir, "--document", "40")
    assert code == 2 and err == "error: --document 40: data has documents 0 to 39; give one of them\n"


def test_null_tokenizer_and_eod_flags(tool: Tool) -> None:
    with IndexedWriter("null", 10) as writer:
        writer.add(np.array([1, 2, 9, 3, 9]), np.array([3, 2], dtype=np.int32))
        writer.close()
        writer.publish()
    flags: list[Any] = ["null", "--tokenizer-type", "NullTokenizer", "--vocab-size", "10", "--search", "1 2"]
    code, out, _ = tool(*flags, "--eod", "9")
    assert code == 0 and "    document 0: '1 2'" in out and "not checked: EOD" not in out
    code, out, _ = tool("null", "--eod", "3")
    assert code == 1 and "document 0 ends with id 9, not EOD 3" in out and "EOD 3 inside document 1" in out


def test_alone_in_a_process_it_imports_neither_torch_nor_megatron(tool: Tool, tokenizer_dir: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['inspect_data.py', 'data', '--tokenizer-model', {tokenizer_dir!r}, '--samples', '1',"
        " '--search', 'union', '--plot', 'a.png']\n"
        "try:\n"
        f"    runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("  sound\n[]\n")
