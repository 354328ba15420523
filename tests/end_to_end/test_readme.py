"""Every command of the README is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from scripts import load

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Lines of the README's bash blocks, continuations joined and comments dropped."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(shlex.join(words))
    return found


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python tools/")])
def test_tool_takes_its_flags(command: str) -> None:
    _, script, *flags = shlex.split(command)
    load(script).build_parser().parse_args(flags)


@pytest.mark.parametrize("command", [c for c in commands() if " bash " in f" {c}" or c.startswith("make")])
def test_script_or_target_exists(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert (ROOT / words[1]).is_file()


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["bash examples/quickstart.sh", "make test"]


def test_parameter_table_is_what_the_formulas_say() -> None:
    from megatron_sharedproj import formulas
    from megatron_sharedproj.config import PRESETS

    rows = re.findall(r"^\| [^|]+ \| `(\w+)`(?:, (\d+) groups?)? \| ([\d,]+) \| ([\d,]+) \|$", TEXT, re.M)
    assert len(rows) == 8
    for variant, groups, parameters, cache in rows:
        config = PRESETS["300m"].replace(attention_variant=variant, num_query_groups=int(groups or 16))
        assert f"{formulas.parameters(config)['total']:,}" == parameters
        assert f"{formulas.kv_cache_bytes_per_token(config):,}" == cache


def test_python_blocks_run() -> None:
    """The snippet runs on tensors of its shapes (s = b, so that the query fits both layouts)."""
    block, own_model = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    b, s, h, g, e = 2, 2, 4, 2, 16
    names: dict[str, object] = {
        "e": e,
        "query": torch.randn(s, b, h, e),
        "kv": torch.randn(7, b, g, e),
        "cache": torch.randn(b, 64, g, e),
        "pages": torch.randn(4, 64, g, e),
        "lengths": torch.tensor([64, 3], dtype=torch.int32),
        "table": torch.tensor([[1], [3]], dtype=torch.int32),
    }
    exec(block, names)
    out, lse = names["out"], names["lse"]
    assert isinstance(out, torch.Tensor) and out.shape == (b, s, h, e)
    assert isinstance(lse, torch.Tensor) and lse.shape == (b, h, s)

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    names = {"model": model}
    exec(own_model, names)
    attention = names["attention"]
    assert isinstance(attention, torch.nn.Module)
    assert attention(torch.randn(2, 5, 512)).shape == (2, 5, 512)
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)
    assert not any(".v_proj" in name for name, _ in model.named_parameters())
