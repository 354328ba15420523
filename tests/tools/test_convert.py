"""tools/convert_to_hf.py and tools/convert_from_hf.py: there and back, and every mistake in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from scripts import load

pytestmark = pytest.mark.usefixtures("parallel_state")


def tool(name: str) -> Callable[[list[str]], int]:
    module = load(f"tools/{name}.py")

    def main(argv: list[str]) -> int:
        import megatron_sharedproj.distributed as distributed

        # The tests' process group stays.
        module.__dict__.setdefault("distributed", distributed)
        original, distributed.finalize = distributed.finalize, lambda: None
        try:
            return int(module.main(argv))
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            distributed.finalize = original

    return main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, parallel_state: Any) -> Path:
    """A tiny trained K=V model, 96 ids padded to 104 rows."""
    root = tmp_path_factory.mktemp("run")
    prefix = tiny.write_data(root)
    flags = tiny.flags(
        prefix, save=str(root / "run"), make_vocab_size_divisible_by=104, max_position_embeddings=64
    )
    tiny.losses(flags)
    return root / "run"


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert tool("convert_to_hf")(["--load", str(run_folder), "--output", str(folder)]) == 0
    return folder


def test_there_and_back(
    run_folder: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("convert_from_hf")(["--load", str(exported), "--save", str(tmp_path / "back")]) == 0
    out = capsys.readouterr().out
    assert "qk_eq_v" in out and "104 vocabulary rows, 8 of them padding (as exported)" in out
    again = tmp_path / "again"
    assert tool("convert_to_hf")(["--load", str(tmp_path / "back"), "--output", str(again)]) == 0
    for name in ("model.safetensors", "vocabulary_padding.st"):
        assert (again / name).read_bytes() == (exported / name).read_bytes()
    card = (again / "README.md").read_text()
    assert "Imported: sharedproj folder model at step 6, whose README.md says" in card
    assert "not trained by this package" not in card
    # Training goes on from it.
    prefix = tiny.write_data(tmp_path)
    flags = tiny.flags(
        prefix, load=str(tmp_path / "back"), finetune=True, make_vocab_size_divisible_by=104,
        max_position_embeddings=64, train_iters=2, lr_warmup_iters=1,
    )  # fmt: skip
    run = tiny.trainer([*flags, "--save", str(tmp_path / "more")])
    assert run.train() == 0
    run.log.close()
    assert tool("convert_to_hf")(["--load", str(tmp_path / "more"), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Started from: sharedproj folder" in card and "256 positions in 2 steps" in card


def test_overwriting_deletes_no_checkpoint(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    before = sorted(copy.rglob("*"))
    for output in (copy, next(copy.glob("iter_*")), tmp_path):
        line = ["--load", str(copy), "--output", str(output), "--overwrite", "--no-verify"]
        assert tool("convert_to_hf")(line) == 2
        assert "holds no export (no conversion.json)" in capsys.readouterr().err
    assert sorted(copy.rglob("*")) == before
    # Nor one that was put into an export.
    (tmp_path / "conversion.json").write_text("{}")
    assert tool("convert_to_hf")([*line[:3], str(tmp_path), *line[4:]]) == 2
    assert f"holds {copy}, which --overwrite would delete" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["convert_to_hf", "convert_from_hf"])
def test_one_process_only(
    name: str,
    run_folder: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given, target = (run_folder, "--output") if name == "convert_to_hf" else (exported, "--save")
    assert tool(name)(["--load", str(given), target, str(tmp_path / "out")]) == 2
    assert "WORLD_SIZE 2: run this tool as one process" in capsys.readouterr().err


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line(
    run_folder: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub

    from megatron_sharedproj.checkpointing import sharded

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full_disk)
    monkeypatch.setattr(sharded.dist_checkpointing, "save", full_disk)
    assert tool("convert_to_hf")(["--load", str(run_folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"--output {tmp_path / 'out'}: cannot be written" in error and error.count("\n") == 1
    (tmp_path / "there").mkdir()
    for save in ("new/and/deep", "there"):
        assert tool("convert_from_hf")(["--load", str(exported), "--save", str(tmp_path / save)]) == 2
        error = capsys.readouterr().err
        assert "cannot be written" in error and "No space" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_what_is_printed(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool("convert_to_hf")(["--load", str(run_folder), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "(data set tiny_text_document)" in out
    assert "bound" in out and "by Megatron's full softmax, vocabulary padding included" in out
    assert "with the cache and without" in out


def damaged(exported: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(exported, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "bad config":
        (folder / "config.json").write_text("{")
    elif damage == "truncated":
        weights.write_bytes(data[:-100])
    elif damage == "header bit":
        weights.write_bytes(data[:20] + bytes([data[20] ^ 0x80]) + data[21:])
    elif damage == "flipped bit":
        weights.write_bytes(data[:-9] + bytes([data[-9] ^ 0x10]) + data[-8:])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "pickled":
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "deep config":
        (folder / "config.json").write_text("[" * 100_000)
    elif damage == "index":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    elif damage == "iteration":
        values = json.loads((folder / "conversion.json").read_text())
        (folder / "conversion.json").write_text(json.dumps({**values, "iteration": "six"}))
    elif damage:
        changes = {
            "variant": {"attention_variant": "qkv"},
            "vocabulary": {"vocab_size": 95},
            "layers": {"num_hidden_layers": 3},
            "many layers": {"num_hidden_layers": 10**12},
            "rows": {"padded_vocab_size": 10**12},
            "kind": {"hidden_size": "32"},
            "half": {"num_hidden_layers": 1.5},
            "activation": {"hidden_act": ["gelu"]},
            "rotary": {"position_embedding_type": "rope", "attention_variant": "qkv", "rope_parameters": [1]},
        }
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes[damage]}))
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no config", "has no config.json"),
        ("bad config", "config.json is not valid JSON"),
        ("truncated", "not a whole safetensors file"),
        ("header bit", "not a whole safetensors file"),
        ("flipped bit", "model.safetensors is not the file that was exported (sha256 in conversion.json)"),
        ("no weights", "has neither model.safetensors nor model.safetensors.index.json"),
        ("pickled", "its weights are pickled (pytorch_model.bin), which are not read"),
        ("variant", "8 missing (model.layers.0.self_attn.k_proj"),
        ("vocabulary", "has 96 rows, config.json's vocab_size is 95"),
        ("layers", "missing (model.layers.2."),
        ("deep config", "config.json is not valid JSON"),
        ("index", "model.safetensors.index.json is damaged"),
        ("iteration", "conversion.json is damaged (iteration 'six')"),
        ("many layers", "num_hidden_layers 1000000000000: at most 10000 are read"),
        ("rows", "vocab_size 96 and padded_vocab_size 1000000000000 do not fit"),
        ("kind", "hidden_size '32': expected a whole number"),
        ("half", "num_hidden_layers 1.5: expected a whole number"),
        ("activation", "hidden_act ['gelu']: expected text"),
        ("rotary", "rope_parameters [1]: expected an object"),
    ],
)
def test_damaged_folders(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    folder = damaged(exported, tmp_path / "damaged", damage)
    assert tool("convert_from_hf")(["--load", str(folder), "--save", str(tmp_path / "save")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --load") and message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load", "nowhere"], "--load nowhere: no checkpoint there"),
        (["--format", "llama"], "--format llama: position_embedding_type learned_absolute"),
        (["--max-shard-size", "huge"], "--max-shard-size huge: must be a size"),
        (["--verify-tokens", "1"], "--verify-tokens 1: must be at least 2"),
        (["--verify-tolerance", "0"], "--verify-tolerance 0.0: must be positive"),
        (["--verify-data", "nothing.txt"], "--verify-data nothing.txt: neither a text file nor"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], "--tokenizer-type HuggingFaceTokenizer: "),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "gone/it/"],
            "--tokenizer-model gone",
        ),
        (["--output", "no/such/parent"], "is not a folder that can be written"),
    ],
)
def test_mistakes_are_one_line(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    line = ["--load", str(run_folder), "--output", str(tmp_path / "out"), *flags]
    assert tool("convert_to_hf")(line) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_overwritten(
    exported: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("convert_from_hf")(["--load", str(exported), "--save", str(run_folder)]) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    assert tool("convert_from_hf")(["--load", str(exported), "--save", str(copy), "--overwrite"]) == 0


def test_an_import_checks_its_tokenizer(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_sharedproj.data.tokenizers import train_bpe

    folder = tmp_path / "folder"
    shutil.copytree(exported, folder)
    train_bpe(["a text of no length to speak of"], 257, folder)
    line = ["--load", str(folder), "--save", str(tmp_path / "save")]
    assert tool("convert_from_hf")(line) == 2
    error = capsys.readouterr().err
    assert "tokens, the model has 104 rows" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert tool("convert_from_hf")([*line, "--tokenizer-type", "NullTokenizer"]) == 0


def test_another_tokenizer_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_sharedproj.data.tokenizers import train_bpe

    train_bpe(["a text of no length to speak of"], 257, tmp_path / "tokenizer")
    line = ["--load", str(run_folder), "--output", str(tmp_path / "out")]
    line += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "tokenizer")]
    assert tool("convert_to_hf")(line) == 2
    error = capsys.readouterr().err
    assert "tokens, the model has 104" in error and error.count("\n") == 1
