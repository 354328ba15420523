"""Exports from any layout are the trained model: logits, text, bytes, and back again bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import megatron_sharedproj.layers.hf  # noqa: F401  (registers the Auto classes)
from megatron_sharedproj import formulas
from megatron_sharedproj.conversion.export import PADDING, ExportOptions, export, read_record
from megatron_sharedproj.conversion.hf_import import import_folder, tokenizer_fields
from megatron_sharedproj.conversion.megatron_checkpoint import model_state
from megatron_sharedproj.conversion.tokenizer_files import write_tokenizer
from megatron_sharedproj.data.tokenizers import build_tokenizer
from models import CONVERTED, ROWS, SAMPLE, VOCABULARY, load

BOUND = 1e-5


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def size(request: Any) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=CONVERTED)
def exported(
    request: Any, size: int, checkpoints: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """The loaded checkpoint and its export, verified on the way."""
    loaded = load(checkpoints[size] / request.param)
    folder = tmp_path_factory.mktemp("export") / request.param
    lines: list[str] = []
    options = ExportOptions(folder, verify_tokens=300)
    options.tokenizer_source = loaded.config.data.tokenizer_model
    result = export(loaded, options, lines.append)
    assert result is not None and result.max_difference <= result.bound
    assert result.cache_difference is not None and any(f"{result.bound:.2e}" in line for line in lines)
    return loaded, folder


def text_ids(length: int = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (2, length), generator=generator)


@torch.no_grad()
def test_logits_are_the_trained_models(exported: tuple[Any, Path]) -> None:
    loaded, folder = exported
    ids = text_ids()
    expected = loaded.model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)[..., :VOCABULARY]
    for kernel in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.use_compiled_kernel = kernel
        found = model(ids).logits
        assert (found - expected).abs().max() <= BOUND * expected.abs().max()
    assert (expected[:, 1:] - expected[:, :-1]).abs().amax(-1).min() > 0.1


@torch.no_grad()
def test_greedy_text_for_200_steps(exported: tuple[Any, Path], size: int) -> None:
    loaded, folder = exported
    steps = 200 if size == 1 else 20  # the same weights
    prompt = text_ids(16)[:1]
    tokens = prompt
    for _ in range(steps):
        positions = torch.arange(tokens.shape[1])[None]
        logits = loaded.model(tokens, positions, None)[:, -1, :VOCABULARY]
        tokens = torch.cat([tokens, logits.argmax(-1)[None]], dim=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None}
    for cached in (True, False):
        found = model.generate(prompt, use_cache=cached, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(found, tokens)


def test_files(exported: tuple[Any, Path]) -> None:
    loaded, folder = exported
    config = loaded.config.model
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        elements = sum(file.get_tensor(name).numel() for name in names)
        assert file.get_tensor("model.embed_tokens.weight").shape[0] == VOCABULARY
    projected = {name.split(".")[-2] for name in names if "layers.0.self_attn" in name} - {"q_norm", "k_norm"}
    alone = ["k_rope"] if config.kv_rotary == "separate_rope_head" else []
    assert projected == {f"{name}_proj" for name in (*config.variant.projections, *alone, "o")}
    tables = 2 if config.untie_embeddings_and_output_weights else 1
    padded = tables * (ROWS - VOCABULARY) * config.hidden_size
    assert elements == formulas.parameters(config)["total"] - padded
    values = json.loads((folder / "config.json").read_text())
    assert set(values["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert values["padded_vocab_size"] == ROWS and values["vocab_size"] == VOCABULARY
    assert read_record(folder)["padded_vocab_size"] == ROWS
    card = (folder / "README.md").read_text()
    assert f"{formulas.kv_cache_bytes_per_token(config):,} bytes per token" in card
    assert "3,072 positions in 3 steps, all of them real tokens" in card
    assert f"`{config.attention_variant}`" in card and "largest difference" in card
    assert f"cached {' and '.join(tensor.describe() for tensor in config.cached_tensors())}." in card
    assert (f"Rotary positions, `{config.kv_rotary}`, on {config.rope_size} of" in card) == bool(
        config.rope_size
    )
    # Nothing in it names this machine.
    for file in folder.iterdir():
        assert str(folder.parent).encode() not in file.read_bytes(), file.name


def test_import_gives_the_checkpoint_back(exported: tuple[Any, Path], tmp_path: Path) -> None:
    loaded, folder = exported
    written = import_folder(folder, tmp_path / "back", tokenizer=tokenizer_fields(folder, {}), say=str)
    again = load(tmp_path / "back")
    before, after = model_state(loaded.model), model_state(again.model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert again.config.model == loaded.config.model.replace(scaled_init=True)
    assert written.name == "iter_0000003" and again.tokenizer.vocab_size == VOCABULARY
    # And a second export of it is the same file.
    export(again, ExportOptions(tmp_path / "second", verify=False), str)
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_tokenizer_is_the_runs(exported: tuple[Any, Path]) -> None:
    loaded, folder = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    text = SAMPLE.read_text()[:500]
    assert theirs(text)["input_ids"] == loaded.tokenizer.encode(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == loaded.tokenizer.eod == AutoConfig.from_pretrained(folder).eos_token_id


def test_no_token_is_added_that_training_never_saw(
    checkpoints: dict[int, Path], tokenizer_folder: Path, tmp_path: Path
) -> None:
    """A Llama-like tokenizer.json puts BOS before every text; training data have none."""
    source = tmp_path / "with_bos"
    shutil.copytree(tokenizer_folder, source)
    described = json.loads((source / "tokenizer.json").read_text())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(described))
    assert AutoTokenizer.from_pretrained(source)("a text")["input_ids"][0] == 0
    loaded = load(checkpoints[1] / "qkv")
    loaded.tokenizer = build_tokenizer("HuggingFaceTokenizer", str(source))
    export(loaded, ExportOptions(tmp_path / "out", verify=False, tokenizer_source=str(source)), str)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a text")["input_ids"] == loaded.tokenizer.encode("a text")


def exported_tokenizer(source: Path, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The run's tokenizer, the exported one, and the ids for config.json."""
    folder.mkdir()
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(source))
    ids = write_tokenizer(tokenizer, str(source), folder, 64)
    return tokenizer, AutoTokenizer.from_pretrained(folder), ids


@pytest.mark.parametrize("role", ["bos_token", "pad_token", "unk_token"])
def test_a_special_token_outside_the_vocabulary_gets_no_id(
    role: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """transformers would add it behind the last row of the embedding."""
    source = tmp_path / "source"
    shutil.copytree(tokenizer_folder, source)
    values = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**values, role: "<absent>"}))
    tokenizer, theirs, ids = exported_tokenizer(source, tmp_path / "out")
    assert len(theirs) == tokenizer.vocab_size and ids["bos_token_id"] == theirs.bos_token_id == tokenizer.eod


def test_pad_token_and_chat_template_travel(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tokenizer_folder, source)
    described = json.loads((source / "tokenizer.json").read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "id": VOCABULARY, "content": "<pad>"})
    (source / "tokenizer.json").write_text(json.dumps(described))
    (source / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for index, given in enumerate((source, source / "tokenizer.json")):
        _, theirs, ids = exported_tokenizer(given, tmp_path / f"out{index}")
        assert theirs.pad_token_id == ids["pad_token_id"] == VOCABULARY
        assert theirs.chat_template == "{{ messages }}"


_ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_sharedproj", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(base).__name__ == "SharedProjModel", type(base)
print(model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)[0].tolist())
"""


@pytest.mark.parametrize("name", ["q_gqa", "rope_qkv"])
def test_export_stands_alone(name: str, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    loaded = load(checkpoints[1] / name)
    export(loaded, ExportOptions(tmp_path / "out", verify=False), str)
    prompt = text_ids(12)[:1]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    ids = ",".join(str(i) for i in prompt[0].tolist())
    command = [sys.executable, "-c", _ALONE, str(tmp_path / "out"), ids]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = model.generate(prompt, do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert json.loads(done.stdout.splitlines()[-1]) == expected[0].tolist()


def test_shards_and_rounding(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    loaded = load(checkpoints[1] / "qk_eq_v")
    options = ExportOptions(tmp_path / "out", dtype="bf16", max_shard_size="50KB", verify_tokens=100)
    export(loaded, options, str)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert "were rounded to bfloat16" in (tmp_path / "out" / "README.md").read_text()
    import_folder(
        tmp_path / "out", tmp_path / "back", tokenizer=tokenizer_fields(tmp_path / "out", {}), say=str
    )
    before, after = (model_state(x.model) for x in (loaded, load(tmp_path / "back")))
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("gpt2", "q_mqa"),
        ("llama", "llama"),
        ("llama", "tied_llama"),
        ("gguf", "qk_eq_v"),
        ("gguf", "llama"),
        ("gguf", "tied_llama"),
    ],
)
def test_stock_formats_are_verified_too(
    format: str, name: str, checkpoints: dict[int, Path], tmp_path: Path
) -> None:
    loaded, lines = load(checkpoints[1] / name), []
    options = ExportOptions(tmp_path / "out", format=format, verify_tokens=200)
    result = export(loaded, options, lines.append)
    assert result is not None and result.max_difference <= result.bound
    if format == "gguf":
        assert (tmp_path / "out" / "model.gguf").is_file()
        card = (tmp_path / "out" / "README.md").read_text()
        assert 'Llama("out/model.gguf"' in card and "from_pretrained" not in card
        assert "the file itself was read back and compared" in card
        return
    assert not list((tmp_path / "out").glob("*_sharedproj.py")) and not (tmp_path / "out" / PADDING).exists()
    ids = text_ids()
    expected = loaded.model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)[..., :VOCABULARY]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[format]
    assert (model(ids).logits - expected).abs().max() <= BOUND * expected.abs().max()


def test_the_cache_policy_of_rotated_keys(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    loaded, lines = load(checkpoints[1] / "rotate_keys"), []
    config = loaded.config.model
    options = ExportOptions(tmp_path / "out", kv_cache_policy="store_both", verify_tokens=100)
    export(loaded, options, lines.append)
    own = formulas.kv_cache_bytes_per_token(config, policy="store_both")
    assert own == 2 * formulas.kv_cache_bytes_per_token(config)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{own:,} bytes per token" in card and "cached kv (rotated) and kv." in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        cache = model(text_ids(8), use_cache=True)["past_key_values"]
    assert len(cache.layers[0]._stored) == 2
    import_folder(
        tmp_path / "out", tmp_path / "back", tokenizer=tokenizer_fields(tmp_path / "out", {}), say=str
    )
    assert load(tmp_path / "back").config.model == config.replace(scaled_init=True)
    for name, format, words in (
        ("rotate_values", "sharedproj", "rotate_keys of a tied key/value, and this model is qk_eq_v"),
        ("tied_llama", "llama", "an engine of --format llama decides"),
    ):
        options = ExportOptions(tmp_path / "no", format=format, kv_cache_policy="store_both")
        with pytest.raises(ValueError, match=f"--kv-cache-policy store_both: .*{words}"):
            export(load(checkpoints[1] / name), options, str)
    assert not (tmp_path / "no").exists()


def test_a_wrong_export_is_refused_and_leaves_nothing(
    checkpoints: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sharedproj.conversion import export as module

    def slightly_wrong(*args: Any) -> Any:
        tensors = original(*args)
        tensors["model.layers.1.self_attn.kv_proj.bias"][3] += 0.01
        return tensors

    original = module.to_hugging_face
    monkeypatch.setattr(module, "to_hugging_face", slightly_wrong)
    loaded = load(checkpoints[1] / "qk_eq_v")
    with pytest.raises(ValueError, match="verification failed: logits differ by"):
        export(loaded, ExportOptions(tmp_path / "out"), str)
    assert not list(tmp_path.iterdir())


def test_positions_of_no_text(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    """A NullTokenizer takes no text: random ids are compared, and no tokenizer is written."""
    loaded = load(checkpoints[1] / "mqa")
    loaded.tokenizer = build_tokenizer("NullTokenizer", vocab_size=VOCABULARY)
    result = export(loaded, ExportOptions(tmp_path / "out"), str)
    assert result is not None and "random ids" in result.data
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


def test_output_is_replaced_as_a_whole(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    loaded, out = load(checkpoints[1] / "qkv"), tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("mine")
    with pytest.raises(ValueError, match="--output .*: is not empty; give another folder, or --overwrite"):
        export(loaded, ExportOptions(out, verify=False), str)
    with pytest.raises(ValueError, match=r"holds no export \(no conversion.json\)"):
        export(loaded, ExportOptions(out, verify=False, overwrite=True), str)
    assert (out / "old").read_text() == "mine"
    (out / "conversion.json").write_text("{}")
    export(loaded, ExportOptions(out, verify=False, overwrite=True), str)
    assert not (out / "old").exists() and (out / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
