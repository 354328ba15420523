"""Files of the released code become the models that they were saved of, and what is unclear is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import released_models
from megatron_sharedproj import formulas
from megatron_sharedproj.config import PRESETS
from megatron_sharedproj.conversion.released_checkpoints import interpret, read_released, record_training
from megatron_sharedproj.conversion.released_forward import BOUND, check_import, released_logits

KINDS = tuple(released_models.KINDS)
Content = dict[str, Any]

# Parameters that the paper states (paper.md, section 2), in files of these shapes.
PAPER_300M = {
    "qkv": 305_534_976,
    "q_eq_k": 284_542_976,
    "qk_eq_v": 284_542_976,
    "q_eq_k_eq_v": 263_550_976,
    "gqa": 274_046_976,
    "mqa": 266_174_976,
    "q_gqa": 268_798_976,
    "q_mqa": 264_862_976,
}


def megatron_logits(found: Any, tokens: Tensor) -> Tensor:
    from megatron_sharedproj.conversion.weights import to_megatron
    from megatron_sharedproj.model import build_model

    model = build_model(found.config, parallel_output=False).eval()
    model.load_state_dict(to_megatron(found.config, found.tensors), strict=False)
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def random_tokens(length: int = 48) -> Tensor:
    return torch.randint(96, (2, length), generator=torch.Generator().manual_seed(3))


def content(kind: str, **changes: Any) -> Content:
    return released_models.content(released_models.build(kind, **changes), kind, **changes)


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_saved_model(kind: str, tmp_path: Path) -> None:
    model = released_models.build(kind)
    found = read_released(released_models.save(tmp_path / "final_model.pt", model, kind))
    assert (found.config.attention_variant, found.config.num_query_groups) == released_models.EXPECTED[kind]
    assert sum(t.numel() for t in found.tensors.values()) == formulas.parameters(found.config)["total"]
    tokens = random_tokens()
    with torch.no_grad():
        wanted = model(tokens)
    assert wanted.abs().max() > 1  # not a model of nothing
    largest = wanted.abs().max()
    assert (megatron_logits(found, tokens) - wanted).abs().max() <= BOUND * largest
    plain = released_logits(
        found.state,
        tokens,
        torch.arange(48).expand_as(tokens),
        num_layers=2,
        num_heads=4,
        epsilon=1e-5,
        one_tensor=kind == "q_mqa",
    )
    assert (plain - wanted).abs().max() <= BOUND * largest


@pytest.mark.usefixtures("parallel_state")
@pytest.mark.parametrize(
    "changes",
    [{"use_bias": False}, {"tie_word_embeddings": False}, {"n_inner": 40, "layer_norm_epsilon": 1e-3}],
    ids=["no bias", "own head", "other sizes"],
)
def test_whatever_model_config_describes(changes: dict[str, Any]) -> None:
    model = released_models.build("mqa", **changes)
    found = interpret(released_models.content(model, "mqa", **changes))
    tokens = random_tokens()
    with torch.no_grad():
        wanted = model(tokens)
    assert (megatron_logits(found, tokens) - wanted).abs().max() <= BOUND * wanted.abs().max()


def test_a_training_checkpoint_and_what_it_says_of_its_training(tmp_path: Path) -> None:
    from megatron_sharedproj.conversion.megatron_checkpoint import imported_run

    model = released_models.build("qk_eq_v")
    path = tmp_path / "checkpoint_step_37.pt"
    torch.save(released_models.content(model, "qk_eq_v", final=False), path)
    found = read_released(path)
    assert found.step == 37 and found.provenance["tokens_seen"] == 1234
    assert found.provenance["train_config"]["output_dir"] == "./outputs"
    assert "2 causal masks" in found.notes[0] and not any("attn.bias" in name for name in found.state)
    run = imported_run(found.config, torch.float32)
    record_training(found, run)
    assert (run.train.lr, run.train.adam_beta2, run.train.lr_warmup_iters) == (2e-4, 0.95, 500)
    assert run.data.data_protocol == "padded" and run.train.seq_length == 48


def test_configuration_is_the_presets() -> None:
    values = {"n_layer": 20, "n_embd": 1024, "n_head": 16, "n_inner": 4096, "n_positions": 2048}
    assert full_size("qkv", **values) == PRESETS["300m"]


def full_size(kind: str, **values: Any) -> Any:
    """ModelConfig of a file of full size, whose tensors have shapes but no values."""
    values = {"vocab_size": 50304, **values}
    with torch.device("meta"):
        config = released_models.model_config(kind, **values)
        scale = config["n_head"] // released_models.HEADS
        modules, groups = released_models.KINDS[kind]
        wide = {name: rows * scale for name, rows in modules.items()}
        if groups == 1:  # one group stays one group
            wide |= {"c_kv": modules["c_kv"]}
        if groups == 2:
            config["n_kv_groups"] = groups = values.get("n_kv_groups", 4)
            wide |= {name: groups * (2 if name == "c_kv" else 1) for name in modules if name != "c_q"}
        before, released_models.KINDS[kind] = released_models.KINDS[kind], (wide, groups)
        try:
            state = released_models.GPT(kind, config).state_dict()
        finally:
            released_models.KINDS[kind] = before
    # Masks are compared by value.
    state = {f"module.{name}": t for name, t in state.items() if not name.endswith(".attn.bias")}
    found = interpret({"model_state_dict": state, "model_config": config})
    counted = sum(tensor.numel() for tensor in found.tensors.values())
    assert counted == formulas.parameters(found.config)["total"]
    return found.config


@pytest.mark.parametrize("kind", KINDS)
def test_full_300m_has_the_papers_parameters(kind: str) -> None:
    config = full_size(kind, n_layer=20, n_embd=1024, n_head=16, n_inner=4096, n_positions=2048)
    assert formulas.parameters(config)["total"] == PAPER_300M[kind]
    assert config.attention_variant == released_models.EXPECTED[kind][0]


@pytest.mark.parametrize("kind", KINDS)
def test_full_1b(kind: str) -> None:
    shape = {"n_layer": 22, "n_embd": 2048, "n_head": 32, "n_inner": 8192, "n_positions": 2048}
    config = full_size(kind, **shape, **({"n_kv_groups": 8} if kind in ("gqa", "q_gqa") else {}))
    groups = {"gqa": 8, "q_gqa": 8, "mqa": 1, "q_mqa": 1}.get(kind, 32)
    assert config.num_query_groups == groups
    if kind == "qkv":
        assert config == PRESETS["1b"]
        assert formulas.parameters(config)["total"] == 1_215_102_976


@pytest.mark.parametrize(
    ("kind", "flags", "found"),
    [
        # c_kv of one head is odd: only the tied tensor can be it.
        ("q_mqa", {}, ("qk_eq_v", 1)),
        # Two heads: key and value of MQA, or a tied tensor of two groups.
        ("mqa", {"variant": "qkv"}, ("qkv", 1)),
        ("mqa", {"variant": "qk_eq_v"}, ("qk_eq_v", 2)),
        ("mqa", {"num_query_groups": 2}, ("qk_eq_v", 2)),
        ("mqa", {"num_query_groups": 1}, ("qkv", 1)),
        ("gqa", {"variant": "qk_eq_v", "num_query_groups": 4}, ("qk_eq_v", 4)),
    ],
)
def test_arithmetic_or_a_flag_settles_what_c_kv_is(
    kind: str, flags: dict[str, Any], found: tuple[str, int]
) -> None:
    unsaid = content(kind)
    del unsaid["model_config"]["n_kv_groups"]
    config = interpret(unsaid, **flags).config
    assert (config.attention_variant, config.num_query_groups) == found


@pytest.mark.parametrize("kind", ["mqa", "gqa"])
def test_what_stays_open_names_the_flags(kind: str) -> None:
    unsaid = content(kind)
    del unsaid["model_config"]["n_kv_groups"]
    with pytest.raises(ValueError, match="can be .*--num-query-groups N or --attention-variant NAME"):
        interpret(unsaid)


def test_model_config_may_name_the_variant() -> None:
    named = content("mqa", attention_variant="K=V")
    del named["model_config"]["n_kv_groups"]
    assert interpret(named).config.num_query_groups == 2


@pytest.mark.parametrize(
    ("kind", "changes", "flags", "message"),
    [
        ("q_gqa", {"n_kv_groups": 4}, {}, "n_kv_groups 4: contradicts .* qk_eq_v with 2 group"),
        ("qkv", {"n_kv_groups": 1}, {}, "n_kv_groups 1: contradicts .* qkv with 4 group"),
        ("qk_eq_v", {}, {"variant": "qkv"}, "--attention-variant qkv: contradicts"),
        ("gqa", {}, {"num_query_groups": 3}, "--num-query-groups 3: contradicts"),
    ],
)
def test_a_contradiction_is_refused(
    kind: str, changes: dict[str, Any], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        interpret(content(kind, **changes), **flags)


def test_a_flag_overrules_a_leftover_in_model_config() -> None:
    assert interpret(content("qkv", n_kv_groups=1), num_query_groups=4).config.attention_variant == "qkv"


def change(name: str, value: Any) -> Any:
    """A change of one tensor (None: taken away)."""

    def apply(state: dict[str, Any]) -> None:
        if value is None:
            del state[f"module.{name}"]
        else:
            state[f"module.{name}"] = value(state) if callable(value) else value

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change("h.1.mlp.c_fc.weight", None), "1 tensor.* missing: h.1.mlp.c_fc.weight"),
        (change("h.0.attn.q_norm.weight", torch.ones(8)), r"shape|fit no variant|not understood"),
        (change("h.0.mlp.c_gate.weight", torch.ones(8, 8)), "not understood: h.0.mlp.c_gate.weight"),
        (
            change("h.1.attn.c_k.weight", torch.ones(8, 32)),
            r"h.1.attn.c_k.weight: shape \[8, 32\], .*\[32, 32\]",
        ),
        (change("wpe.weight", torch.ones(47, 32)), r"wpe.weight: shape \[47, 32\]"),
        (change("h.0.attn.c_v.weight", torch.ones(32, 32)), "c_v .* fit no variant"),
        (change("lm_head.weight", torch.ones(96, 32)), "lm_head.weight differs from wte.weight"),
        (change("h.0.attn.bias", torch.ones(1, 1, 48, 48)), "h.0.attn.bias: is not the causal mask"),
        (change("h.0.attn.bias", torch.ones(32)), "h.0.attn.bias: shape"),
        (change("wte.weight", "text"), "module.wte.weight: is no floating-point tensor"),
        (lambda state: state.update({"wte.weight": state["module.wte.weight"]}), "there twice"),
    ],
)
def test_wrong_tensors_are_named(apply: Any, message: str) -> None:
    wrong = content("qk_eq_v")
    apply(wrong["model_state_dict"])
    with pytest.raises(ValueError, match=message):
        interpret(wrong)


def test_a_head_that_equals_the_embedding_is_dropped() -> None:
    given = content("qk_eq_v")
    state = given["model_state_dict"]
    state["module.lm_head.weight"] = state["module.wte.weight"].clone()
    found = interpret(given)
    assert "lm_head.weight" not in found.tensors and not found.config.untie_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 8}, "not understood: rotary_dim"),
        ({"n_head": 5}, "n_embd 32 is not divisible by n_head 5"),
        ({"n_layer": "2"}, "n_layer is '2', expected a positive whole number"),
        ({"n_layer": 3}, "missing: h.2"),
        ({"n_layer": 10**12}, "n_layer 1000000000000: at most"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"use_bias": 1}, "use_bias is 1, expected true or false"),
        ({"attention_variant": "qkvv"}, "qkvv: unknown"),
    ],
)
def test_a_wrong_model_config_is_named(changes: dict[str, Any], message: str) -> None:
    given = content("qk_eq_v")
    given["model_config"].update(changes)
    with pytest.raises(ValueError, match=message):
        interpret(given)


class Payload:
    """Pickled, it is a call: unpickling creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_payload_is_refused_and_not_run(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, path = tmp_path / "ran", tmp_path / "final_model.pt"
    given = {**content("qk_eq_v"), "train_config": {"hook": Payload(target)}}
    torch.save(given, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError) as refused:
        read_released(path)
    message = str(refused.value)
    assert str(path) in message and "pickled posix.mkdir" in message and "\n" not in message
    assert not target.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert target.exists()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = released_models.save(tmp_path / "whole.pt", released_models.build("qkv"), "qkv")
    whole = path.read_bytes()
    cases = {
        "half.pt": whole[: len(whole) // 2],
        "tail.pt": whole[:-30],
        "empty.pt": b"",
        "text.pt": b"no checkpoint",
        "pickle.pt": pickle.dumps({"model_state_dict": {}}),
    }
    for name, content_ in cases.items():
        (tmp_path / name).write_bytes(content_)
    for name in [*cases, "absent.pt"]:
        with pytest.raises(ValueError, match=name) as refused:
            read_released(tmp_path / name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "given", [[1, 2], {"weight": torch.ones(2)}, {"model_state_dict": {}, "model_config": 3}]
)
def test_other_files_are_named(given: Any, tmp_path: Path) -> None:
    torch.save(given, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: holds no .*model_config"):
        read_released(tmp_path / "other.pt")


@pytest.mark.usefixtures("parallel_state")
def test_the_check_sees_a_wrong_import(tmp_path: Path) -> None:
    from megatron_sharedproj.conversion.megatron_checkpoint import imported_run, write_checkpoint

    found = interpret(content("mqa"))
    run = imported_run(found.config, torch.float32, tokenizer_type="NullTokenizer", vocab_size=96)
    good = write_checkpoint(tmp_path / "good", run, found.tensors)
    assert check_import(found, good).relative <= BOUND
    # Key and value exchanged, the mistake that shapes do not show.
    swapped = {
        name: found.tensors[name.replace("k_proj", "?").replace("v_proj", "k_proj").replace("?", "v_proj")]
        for name in found.tensors
    }
    assert check_import(found, write_checkpoint(tmp_path / "swapped", run, swapped)).relative > 1e-2
    moved = {
        **found.tensors,
        "model.embed_positions.weight": found.tensors["model.embed_positions.weight"].clone(),
    }
    moved["model.embed_positions.weight"][-1, 3] += 0.1
    assert check_import(found, write_checkpoint(tmp_path / "moved", run, moved)).relative > 1e-4
    moved["model.norm.bias"] = found.tensors["model.norm.bias"] * float("nan")
    assert check_import(found, write_checkpoint(tmp_path / "nan", run, moved)).relative == float("inf")
