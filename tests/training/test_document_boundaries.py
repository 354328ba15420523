"""--reset-attention-mask, --reset-position-ids and --eod-mask-loss against Megatron's own dense mask.

The oracle for attention is plain softmax under the [s, s] mask that Megatron-Core's data set would make.

Shape legend: b batch, s sequence, h heads, g groups, e head size, n = b * s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from megatron_sharedproj.arguments import build_parser, run_config
from megatron_sharedproj.config import ModelConfig, RunConfig

pytestmark = pytest.mark.usefixtures("parallel_state")

EOD = tiny.VOCAB - 1
BOTH = {"reset_attention_mask": True, "reset_position_ids": True}
# Ends inside a row, at its end, at its start, side by side, nowhere.
ENDS = [[4, 5, 20], [31], [0, 16], []]
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("qkv", 4, {}),
    ("q_eq_k", 4, {}),
    ("qk_eq_v", 4, {}),
    ("q_eq_k_eq_v", 4, {}),
    ("qk_eq_v", 1, {}),
    ("qkv", 2, {"position_embedding_type": "rope"}),
]


def micro_batch(ends: list[list[int]]) -> Tensor:
    """Tokens [b, s] with EOD at ``ends`` and nowhere else."""
    tokens = torch.randint(EOD, (len(ends), tiny.SEQ), generator=torch.Generator().manual_seed(1))
    for row, columns in enumerate(ends):
        tokens[row, columns] = EOD
    return tokens


def megatrons(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask [b, 1, s, s] (True: hidden), loss mask [b, s] and positions [b, s], all three flags on."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rows = [_get_ltor_masks_and_position_ids(row, EOD, True, True, True, True) for row in tokens]
    masks, losses, positions = zip(*rows, strict=True)
    return torch.stack(masks), torch.stack(losses), torch.stack(positions)


def build(variant: str, groups: int, dtype: torch.dtype, changes: dict[str, Any]) -> Any:
    """A model that is far from uniform, so that what a token sees shows in its loss."""
    from megatron_sharedproj.model import build_model

    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=groups,
        padded_vocab_size=tiny.VOCAB, max_position_embeddings=tiny.SEQ, attention_variant=variant,
        attention_dropout=0.0, hidden_dropout=0.0, **changes,
    )  # fmt: skip
    model = build_model(config, dtype=dtype).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.copy_(1.0 + 0.2 * noise if "layernorm.weight" in name else 0.3 * noise)
    return model


def dense_attention(hidden: Tensor) -> Any:
    """The op's stand-in: every score computed, then masked by ``hidden`` [b, 1, s, s]."""

    def compute(query: Tensor, key: Tensor, value: Tensor, *, scale: float, **unused: Any) -> Tensor:
        shared = query.shape[2] // key.shape[2]
        k, v = (x.repeat_interleave(shared, dim=2) for x in (key, value))
        scores = torch.einsum("sbhe,tbhe->bhst", query, k) * scale
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        return torch.einsum("bhst,tbhe->sbhe", weights, v)

    return compute


def loss_and_gradients(
    model: Any, logits: Tensor, labels: Tensor, mask: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Mean over the scored tokens, in the logits' precision (Megatron's own computes in float32)."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = (losses * mask.flatten()).sum() / mask.sum()
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("rows", [ENDS, ENDS[:1]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize(("variant", "groups", "changes"), CASES)
def test_documents_as_lengths_equal_a_dense_mask(
    monkeypatch: Any, variant: str, groups: int, changes: dict[str, Any], dtype: torch.dtype,
    tolerance: float, rows: list[list[int]],
) -> None:  # fmt: skip
    from megatron_sharedproj.layers import core_attention

    if changes and dtype is torch.float64:
        tolerance = 1e-5  # Megatron computes the rotation in float32
    model, tokens = build(variant, groups, dtype, changes), micro_batch(rows)
    labels = tokens.roll(-1, dims=1)
    hidden, mask, positions = megatrons(tokens)
    documents = core_attention.document_lengths(tokens, EOD)
    one_row = (x.view(1, -1) for x in (tokens, positions))
    logits = model(*one_row, None, packed_seq_params=documents)
    assert logits.shape[:2] == (1, tokens.numel())
    found = loss_and_gradients(model, logits.view(*tokens.shape, -1), labels, mask.to(dtype))

    monkeypatch.setattr(core_attention, "attention", dense_attention(hidden))
    dense = model(tokens, positions, None)
    expected = loss_and_gradients(model, dense, labels, mask.to(dtype))
    torch.testing.assert_close(logits.view_as(dense), dense, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert max(gradient.abs().max().item() for gradient in expected[1]) > 0.1


def test_lengths_of_documents() -> None:
    from megatron_sharedproj.layers.core_attention import document_lengths

    tokens = micro_batch(ENDS)
    before = tokens.clone()
    found = document_lengths(tokens, EOD)
    # Row after row: a document ends after its EOD, and at the end of the row.
    expected = [5, 1, 15, 11, 32, 1, 16, 15, 32]
    assert found.cu_seqlens_q.diff().tolist() == expected
    assert found.cu_seqlens_q[0] == 0 and found.cu_seqlens_q.dtype == torch.int32
    assert (found.max_seqlen_q, found.max_seqlen_kv, found.qkv_format) == (tiny.SEQ, tiny.SEQ, "thd")
    assert torch.equal(tokens, before)


# --- in the trainer --------------------------------------------------------------------------------------


def trainer(folder: Path, variant: str = "qk_eq_v", groups: int = 0, **changes: Any) -> Any:
    return tiny.trainer(tiny.flags(tiny.write_data(folder), variant, groups, micro_batch_size=2, **changes))


def losses_of(run: Any, batch: dict[str, Tensor]) -> Tensor:
    """Losses [b, s] of the trainer's own forward step."""
    from megatron_sharedproj.training.loop import forward_step

    with torch.no_grad():
        return forward_step(iter([batch]), run.model, device=run.torch_device, boundary=run.boundary)[0]


def noisy(run: Any) -> Any:
    with torch.no_grad():
        for parameter in run.model.module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return run


def test_a_document_does_not_see_the_one_before_it(tmp_path: Path) -> None:
    run = noisy(trainer(tmp_path, **BOTH))
    free = trainer(tmp_path)
    free.model.module.load_state_dict(run.model.module.state_dict())
    for each in (run, free):
        each.model.eval()
    assert (run.boundary, free.boundary) == (EOD, None)
    tokens = micro_batch([[9, 20], []])
    tokens[1] = tokens[0].roll(3)
    batch = {
        "tokens": tokens, "labels": tokens.roll(-1, dims=1), "loss_mask": torch.ones(2, tiny.SEQ),
        "position_ids": torch.arange(tiny.SEQ).expand(2, -1).contiguous(),
    }  # fmt: skip
    changed = {**batch, "tokens": tokens.clone()}
    changed["tokens"][0, 4] = (tokens[0, 4] + 1) % EOD
    for each, reaches in ((run, False), (free, True)):
        before, after = losses_of(each, batch), losses_of(each, changed)
        assert before.shape == (2, tiny.SEQ)
        moved = (before != after)[0]
        assert not moved[:4].any() and moved[4:10].all()  # causal, and its own document sees it
        assert bool(moved[10:].any()) == reaches
        assert torch.equal(before[1], after[1])


def test_batches_are_megatrons(tmp_path: Path) -> None:
    """Positions restart after an EOD, nothing is scored where the input is one; a flag does its own only."""
    flags = ("reset_position_ids", "eod_mask_loss")
    for chosen in ((), flags[:1], flags[1:], flags):
        run = trainer(tmp_path, **dict.fromkeys(chosen, True), train_iters=20)
        ends = 0
        for index in range(40):
            sample = run.train_data[index]
            position, positions, scored = 0, [], []
            for token in sample["tokens"].tolist():
                positions.append(position)
                scored.append(0.0 if token == EOD and "eod_mask_loss" in chosen else 1.0)
                position = 0 if token == EOD and "reset_position_ids" in chosen else position + 1
                ends += token == EOD
            assert sample["position_ids"].tolist() == positions
            assert sample["loss_mask"].tolist() == scored
        assert ends > 10


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_a_step_is_the_dense_masks_step(monkeypatch: Any, tmp_path: Path, variant: str) -> None:
    """Loss, gradient norm and reduction of a whole step, micro batches and loss mask included."""
    from megatron_sharedproj.layers import core_attention
    from megatron_sharedproj.training.loop import _mean_loss

    run = trainer(tmp_path, variant, **BOTH, eod_mask_loss=True, clip_grad=1e9)
    copy = {
        name: tensor.clone() for name, tensor in run.model.module.state_dict().items() if tensor is not None
    }
    batches = [next(iterator) for iterator in [run._iterator(run.train_data, 0)] for _ in range(2)]
    run.step(iter(batches))

    plain = trainer(tmp_path, variant)
    plain.model.module.load_state_dict(copy, strict=False)
    total = torch.zeros(())
    for batch in batches:
        hidden, mask, positions = megatrons(batch["tokens"])
        assert torch.equal(mask, batch["loss_mask"]) and torch.equal(positions, batch["position_ids"])
        assert mask.min() == 0
        monkeypatch.setattr(core_attention, "attention", dense_attention(hidden))
        losses = plain.model.module(batch["tokens"], positions, None, labels=batch["labels"])
        total = total + _mean_loss(mask, losses)[0] / len(batches)
    gradients = torch.autograd.grad(total, list(plain.model.module.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert run.last_loss == pytest.approx(total.item(), rel=1e-5)
    assert run.last_grad_norm == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # 0.1: no kernel has it, SDPA runs document by document
def test_training_and_validation_say_and_do_it(tmp_path: Path, capsys: Any, dropout: float) -> None:
    options = {"eval_iters": 1, "train_iters": 8, "attention_dropout": dropout}
    free, reset = trainer(tmp_path, **options), trainer(tmp_path, **options, **BOTH)
    assert f"--reset-position-ids, --reset-attention-mask at token {EOD})" in capsys.readouterr().out
    first, second = free.evaluate(), reset.evaluate()  # the same weights
    assert first["lm_loss"] != second["lm_loss"]
    assert reset.train() == 0
    assert reset.evaluate()["lm_loss"] < second["lm_loss"] - 0.1


def test_tensor_and_sequence_parallel_ranks_do_the_same(tmp_path: Path) -> None:
    """The command line on two ranks against one process here."""
    flags = {**BOTH, "micro_batch_size": 2, "save": tmp_path / "two"}
    line = tiny.flags(tiny.write_data(tmp_path), **flags)
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_sharedproj.pretrain", *line]
    command += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(text) for text in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    expected = tiny.losses([*line, "--save", str(tmp_path / "one")])
    assert [record["lm_loss"] for record in records] == [pytest.approx(loss, rel=5e-6) for loss in expected]
    without = tiny.losses(tiny.flags(tmp_path / "tiny_text_document", micro_batch_size=2))
    assert without[-1] != pytest.approx(expected[-1], rel=1e-4)


# --- refusals --------------------------------------------------------------------------------------------


def config_of(**changes: Any) -> RunConfig:
    return run_config(build_parser().parse_args(tiny.flags("data", **changes)), tiny.VOCAB, 1)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_positions_that_cannot_restart(position: str) -> None:
    shape = {"variant": "qkv", "position_embedding_type": position, "reset_position_ids": True}
    words = f"^--reset-position-ids: does nothing with --position-embedding-type {position}, .*drop it"
    with pytest.raises(ValueError, match=words):
        config_of(**shape)
    assert config_of(**shape, reset_attention_mask=True).data.reset_position_ids


def test_the_mean_over_tokens_needs_equal_micro_batches() -> None:
    with pytest.raises(ValueError, match="^--calculate-per-token-loss: with --eod-mask-loss .* drop one"):
        config_of(eod_mask_loss=True, calculate_per_token_loss=True)
    assert config_of(eod_mask_loss=True).data.eod_mask_loss


@pytest.mark.parametrize("flag", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_data_without_document_ends_are_refused(tmp_path: Path, flag: str) -> None:
    from megatron_sharedproj.data.indexed import IndexedWriter

    name = tmp_path / "endless"
    with IndexedWriter(name, tiny.VOCAB) as writer:
        writer.add(np.arange(2000) % EOD, np.full(40, 50, dtype=np.int32))
        writer.close()
        writer.publish()
    words = (
        f"^--{flag.replace('_', '-')}: the documents of .*endless do not end with .* {EOD}; .*--append-eod"
    )
    with pytest.raises(ValueError, match=words):
        tiny.trainer(tiny.flags(name, **{flag: True}))
    assert tiny.trainer(tiny.flags(name)).boundary is None
