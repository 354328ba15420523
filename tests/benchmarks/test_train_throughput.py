"""benchmarks/train_throughput.py: both engines train the same model, rows add up, a mistake is one line."""

from __future__ import annotations

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig
from scripts import load

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("benchmarks/train_throughput.py")


def copy_weights(source: Any, target: Any, config: ModelConfig) -> None:
    """A GPTModel's weights into the benchmark's PlainGPT."""
    names = config.variant.projections
    with torch.no_grad():
        target.tokens.weight.copy_(source.embedding.word_embeddings.weight)
        target.positions.weight.copy_(source.embedding.position_embeddings.weight)
        pairs = [(target.norm, source.decoder.final_layernorm)]
        for block, layer in zip(target.blocks, source.decoder.layers, strict=True):
            pairs += [
                (block.norm_1, layer.input_layernorm),
                (block.norm_2, layer.pre_mlp_layernorm),
                (block.out, layer.self_attention.linear_proj),
                (block.up, layer.mlp.linear_fc1),
                (block.down, layer.mlp.linear_fc2),
            ]
            # Ours stores the tensors of a head together, the plain one the heads of a tensor.
            for kind in ("weight", "bias"):
                own = getattr(layer.self_attention.linear_qkv, kind)
                heads = own.view(config.num_attention_heads, len(names), config.kv_channels, -1)
                wanted = getattr(block.projection, kind)
                wanted.copy_(heads.transpose(0, 1).reshape(wanted.shape))
        for to, of in pairs:
            to.weight.copy_(of.weight)
            to.bias.copy_(of.bias)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("variant", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"])
def test_both_engines_have_one_model(
    benchmark: Any, parallel_state: Any, variant: str, activation: str
) -> None:
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        2, 32, 4, 96, 16, attention_variant=variant, activation=activation, init_method_std=0.2,
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = benchmark.PlainGPT(config)
    assert sum(p.numel() for p in plain.parameters()) == formulas.parameters(config)["total"]
    model = build_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    copy_weights(model, plain, config)
    tokens, labels = torch.randint(96, (2, 2, 16))
    loss = model(tokens, torch.arange(16).expand(2, 16), None, labels=labels).mean()
    own = plain(tokens, labels)
    torch.testing.assert_close(own, loss, rtol=1e-5, atol=1e-5)
    for each in (own, loss):
        each.backward()
    torch.testing.assert_close(
        plain.tokens.weight.grad, model.embedding.word_embeddings.weight.grad, rtol=1e-3, atol=1e-5
    )


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "train_throughput.py"), *words],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=200,
    )


@pytest.mark.slow
def test_rows_plot_and_resumption(tmp_path: Path) -> None:
    case = ["--vocab-sizes", "128", "--seq-length", "16", "--micro-batch-size", "2", "--threads", "1"]
    how = ["--budget-seconds", "0.1", "--window-seconds", "0.1", "--output", "t.csv", "--plot", "t.png"]
    done = run(tmp_path, "--sizes", "10m", *case, *how)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "t.csv").read_text()
    done = run(tmp_path, "--sizes", "10m,30m", *case, *how)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 cases are in t.csv" in done.stdout
    assert (tmp_path / "t.csv").read_text().startswith(first)
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["size"] for row in rows] == ["10m"] * 8 + ["30m"] * 8
    names = [("ours", "plain"), ("qkv", "qk_eq_v"), ("fp32", "bf16")]
    for own in (rows[:8], rows[8:]):
        of = {(row["engine"], row["variant"], row["dtype"]): row for row in own}
        assert set(of) == set(itertools.product(*names))
        for (engine, variant, dtype), row in of.items():
            speed = float(row["tokens_per_second"])
            ratio = speed / float(of["plain", variant, dtype]["tokens_per_second"])
            assert float(row["ratio_vs_plain"]) == pytest.approx(ratio, rel=1e-4)
            ratio = speed / float(of[engine, variant, "fp32"]["tokens_per_second"])
            assert float(row["ratio_vs_fp32"]) == pytest.approx(ratio, rel=1e-4)
            base = of[engine, "qkv", dtype]
            assert float(row["ratio_vs_qkv"]) == pytest.approx(
                speed / float(base["tokens_per_second"]), rel=1e-4
            )
            flops = float(base["flops_per_token"]) / float(row["flops_per_token"])
            assert float(row["flop_ratio_vs_qkv"]) == pytest.approx(flops, rel=1e-4)
            assert (flops > 1) == (variant == "qk_eq_v")
            mfu = speed * float(row["flops_per_token"]) / float(row["peak_tflops"]) / 1e12
            assert float(row["mfu"]) == pytest.approx(mfu, rel=1e-4)
            assert float(row["mfu_full_scores"]) > mfu
            assert row["peak_is"] == "measured matrix product"
            assert 0 < float(row["last_loss"]) < 6.0  # it starts at ln 128 = 4.85
            # Weights, gradients and two moments.
            assert float(row["peak_memory_mb"]) > 12 * int(row["parameters"]) / 1e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "7b"], "error: --sizes: '7b' is unknown; choose from 10m, 30m, 300m, 1b"),
        (["--output", "no/t.csv"], "error: --output no/t.csv: no is not a folder"),
        (["--hidden-dropout", "2"], "error: --hidden-dropout 2.0: must be in [0, 1)"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
