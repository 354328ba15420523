"""The training loop: data order, accumulation, schedule, decay, clipping, stopping, and what it logs."""

from __future__ import annotations

import gc
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from megatron_sharedproj.checkpointing import files, resolve_checkpoint
from megatron_sharedproj.reporting.plots import load_run
from tiny import history, records

pytestmark = pytest.mark.usefixtures("parallel_state")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tiny.write_data(tmp_path)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.module.named_parameters()}


# --- data order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("consumed", [0, 6, 12])
def test_ranks_share_each_global_batch_in_order(micro: int, ranks: int, consumed: int) -> None:
    from megatron_sharedproj.data.datasets import PretrainingSampler

    total = 26
    per_rank = [list(PretrainingSampler(total, consumed, micro, rank, ranks)) for rank in range(ranks)]
    assert {len(batches) for batches in per_rank} == {(total - consumed) // (micro * ranks)}
    position = consumed
    for stripe in zip(*per_rank, strict=True):
        assert all(len(batch) == micro for batch in stripe)
        # Rank after rank, disjoint and without a gap.
        assert sum(stripe, []) == list(range(position, position + micro * ranks))
        position += micro * ranks
    assert total - position < micro * ranks  # only an incomplete stripe is left out


@pytest.mark.parametrize("rank", [0, 1])
def test_the_sampler_resumes_at_the_same_tail(rank: int) -> None:
    from megatron_sharedproj.data.datasets import PretrainingSampler

    whole = list(PretrainingSampler(40, 0, 2, rank, 2))
    for steps in (1, 4, 9):
        assert list(PretrainingSampler(40, steps * 4, 2, rank, 2)) == whole[steps:]


def test_a_run_reads_its_samples_in_order(prefix: Path) -> None:
    """What the model sees is the data set's sequences, shifted by one token, each once and in order."""
    trainer = tiny.trainer(tiny.flags(prefix, micro_batch_size=2))
    iterator = trainer._iterator(trainer.train_data, 4)
    for start in (4, 6, 8):
        batch = next(iterator)
        for row in range(2):
            sample = trainer.train_data[start + row]
            assert torch.equal(batch["tokens"][row], torch.as_tensor(sample["tokens"]))
            assert torch.equal(batch["labels"][row, :-1], batch["tokens"][row, 1:])
            assert batch["position_ids"][row].tolist() == list(range(tiny.SEQ))
            assert (batch["loss_mask"][row] == 1).all()


# --- accumulation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["qkv", "qk_eq_v"])
def test_accumulation_is_one_large_batch(prefix: Path, variant: str) -> None:
    runs = {
        micro: tiny.trainer(tiny.flags(prefix, variant, micro_batch_size=micro, train_iters=3))
        for micro in (1, 2, 4)
    }
    found = {micro: history(trainer) for micro, trainer in runs.items()}
    before = weights(tiny.trainer(tiny.flags(prefix, variant, train_iters=3)))
    for micro in (1, 2):
        assert found[micro] == [pytest.approx(step, rel=1e-5) for step in found[4]]
        for name, tensor in weights(runs[4]).items():
            got = weights(runs[micro])[name]
            torch.testing.assert_close(got, tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert not torch.equal(got, before[name]), f"{name}: did not train"
    # The tolerance is far below what a step moves.
    moved = max((tensor - before[name]).abs().max() for name, tensor in weights(runs[4]).items())
    assert moved > 1e-2


@pytest.mark.parametrize("variant", ["qkv", "q_eq_k", "qk_eq_v", "q_eq_k_eq_v"])
def test_steps_are_those_of_plain_pytorch(prefix: Path, variant: str) -> None:
    """Forward, backward, clipping and AdamW written out without Megatron's engine, four steps."""
    from megatron_sharedproj.model import build_model

    limit, decay = 0.9, 0.1
    trainer = tiny.trainer(tiny.flags(prefix, variant, clip_grad=limit, weight_decay=decay))
    copy = build_model(trainer.config.model).train()
    copy.load_state_dict(trainer.model.module.state_dict())
    named = dict(copy.named_parameters())
    plain = {name for name in named if name.endswith(".bias") or "layernorm" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if name not in plain], "weight_decay": decay},
            {"params": [p for name, p in named.items() if name in plain], "weight_decay": 0.0},
        ]
    )
    iterator = trainer._iterator(trainer.train_data, 0)
    for step in range(4):
        rate = trainer.optimizer.param_groups[0]["lr"]  # the schedule has a test of its own
        samples = [trainer.train_data[4 * step + row] for row in range(4)]
        tokens, labels, positions = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples])
            for key in ("tokens", "labels", "position_ids")
        )
        optimizer.zero_grad()
        loss = copy(tokens, positions, None, labels=labels).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(copy.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

        trainer.step(iterator)
        assert trainer.last_loss == pytest.approx(loss.item(), rel=1e-5)
        assert trainer.last_grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for name, tensor in weights(trainer).items():
        torch.testing.assert_close(
            tensor, named[name].detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 7])
def test_learning_rate_is_warm_up_then_cosine(prefix: Path, tmp_path: Path, decay: int | None) -> None:
    """Step i (from 1) uses the rate after i - 1 steps; past the decay steps it stays at the minimum."""
    steps, warm_up, lr, least = 10, 3, 1e-2, 1e-3
    line = tiny.flags(
        prefix, train_iters=steps, lr_warmup_iters=warm_up, lr=lr, min_lr=least, save=tmp_path / "run",
        lr_decay_iters=decay,
    )  # fmt: skip
    trainer = tiny.trainer(line)
    trainer.train()
    trainer.log.close()
    end = decay or steps

    def expected(done: int) -> float:
        if done <= warm_up:
            return lr * done / warm_up
        share = min((done - warm_up) / (end - warm_up), 1.0)
        return least + (lr - least) * 0.5 * (1 + math.cos(math.pi * share))

    found = [record["learning_rate"] for record in records(tmp_path / "run")]
    assert found == [pytest.approx(expected(done), rel=1e-9, abs=1e-15) for done in range(steps)]
    assert max(found) == pytest.approx(lr)


def test_a_step_uses_the_rate_that_it_logs(prefix: Path) -> None:
    """The first step of a warm-up from zero moves nothing, the second does."""
    trainer = tiny.trainer(tiny.flags(prefix, lr_warmup_iters=2))
    iterator = trainer._iterator(trainer.train_data, 0)
    before = weights(trainer)
    trainer.step(iterator)
    after_one = weights(trainer)
    assert all(torch.equal(before[name], after_one[name]) for name in before)
    trainer.step(iterator)
    assert not any(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


# --- weight decay ----------------------------------------------------------------------------------------


def decayed(trainer: Any) -> dict[str, bool]:
    """Parameter name -> whether its group is decayed."""
    found = {}
    names = {id(parameter): name for name, parameter in trainer.model.module.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = group["weight_decay"] * group["wd_mult"] > 0
    assert len(found) == len(names)
    return found


def test_biases_and_norms_are_not_decayed(prefix: Path) -> None:
    found = decayed(tiny.trainer(tiny.flags(prefix)))
    assert found == {name: not (name.endswith(".bias") or "layernorm" in name) for name in found}
    assert set(found.values()) == {True, False}


def test_weight_decay_on_all(prefix: Path) -> None:
    found = decayed(tiny.trainer(tiny.flags(prefix, weight_decay_on_all=True)))
    assert all(found.values())
    assert any("layernorm" in name for name in found) and any(name.endswith(".bias") for name in found)


@pytest.mark.parametrize("on_all", [False, True])
def test_decay_shrinks_what_it_should(prefix: Path, on_all: bool) -> None:
    """AdamW is decoupled: decay takes lr * decay of a weight, whatever the gradient does."""
    rate, decay = 1e-2, 0.5
    options: dict[str, Any] = {
        "lr": rate, "min_lr": rate, "lr_warmup_iters": 0, "lr_decay_style": "constant",
        "train_iters": 1, "weight_decay_on_all": on_all,
    }  # fmt: skip
    plain = tiny.trainer(tiny.flags(prefix, weight_decay=0.0, **options))
    shrunk = tiny.trainer(tiny.flags(prefix, weight_decay=decay, **options))
    before = weights(plain)
    plain.train()
    shrunk.train()
    without, with_decay = weights(plain), weights(shrunk)
    for name, tensor in before.items():
        exempt = not on_all and (name.endswith(".bias") or "layernorm" in name)
        taken = torch.zeros_like(tensor) if exempt else rate * decay * tensor
        torch.testing.assert_close(
            with_decay[name], without[name] - taken, rtol=0.0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (rate * decay * before["decoder.final_layernorm.weight"]).abs().min() > 1e-3


# --- clipping --------------------------------------------------------------------------------------------


def test_clipping_scales_the_gradient_and_logs_its_true_norm(prefix: Path) -> None:
    limit = 0.1
    free = tiny.trainer(tiny.flags(prefix, clip_grad=0.0))
    clipped = tiny.trainer(tiny.flags(prefix, clip_grad=limit))
    for trainer in (free, clipped):
        trainer.step(trainer._iterator(trainer.train_data, 0))
    gradients = {
        name: [p.grad.detach().clone() for p in trainer.model.module.parameters()]
        for name, trainer in (("free", free), ("clipped", clipped))
    }
    copies = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients["free"]]
    for copy, gradient in zip(copies, gradients["free"], strict=True):
        copy.grad = gradient.clone()
    true_norm = torch.nn.utils.clip_grad_norm_(copies, limit).item()
    assert true_norm > 5 * limit
    assert clipped.last_grad_norm == pytest.approx(true_norm, rel=1e-5)
    for copy, gradient in zip(copies, gradients["clipped"], strict=True):
        torch.testing.assert_close(gradient, copy.grad, rtol=1e-4, atol=1e-8)
    left = torch.stack([gradient.norm() for gradient in gradients["clipped"]]).norm().item()
    assert left == pytest.approx(limit, rel=1e-4)


def test_a_small_gradient_is_left_alone(prefix: Path) -> None:
    runs = [tiny.trainer(tiny.flags(prefix, clip_grad=limit, train_iters=3)) for limit in (0.0, 1e6)]
    for trainer in runs:
        trainer.train()
    first, second = (weights(trainer) for trainer in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- a loss that is not finite ---------------------------------------------------------------------------


def test_a_nan_loss_stops_before_it_spoils_the_weights(prefix: Path, tmp_path: Path) -> None:
    line = tiny.flags(prefix, save=tmp_path / "run", save_interval=2, lr_warmup_iters=0, max_nan_iterations=1)
    trainer = tiny.trainer(line)

    def poison(t: Any) -> None:
        if t.iteration == 3:
            with torch.no_grad():
                t.model.module.decoder.final_layernorm.bias[0] = math.nan
            kept.update(weights(t))

    kept: dict[str, torch.Tensor] = {}
    trainer.hooks.append(poison)
    with pytest.raises(RuntimeError, match=r"loss is nan at iteration 4, .* iteration 2; .*--lr"):
        trainer.train()
    assert (trainer.iteration, trainer.consumed_samples) == (3, 12)
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, kept[name]) or name == "decoder.final_layernorm.bias", name
    assert files.latest_iteration(tmp_path / "run") == 2
    assert [record["iteration"] for record in records(tmp_path / "run")] == [1, 2, 3]


def test_a_nan_gradient_stops_before_the_update(prefix: Path, tmp_path: Path) -> None:
    """The loss is finite, so only the gradient shows it; updated and saved, no restart would get past it."""
    line = tiny.flags(prefix, save=tmp_path / "run", save_interval=1, lr_warmup_iters=0, max_nan_iterations=1)
    trainer = tiny.trainer(line)
    bias = trainer.model.module.decoder.final_layernorm.bias
    bias.register_hook(lambda grad: grad * (math.nan if trainer.iteration == 3 else 1.0))
    with pytest.raises(
        RuntimeError, match="loss is finite but its gradient is not at iteration 4, .* iteration 3"
    ):
        trainer.train()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(trainer).values())
    assert files.latest_iteration(tmp_path / "run") == 3


@pytest.mark.parametrize("everything", [False, True])
def test_decoupled_learning_rate_is_the_embeddings(prefix: Path, everything: bool) -> None:
    options = {"decoupled_lr": 0.5, "decoupled_min_lr": 0.1, "weight_decay_on_all": everything}
    trainer = tiny.trainer(tiny.flags(prefix, **options))
    names = {parameter: name for name, parameter in trainer.model.module.named_parameters()}
    decoupled = [group for group in trainer.optimizer.param_groups if group["max_lr"] == 0.5]
    found = {names[parameter] for group in decoupled for parameter in group["params"]}
    assert found == {"embedding.word_embeddings.weight"}
    decays = {group["wd_mult"] for group in trainer.optimizer.param_groups}
    assert decays == ({1.0} if everything else {0.0, 1.0})
    assert trainer.train() == 0
    rates = {group["max_lr"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates[0.5] == pytest.approx(0.1) and rates[1e-2] == pytest.approx(1e-3)


def test_manual_gc_collects_only_at_its_interval(prefix: Path) -> None:
    trainer = tiny.trainer(tiny.flags(prefix, manual_gc=True, manual_gc_interval=3))
    before = gc.get_stats()[2]["collections"]
    seen: list[int] = []
    trainer.hooks.append(lambda t: seen.append(gc.get_stats()[2]["collections"] - before))
    try:
        assert trainer.train() == 0
        assert not gc.isenabled()
    finally:
        gc.enable()
    # One at the start, one after step 3 (seen from step 4 on), one after step 6.
    assert seen == [1, 1, 1, 2, 2, 2]


# --- validation ------------------------------------------------------------------------------------------


def test_validation_does_not_disturb_training(prefix: Path) -> None:
    """With dropout, a run that validates after every step takes the same steps as one that never does."""
    options: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 4}
    never = tiny.trainer(tiny.flags(prefix, **options))
    expected = history(never)  # before the next trainer seeds the streams again
    always = tiny.trainer(tiny.flags(prefix, eval_iters=1, eval_interval=1, **options))
    always.hooks.append(lambda t: t.evaluate())  # and at a point that the loop does not choose
    assert history(always) == expected
    first, second = weights(never), weights(always)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_validation_scores_the_same_sequences(prefix: Path, tmp_path: Path) -> None:
    line = tiny.flags(
        prefix, hidden_dropout=0.5, attention_dropout=0.5, eval_iters=2, eval_interval=2, train_iters=6,
        save=tmp_path / "run",
    )  # fmt: skip
    trainer = tiny.trainer(line)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first is not None and first == second  # dropout would differ
    assert trainer.model.training
    assert first == pytest.approx(validation_by_hand(trainer, 8), rel=1e-5)

    trainer.train()
    trainer.log.close()
    found = load_run(tmp_path / "run").validation_curve()
    assert found[0] == [0, 2, 4, 6]
    assert found[1][0] == first["lm_loss"]
    assert found[1][-1] == pytest.approx(validation_by_hand(trainer, 8)["lm_loss"], rel=1e-5)
    assert found[1][-1] < found[1][0] - 0.01


@torch.no_grad()
def validation_by_hand(trainer: Any, sequences: int) -> dict[str, float]:
    """The first sequences of the validation split, one at a time, each token counted alike."""
    model, total = trainer.model.module.eval(), 0.0
    for index in range(sequences):
        sample = {name: torch.as_tensor(value)[None] for name, value in trainer.valid_data[index].items()}
        total += model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"]).mean().item()
    model.train()
    return {"lm_loss": total / sequences, "perplexity": math.exp(total / sequences)}


class DrawingData(torch.utils.data.Dataset):
    """Data whose reading draws random numbers, as augmentation or a loader's worker seed does."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        torch.rand(1)
        return self.data[index]


def test_validation_puts_the_random_stream_back(prefix: Path) -> None:
    trainer = tiny.trainer(tiny.flags(prefix, eval_iters=1))
    trainer.valid_data = DrawingData(trainer.valid_data)
    before = torch.get_rng_state()
    trainer.valid_data[0]
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_validation_without_iterations(prefix: Path) -> None:
    trainer = tiny.trainer(tiny.flags(prefix, eval_iters=0))
    assert trainer.evaluate() is None


# --- hooks, signals, intervals ---------------------------------------------------------------------------


def test_hooks_are_called_after_each_step(prefix: Path) -> None:
    trainer = tiny.trainer(tiny.flags(prefix, train_iters=5))
    seen: list[tuple[str, int, int, bool]] = []
    for name in ("first", "second"):
        trainer.hooks.append(
            lambda t, n=name: seen.append((n, t.iteration, t.consumed_samples, math.isfinite(t.last_loss)))
        )
    trainer.train()
    assert seen == [(name, i, 4 * i, True) for i in range(1, 6) for name in ("first", "second")]


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGUSR1, 2), (signal.SIGTERM, 6)]
)
def test_a_signal_stops_after_the_step_and_saves(
    prefix: Path, tmp_path: Path, number: signal.Signals, step: int
) -> None:
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in watched]
    trainer = tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", eval_iters=1))

    def stop(t: Any) -> None:
        if t.iteration == step:
            os.kill(os.getpid(), number)

    trainer.hooks.append(stop)
    assert trainer.train() == 128 + number
    trainer.log.close()
    assert trainer.iteration == step
    assert files.latest_iteration(tmp_path / "run") == step
    assert files.train_state(resolve_checkpoint(tmp_path / "run"))["consumed_samples"] == 4 * step
    assert [signal.getsignal(n) for n in watched] == before
    # A stopped run does not spend its grace period on a validation.
    assert not load_run(tmp_path / "run").validation


def test_handlers_are_restored_after_an_error(prefix: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = tiny.trainer(tiny.flags(prefix))

    def fail(t: Any) -> None:
        assert signal.getsignal(signal.SIGTERM) != before
        raise KeyError("a hook's own error")

    trainer.hooks.append(fail)
    with pytest.raises(KeyError, match="a hook's own error"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_interrupts_at_once(prefix: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = tiny.trainer(tiny.flags(prefix))

    def twice(t: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.hooks.append(twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.iteration == 1
    assert signal.getsignal(signal.SIGINT) == before


def test_exit_interval_stops_at_its_multiples_and_saves(prefix: Path, tmp_path: Path) -> None:
    line = tiny.flags(prefix, save=tmp_path / "run", exit_interval=2, train_iters=5)
    for expected in (2, 4, 5):
        trainer = tiny.trainer(line)
        assert trainer.train() == 0
        trainer.log.close()
        assert trainer.iteration == expected
        assert files.latest_iteration(tmp_path / "run") == expected


def test_save_interval(prefix: Path, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.flags(prefix, save=tmp_path / "run", save_interval=2, train_iters=5))
    trainer.train()
    found = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert found == ["iter_0000002", "iter_0000004", "iter_0000005"]
