"""Distillation: the losses against plain PyTorch, the same training under every layout, resume, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from distillation_worker import LAYOUTS, STEPS, distilling, flags
from megatron_sharedproj.arguments import build_parser
from megatron_sharedproj.checkpointing import files
from megatron_sharedproj.training import distillation

TESTS = Path(__file__).resolve().parents[1]
V = 101


def losses(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "lm_loss" in record]


def plain(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL of logits [s, b, V]: torch's own functions."""
    entropy = F.cross_entropy(student.flatten(0, 1), target.flatten(), reduction="none")
    divergence = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none"
    )
    return entropy.view_as(target), divergence.sum(-1)


# --- the losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("rows", [1 << 20, 40, 1], ids=["one block", "uneven blocks", "a row each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_double_precision(
    monkeypatch: pytest.MonkeyPatch, parallel_state: Any, dtype: torch.dtype, rows: int, temperature: float
) -> None:
    monkeypatch.setitem(distillation._BLOCK, "cpu", rows * V)
    torch.manual_seed(0)
    student, teacher = ((torch.randn(33, 3, V) * 6).to(dtype) for _ in range(2))
    target, weights = torch.randint(V, (33, 3)), torch.rand(2, 33, 3)
    leaf = student.clone().requires_grad_()
    found = distillation.distillation_losses(leaf * 1, teacher, target, temperature)
    (found[0] * weights[0] + found[1] * weights[1]).sum().backward()
    exact = student.double().requires_grad_()
    expected = plain(exact, teacher.double(), target, temperature)
    (expected[0] * weights[0] + expected[1] * weights[1]).sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == target.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 3e-6
    assert (leaf.grad.double() - exact.grad).abs().max() <= rounding * exact.grad.abs().max()


def test_a_student_that_is_its_teacher(parallel_state: Any) -> None:
    logits = torch.randn(5, 2, V) * 50
    leaf = logits.clone().requires_grad_()
    _, divergence = distillation.distillation_losses(
        leaf * 1, logits, torch.zeros(5, 2, dtype=torch.int64), 2.0
    )
    divergence.sum().backward()
    assert divergence.abs().max() < 1e-6
    assert leaf.grad is not None and leaf.grad.abs().max() < 1e-6


def test_logits_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"student \(2, 1, 8\) and teacher \(2, 1, 9\) must have one shape"):
        distillation.distillation_losses(
            torch.zeros(2, 1, 8), torch.zeros(2, 1, 9), torch.zeros(2, 1, dtype=torch.int64), 2.0
        )


# --- training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, parallel_state: Any) -> Path:
    """Data, a trained qkv model of two layers more, and a K=V model to start from."""
    folder = tmp_path_factory.mktemp("distillation")
    tiny.write_data(folder)
    teacher = {"attention_variant": "qkv", "hidden_size": 40, "lr": 1e-2, "min_lr": 1e-3}
    tiny.losses(flags(folder, **teacher, train_iters=20, save=folder / "teacher", ffn_hidden_size=64))
    tiny.losses(flags(folder, train_iters=2, lr_warmup_iters=1, seed=7, save=folder / "start"))
    return folder


def teacher_and_student(folder: Path) -> Iterator[Any]:
    """The bare models, built and loaded without the trainer."""
    from megatron_sharedproj.checkpointing import resolve_checkpoint
    from megatron_sharedproj.checkpointing.sharded import load_checkpoint
    from megatron_sharedproj.device import get_device
    from megatron_sharedproj.model import build_model

    for name in ("teacher", "start"):
        checkpoint = resolve_checkpoint(folder / name)
        model = build_model(files.checkpoint_config(checkpoint).model, parallel_output=False)
        load_checkpoint(checkpoint, get_device(), model=model)
        yield model.train(name == "start")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_steps_are_those_of_plain_pytorch(folder: Path, alpha: float) -> None:
    temperature = 3.0
    line = distilling(
        folder, distill_alpha=alpha, distill_temperature=temperature, clip_grad=0, eod_mask_loss=True,
        micro_batch_size=4,
    )  # fmt: skip
    trainer = tiny.trainer(line)
    teacher, student = teacher_and_student(folder)
    iterator = trainer._iterator(trainer.train_data, 0)
    batch = next(trainer._iterator(trainer.train_data, 0))
    inputs = batch["tokens"], batch["position_ids"], None
    with torch.no_grad():
        soft = teacher(*inputs)
    mask = batch["loss_mask"]
    assert mask.sum() < mask.numel()
    entropy, divergence = (
        (loss * mask).sum() / mask.sum()
        for loss in plain(student(*inputs), soft, batch["labels"], temperature)
    )
    ((1 - alpha) * entropy + alpha * temperature**2 * divergence).backward()
    seen: list[list[float]] = []
    step = trainer._schedule_step
    trainer._schedule_step = lambda *args, **kw: seen.append(step(*args, **kw)) or seen[-1]
    trainer.step(iterator)
    assert seen[0] == pytest.approx([entropy.item(), temperature**2 * divergence.item()], rel=1e-5)
    norm = sum(p.grad.double().square().sum() for p in student.parameters()) ** 0.5
    assert trainer.last_grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in student.named_parameters():
        found = dict(trainer.model.module.named_parameters())[name].main_grad
        torch.testing.assert_close(
            found, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_it_learns_and_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = distilling(
        folder, train_iters=30, lr=5e-3, save=tmp_path / "run", tensorboard_dir=tmp_path / "events"
    )
    trainer = tiny.trainer(line)
    before = [parameter.clone() for parameter in trainer.teacher.chunks[0].parameters()]
    assert trainer.train() == 0
    trainer.log.close()
    records = losses(tmp_path / "run")
    first, last = (
        sum(record["distillation_loss"] for record in part) for part in (records[:5], records[-5:])
    )
    assert last < 0.8 * first
    for parameter, then in zip(trainer.teacher.chunks[0].parameters(), before, strict=True):
        assert torch.equal(parameter, then) and not parameter.requires_grad
    out = capsys.readouterr().out
    assert "loss: 0.5 CE + 0.5 T^2 KL(teacher || student), T 2" in out
    assert f" distillation loss: {records[-1]['distillation_loss']:.6E} | loss scale" in out

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    shown = [event.value for event in events.Scalars("distillation loss")]
    assert shown == pytest.approx([record["distillation_loss"] for record in records])
    # The teacher is in no checkpoint: the student's loads without one.
    saved = tiny.flags(folder / "tiny_text_document", num_layers=4, load=tmp_path / "run", train_iters=31)
    assert tiny.trainer(saved).teacher is None


def test_validation_is_the_students_alone(folder: Path) -> None:
    with_teacher = tiny.trainer(distilling(folder)).evaluate()
    alone = tiny.trainer(flags(folder, load=folder / "start", finetune=True)).evaluate()
    assert with_teacher == alone


def test_bf16_is_near_fp32(folder: Path) -> None:
    found = {}
    for precision in (None, True):
        trainer = tiny.trainer(distilling(folder, bf16=precision))
        dtype = torch.bfloat16 if precision else torch.float32
        assert {parameter.dtype for parameter in trainer.teacher.chunks[0].parameters()} == {dtype}
        found[precision] = trainer._schedule_step(trainer._iterator(trainer.train_data, 0), 4, False)
    assert found[True] == pytest.approx(found[None], rel=2e-2)


@pytest.fixture(scope="module")
def layouts(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "training" / "distillation_worker.py"), str(folder)]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("one", "documents")])
def test_every_layout_distils_alike(layouts: dict[str, Any], layout: str) -> None:
    expected = layouts["documents" if "documents" in layout else "one"]
    assert len(expected) == STEPS + 1 and len(expected[0]) == 3
    for mine, theirs in zip(layouts[layout], expected, strict=True):
        assert mine == pytest.approx(theirs, rel=5e-6)


def test_document_boundaries_reach_the_teacher(layouts: dict[str, Any]) -> None:
    plain, separate = layouts["one"][0], layouts["documents"][0]
    assert abs(plain[1] - separate[1]) > 1e-4 * plain[1]


def test_resume_is_bit_exact(folder: Path, tmp_path: Path) -> None:
    def start(name: str, **changes: Any) -> Any:
        trainer = tiny.trainer(
            distilling(folder, save=tmp_path / name, hidden_dropout=0.1, log_interval=2, **changes)
        )
        assert trainer.train() == 0
        trainer.log.close()
        return trainer

    whole = start("whole")
    assert start("parts", exit_interval=3).iteration == 3
    resumed = start("parts")
    assert resumed.iteration == STEPS
    for mine, theirs in zip(resumed.bare_model.parameters(), whole.bare_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    keys = ("iteration", "lm_loss", "distillation_loss", "grad_norm")
    assert [[r[k] for k in keys] for r in losses(tmp_path / "parts")] == [
        [r[k] for k in keys] for r in losses(tmp_path / "whole")
    ]


def test_other_distillation_flags_are_noted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.trainer(distilling(folder, save=tmp_path / "run", exit_interval=2)).train() == 0
    capsys.readouterr()
    tiny.trainer(distilling(folder, save=tmp_path / "run", distill_alpha=0.9))
    assert "changed since the checkpoint: --distill-alpha was 0.5, now 0.9" in capsys.readouterr().out


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_temperature": 0}, "--distill-temperature 0.0: must be above 0"),
        ({"distill_temperature": "nan"}, "--distill-temperature nan: must be above 0"),
        ({"distill_alpha": 1.5}, r"--distill-alpha 1.5: must be in \[0, 1\]"),
        ({"distill_teacher": None, "distill_alpha": 0.7}, "--distill-alpha 0.7: needs --distill-teacher"),
        ({"distill_teacher": "nowhere"}, "--distill-teacher nowhere: no checkpoint there"),
        ({"vocab_size": 200}, "--distill-teacher .*: has 96 rows of vocabulary and this run 200; use its"),
        ({"vocab_size": 95}, "--distill-teacher .*: was trained with another tokenizer"),
        (
            {"seq_length": 64, "max_position_embeddings": 64},
            "--distill-teacher .*: has 32 positions, fewer than --seq-length 64; lower that",
        ),
    ],
)
def test_bad_flags_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    from megatron_sharedproj.pretrain import prepare

    with pytest.raises(ValueError, match=message):
        prepare(build_parser().parse_args(distilling(folder, **{"load": None, "finetune": None, **changes})))


def test_a_teacher_that_does_not_divide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sharedproj.pretrain import prepare

    monkeypatch.setenv("WORLD_SIZE", "8")
    line = distilling(
        folder, tensor_model_parallel_size=8, num_attention_heads=8, load=None, finetune=None,
        micro_batch_size=4,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="--distill-teacher .*: cannot be split as this run is: --tensor-model"
    ):
        prepare(build_parser().parse_args(line))


def test_a_damaged_teacher(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", copy)
    shard = next(copy.glob("iter_*/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"--distill-teacher {copy}: .* is damaged: {shard.name}"):
        tiny.trainer(distilling(folder, distill_teacher=copy))
