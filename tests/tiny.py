"""A tiny data set and the flags of a tiny model, for tests that train for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 96
SEQ = 32


def write_data(folder: Path, *, documents: int = 40, seed: int = 0) -> Path:
    """An indexed data set of random words with some structure; returns its prefix."""
    from megatron_sharedproj.data.indexed import IndexedWriter

    random = np.random.default_rng(seed)
    prefix = folder / "tiny_text_document"
    with IndexedWriter(prefix, VOCAB) as writer:
        for _ in range(documents):
            length = int(random.integers(20, 80))
            steps = random.integers(1, 4, size=length)
            tokens = np.append((random.integers(VOCAB) + np.cumsum(steps)) % (VOCAB - 1), VOCAB - 1)
            writer.add(tokens, np.array([len(tokens)], dtype=np.int32))
        writer.close()
        writer.publish()
    return prefix


def flags(prefix: Path | str, variant: str = "qk_eq_v", groups: int = 0, **changes: Any) -> list[str]:
    """Command line of a 2-layer model; ``changes`` override or add flags (None drops one)."""
    values: dict[str, Any] = {
        "attention_variant": variant,
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQ,
        "max_position_embeddings": SEQ,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": 6,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "lr_warmup_iters": 2,
        "weight_decay": 0.1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "eval_iters": 0,
        "log_interval": 1,
        "num_workers": 0,
        "data_path": str(prefix),
        "split": "90,10,0",
        "tokenizer_type": "NullTokenizer",
        "vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 8,
        "no_bias_gelu_fusion": True,
    }
    if groups:
        values.update(group_query_attention=True, num_query_groups=groups)
    values.update(changes)
    line: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is not True:
            line.append(str(value))
    return line


def trainer(line: list[str]) -> Any:
    """The Trainer of a command line, in an initialised process group."""
    from megatron_sharedproj import distributed
    from megatron_sharedproj.arguments import build_parser
    from megatron_sharedproj.pretrain import build_trainer, prepare

    prepared = prepare(build_parser().parse_args(line))
    distributed.seed_all(prepared[0].train.seed)
    return build_trainer(*prepared)


def losses(line: list[str]) -> list[float]:
    """Train a command line to its end: the loss of each step."""
    run = trainer(line)
    found: list[float] = []
    run.hooks.append(lambda t: found.append(t.last_loss))
    assert run.train() == 0
    run.log.close()
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def history(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a training, run to its end."""
    found: list[tuple[float, float]] = []
    trainer.hooks.append(lambda t: found.append((t.last_loss, t.last_grad_norm)))
    assert trainer.train() == 0
    return found
