"""Checkpoints of every kind of model, saved under tensor-parallel size 1 and 2, with a real tokenizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import checkpoints_worker
import models
from megatron_sharedproj.config import RunConfig

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_sharedproj.data.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([models.SAMPLE.read_text()], models.VOCABULARY, folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, parallel_state: Any, tokenizer_folder: Path
) -> dict[int, Path]:
    """Tensor-parallel size -> folder of the run folders of models.CONVERTED; the same weights in both."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in models.CONVERTED:
        config = models.config(name, padded_vocab_size=models.ROWS, max_position_embeddings=models.LONG)
        run = RunConfig(model=config)
        run.train.seq_length = 128
        run.data.tokenizer_model = str(tokenizer_folder)
        checkpoints_worker.save(root / "tp1" / name, run, models.build(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [checkpoints_worker.__file__, str(root / "tp1"), str(root / "tp2"), "2"]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {1: root / "tp1", 2: root / "tp2"}
