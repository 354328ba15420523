"""The three files by themselves: loaded with trust_remote_code where the package does not exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sharedproj.layers.hf import SOURCE_FILES
from tiny_hf import build, tokens

SCRIPT = """
import sys, json, importlib.abc

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_sharedproj", "megatron"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
try:
    import megatron_sharedproj
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder = sys.argv[1]
ids = torch.tensor(json.loads(sys.argv[2]))
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).projections == ("q", "kv")
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
out = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
cache = out.past_key_values
assert type(cache).__name__ == "SharedProjCache", cache
static = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static")
assert torch.equal(static, out.sequences)
assert not any(name.startswith("megatron") for name in sys.modules)
torch.save({"logits": logits, "tokens": out.sequences, "bytes": cache.nbytes()}, sys.argv[3])
"""


@pytest.mark.parametrize(("by", "name"), [("save_pretrained", "qk_eq_v-2"), ("copies", "rotate_keys")])
def test_export_runs_without_the_package(by: str, name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens()
    export = tmp_path / "export"
    model.save_pretrained(export)
    if by == "copies":
        for file in export.glob("*.py"):
            file.unlink()
        for source in SOURCE_FILES:
            shutil.copy(source, export)
    assert sorted(x.name for x in export.glob("*.py")) == sorted(x.name for x in SOURCE_FILES)
    result = tmp_path / "result.pt"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", SCRIPT, str(export), json.dumps(ids.tolist()), str(result)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(result, weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(ids).logits, rtol=1e-5, atol=1e-5)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found["tokens"], expected.sequences)
    assert found["bytes"] == expected.past_key_values.nbytes()
