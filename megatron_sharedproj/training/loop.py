"""One training loop for CPU and GPU, over Megatron-Core's schedule, optimizer and data.

Shape legend: b micro batch, s sequence length.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sharedproj.checkpointing.saver import CheckpointSaver, Saved
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.data.datasets import build_iterator
from megatron_sharedproj.data.padded import real_token_share
from megatron_sharedproj.device import Device
from megatron_sharedproj.layers.core_attention import document_lengths
from megatron_sharedproj.model import ModelChunks
from megatron_sharedproj.ops.zigzag import own_chunks
from megatron_sharedproj.training import bad_steps, metrics
from megatron_sharedproj.training.distillation import Teacher
from megatron_sharedproj.training.log import TrainingLog
from megatron_sharedproj.training.signals import StopSignals

Hook = Callable[["Trainer"], None]

# Global batches of a validation between two looks at the signals.
_EVALUATED_AT_ONCE = 10


@dataclass(frozen=True)
class MicroBatch:
    """What a GPTModel is called with, and what its losses are reduced with.

    Attributes:
        inputs, options: of the model; on a middle pipeline stage that needs none, three times None.
        mask: [b, s] of this rank, 1 where a token is scored; scored: ones of the whole sequence.
    """

    inputs: tuple[Any, ...] = (None, None, None)
    options: dict[str, Any] = field(default_factory=dict)
    mask: Any = None
    scored: torch.Tensor | None = None


def micro_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, device: torch.device, boundary: int | None
) -> MicroBatch:
    """The next micro batch as this rank's model takes it; arguments as for :func:`forward_step`."""
    if data_iterator is None:
        return MicroBatch()
    batch = next(data_iterator)
    tokens, labels, positions, mask = (
        batch[name].to(device, non_blocking=True)
        for name in ("tokens", "labels", "position_ids", "loss_mask")
    )
    scored = mask.sum()
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks > 1:
        own = partial(own_chunks, dim=1, ranks=ranks, rank=parallel_state.get_context_parallel_rank())
        tokens, labels, positions, mask = own(tokens), own(labels), own(positions), own(mask)
    if boundary is None:
        return MicroBatch((tokens, positions, None), {"labels": labels}, mask, scored)
    documents = document_lengths(batch["tokens"], boundary)
    tokens, positions, labels = (x.view(1, -1) for x in (tokens, positions, labels))
    options = {"labels": labels, "packed_seq_params": documents}
    return MicroBatch((tokens, positions, None), options, mask, scored)


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: Any,
    *,
    device: torch.device,
    boundary: int | None = None,
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Megatron's forward step: per-token loss [b, s] and the function that reduces it.

    On a pipeline stage before the last it is the hidden states [s, b, d], which the schedule sends on.

    Args:
        boundary: token after which attention starts anew (``--reset-attention-mask``); None: nowhere.
        teacher: that the model learns from: losses are [2, b, s] then, cross-entropy and KL.
    """
    batch = micro_batch(data_iterator, device, boundary)
    if teacher is not None and not teacher.ahead:
        teacher.forward(*batch.inputs, **batch.options)
    losses = model(*batch.inputs, **batch.options)
    if boundary is not None and data_iterator is not None:
        one = batch.options["labels"].shape
        if losses.shape in (one, (2, *one)):  # not the hidden states of an earlier pipeline stage
            losses = losses.view(*losses.shape[:-2], *batch.mask.shape)
    return losses, partial(_mean_loss, batch.mask, scored=batch.scored, teacher=teacher)


def teacher_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: Any,
    *,
    device: torch.device,
    boundary: int | None = None,
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Megatron's forward step of a teacher that runs ahead: logits [s, b, v], and what keeps them."""
    batch = micro_batch(data_iterator, device, boundary)
    return model(*batch.inputs, **batch.options), lambda logits, non_loss_data: logits


def _mean_loss(
    mask: Any,
    losses: torch.Tensor,
    scored: torch.Tensor | None = None,
    teacher: Teacher | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    # Of the whole sequence: context-parallel ranks have a part each, whose sum the schedule and we take.
    scored = mask.sum() if scored is None else scored
    means = (losses.float() * mask).sum((-2, -1)) / scored.clamp(min=1)
    if teacher is None:
        # A copy: Megatron's schedule divides the loss by the number of micro batches in place.
        return means, {"lm loss": means.detach().clone()}
    entropy, divergence = means.detach().clone()
    figures = {"lm loss": entropy, "distillation loss": divergence * teacher.temperature**2}
    return teacher.reduce((means[0], means[1])), figures


def _repeatable(iterator: Any, count: int) -> Callable[[], Any]:
    """The next so many micro batches of an iterator, or of one for each chunk, to be read several times."""
    each = iterator if isinstance(iterator, list) else [iterator]
    batches = [None if one is None else [next(one) for _ in range(count)] for one in each]

    def again() -> Any:
        iterators = [None if kept is None else iter(kept) for kept in batches]
        return iterators if isinstance(iterator, list) else iterators[0]

    return again


@dataclass
class Trainer:
    """Everything a run holds, and the steps it takes.

    Attributes:
        chunks: Megatron's DistributedDataParallel around each GPTModel of this rank: one, or with the
            interleaved pipeline schedule several.
        iteration: steps done; consumed_samples: sequences trained on (the data position).
        boundary: token that attention does not reach across; None: it does.
        teacher: that the model learns from in training (``--distill-teacher``), not in validation.
        origin: where the first weights came from, if they were not drawn here.
        data_fingerprint: identity of the training data (data/fingerprint.py), on the first rank.
        hooks: called after every step.
    """

    config: RunConfig
    device: Device
    torch_device: torch.device
    chunks: list[Any]
    optimizer: Any
    schedule: Any
    train_data: Any
    valid_data: Any
    test_data: Any
    log: TrainingLog
    boundary: int | None = None
    teacher: Teacher | None = None
    origin: str = ""
    iteration: int = 0
    consumed_samples: int = 0
    data_fingerprint: dict[str, Any] = field(default_factory=dict)
    hooks: list[Hook] = field(default_factory=list)
    last_loss: float = math.nan
    last_grad_norm: float | None = None
    last_saved: int = -1
    bad_steps_in_a_row: int = 0
    signals: StopSignals = field(default_factory=StopSignals)
    saver: CheckpointSaver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = CheckpointSaver(self.config, self.device)

    @property
    def model(self) -> Any:
        """The first chunk; without the interleaved schedule the only one."""
        return self.chunks[0]

    @property
    def bare_model(self) -> Any:
        """What checkpoints hold of this rank's part of the model: the GPTModel, or its chunks."""
        if len(self.chunks) == 1:
            return self.model.module
        return ModelChunks(chunk.module for chunk in self.chunks)

    def _schedule_step(self, iterator: Any, micro_batches: int, forward_only: bool) -> list[float]:
        """Means over a global batch: the loss, and where a teacher teaches, the distillation loss."""
        train = self.config.train
        # With document boundaries a micro batch is one row (forward_step).
        rows, length = train.micro_batch_size, train.seq_length
        if self.boundary is not None:
            rows, length = 1, rows * length
        sizes = {"num_microbatches": micro_batches, "seq_length": length, "micro_batch_size": rows}
        batch = {"device": self.torch_device, "boundary": self.boundary}
        teacher = None if forward_only else self.teacher
        if teacher is not None and teacher.ahead:
            repeated = _repeatable(iterator, micro_batches)
            teacher.run_ahead(partial(teacher_step, **batch), repeated(), **sizes)
            iterator = repeated()
        results = get_forward_backward_func()(
            forward_step_func=partial(forward_step, **batch, teacher=teacher),
            data_iterator=iterator,
            model=self.chunks,
            forward_only=forward_only,
            **sizes,
        )
        if results:
            losses = torch.stack([torch.stack(list(result.values())) for result in results]).mean(0)
        else:  # only the last pipeline stage has a loss
            losses = torch.zeros(1 if teacher is None else 2, device=self.torch_device)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(losses, group=group)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                losses,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return [loss / parallel_state.get_data_parallel_world_size() for loss in losses.tolist()]

    def step(self, iterator: Any) -> None:
        """One optimizer step over a global batch.

        A loss or gradient that is NaN or infinite leaves the weights as they were.

        Raises:
            BadStepsError: after --max-nan-iterations such steps in a row.
        """
        train = self.config.train
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch = train.batch_size_at(self.consumed_samples)
        micro_batches = batch // (train.micro_batch_size * parallel_state.get_data_parallel_world_size())
        learning_rate = next(
            (g["lr"] for g in self.optimizer.param_groups if g.get("default_config", True)), 0.0
        )
        loss, *distillation = self._schedule_step(iterator, micro_batches, forward_only=False)
        bad = not all(map(math.isfinite, (loss, *distillation))) or not self._gradients_are_finite()
        if bad:
            self._note_bad_step(bad_steps.describe(self, loss, learning_rate))
        else:
            self.bad_steps_in_a_row = 0
        figures, logged = {}, self.log.due(self.iteration + 1)
        if logged and not bad:
            scale = float(self.optimizer.get_loss_scale().item())
            figures = metrics.gradient_figures(self.config.log, self.chunks, scale)
        updated, grad_norm = False, None
        if not bad:
            updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.schedule.step(increment=batch)
        self.iteration += 1
        self.consumed_samples += batch
        self.last_loss, self.last_grad_norm = loss, grad_norm
        if logged:
            if self.config.log.log_params_norm:
                figures["params_norm"] = metrics.parameter_norm(self.chunks)
            figures |= metrics.memory_figures(self.config.log, self.device, self.torch_device)
        self.log.step(
            self.iteration,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            batch_size=batch,
            consumed_samples=self.consumed_samples,
            skipped=not updated,
            bad=bad,
            loss_scale=float(self.optimizer.get_loss_scale().item()),
            distillation=distillation[0] if distillation else None,
            figures=figures,
        )
        for hook in self.hooks:
            hook(self)

    def _note_bad_step(self, what: str) -> None:
        self.bad_steps_in_a_row += 1
        count, limit = self.bad_steps_in_a_row, self.config.train.max_nan_iterations
        at = f"{what} at iteration {self.iteration + 1}"
        if count < limit:
            self.log.message(f"{at}: step skipped ({count} in a row, the run stops at {limit})")
            return
        self.finish_save()
        saved = (
            f"the last checkpoint is iteration {self.last_saved}" if self.last_saved >= 0 else "none is saved"
        )
        times = f", {count} steps in a row" if count > 1 else ""
        raise bad_steps.BadStepsError(f"{at}{times}, {saved}; lower --lr or --clip-grad")

    def _gradients_are_finite(self) -> bool:
        """Whether no rank has a NaN or infinite gradient; fp16 leaves that to its loss scale."""
        if self.config.train.fp16:
            return True
        # One number per buffer: a sum is finite unless one of its terms is not (or they are past any use).
        sums = [
            buffer.grad_data.sum(dtype=torch.float32) for chunk in self.chunks for buffer in chunk.buffers
        ]
        bad = (~torch.isfinite(torch.stack(sums))).any().float()
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        return not bad.item()

    def evaluate(self, name: str = "validation") -> dict[str, float] | None:
        """Loss and perplexity over the first ``--eval-iters`` global batches of a data set.

        Every validation scores the same sequences, so that its curve is comparable along a run. The
        protocol is the run's: with padded data the perplexity is named ``padded_perplexity``.

        Args:
            name: ``validation`` or ``test``.
        Returns:
            None without data, or when a signal came; else ``lm_loss`` (nats per scored token), and
            ``perplexity``, or ``padded_perplexity`` with the split's ``real_token_share``.
        """
        train = self.config.train
        dataset = self.test_data if name == "test" else self.valid_data
        if dataset is None or not train.eval_iters:
            return None
        # The generator's state is put back: a validation must not shift the dropout of later steps.
        rng = self.device.rng_state()
        self._set_training(False)
        micro_batches = train.global_batch_size // (
            train.micro_batch_size * parallel_state.get_data_parallel_world_size()
        )
        iterator = self._iterator(dataset, 0)
        total, stopped = 0.0, False
        with torch.no_grad():
            for start in range(0, train.eval_iters, _EVALUATED_AT_ONCE):
                count = min(_EVALUATED_AT_ONCE, train.eval_iters - start)
                total += count * self._schedule_step(iterator, count * micro_batches, forward_only=True)[0]
                stopped = self.signals.any_rank(self.torch_device)
                if stopped:
                    break
        self._set_training(True)
        self.device.set_rng_state(rng)
        if stopped:
            self.log.message(f"{name} at iteration {self.iteration} is left out: stopped by a signal")
            return None
        loss = total / train.eval_iters
        perplexity = math.exp(min(loss, 50.0))
        if self.config.data.data_protocol == "padded":
            results = {
                "lm_loss": loss,
                "padded_perplexity": perplexity,
                "real_token_share": real_token_share(dataset),
            }
        else:
            results = {"lm_loss": loss, "perplexity": perplexity}
        self.log.evaluation(name, self.iteration, results)
        return results

    def _set_training(self, training: bool) -> None:
        for chunk in self.chunks:
            chunk.train(training)

    def _iterator(self, dataset: Any, consumed: int) -> Any:
        """The data of this rank, as Megatron's schedules take it: an iterator, or one for each chunk.

        Every stage reads by itself what it needs: tokens where the embedding is, labels where the loss is.
        """
        iterators = [
            build_iterator(
                dataset,
                self.config.train,
                consumed=consumed,
                rank=parallel_state.get_data_parallel_rank(),
                ranks=parallel_state.get_data_parallel_world_size(),
                num_workers=self.config.data.num_workers,
            )
            # Where documents start, every layer has to know.
            if chunk.module.pre_process or chunk.module.post_process or self.boundary is not None
            else None
            for chunk in self.chunks
        ]
        return iterators if len(iterators) > 1 else iterators[0]

    def save(self, *, last: bool = False) -> None:
        """Save this iteration, unless that is done already; with --async-save training goes on meanwhile.

        Args:
            last: no training follows: complete on return.
        """
        checkpoint = self.config.checkpoint
        if not checkpoint.save or self.iteration in (self.last_saved, self.saver.pending):
            return
        self.finish_save()
        if self.config.parallel.overlap_param_gather:
            # The gather would run in the next forward pass; until then a rank has updated its shard only.
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        padded = self.config.data.data_protocol == "padded"
        behind = checkpoint.async_save and not last
        self.saver.begin(
            model=self.bare_model,
            optimizer=None if checkpoint.no_save_optim else self.optimizer,
            train_state={
                "iteration": self.iteration,
                "consumed_samples": self.consumed_samples,
                "real_token_share": real_token_share(self.train_data) if padded else 1.0,
                "started_from": self.origin,
                "schedule": self.schedule.state_dict(),
                "log": self.log.state(),
                "bad_steps_in_a_row": self.bad_steps_in_a_row,
                "data_fingerprint": self.data_fingerprint,
            },
            copy=behind,
        )
        if not behind:
            self.finish_save()

    def finish_save(self) -> None:
        """Complete the save under way, if there is one; waits for it."""
        self._saved(self.saver.complete())

    def _saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self.last_saved = saved.iteration
            behind = saved.iteration != self.iteration
            waited = f", {saved.lost:.2f} s of it in the way of training" if behind else ""
            self.log.message(f"saved checkpoint {saved.folder} in {saved.seconds:.2f} s{waited}")
            if saved.deleted:
                self.log.message(f"deleted {', '.join(folder.name for folder in saved.deleted)}")

    def train(self) -> int:
        """Train to ``--train-iters``.

        Returns:
            Exit code: 0 when done or stopped by --exit-interval or --exit-duration-in-mins, 128 + number
            when a signal stopped it. A checkpoint is saved in each case.
        """
        train = self.config.train
        if self.iteration >= train.train_iters:
            self.log.message(f"nothing left to train: --train-iters {train.train_iters} are done")
        iterator = self._iterator(self.train_data, self.consumed_samples)
        started = time.monotonic()
        stopped: int | None = None
        self._set_training(True)
        if train.manual_gc:
            gc.disable()
            gc.collect()
        self.log.restart_clock()
        with self.signals, self.device.keep_freed_memory():
            while self.iteration < train.train_iters:
                self.step(iterator)
                if train.manual_gc_interval and self.iteration % train.manual_gc_interval == 0:
                    gc.collect()
                paused = self.log.pause()
                if self.iteration % train.eval_interval == 0 and self.iteration < train.train_iters:
                    self.evaluate()
                if self.iteration % self.config.checkpoint.save_interval == 0:
                    self.save()
                elif self.saver.pending is not None:
                    self._saved(self.saver.poll())
                self.log.resume(paused)
                if self.signals.any_rank(self.torch_device):
                    stopped = 128 + (self.signals.received or signal.SIGTERM)
                    self.log.message(f"stopped by a signal at iteration {self.iteration}")
                    break
                if train.exit_duration_in_mins:
                    minutes = torch.tensor([(time.monotonic() - started) / 60], device=self.torch_device)
                    torch.distributed.broadcast(minutes, 0)
                    if minutes.item() > train.exit_duration_in_mins:
                        self.log.message(f"stopped by --exit-duration-in-mins at iteration {self.iteration}")
                        break
                if train.exit_interval and self.iteration % train.exit_interval == 0:
                    self.log.message(f"stopped by --exit-interval at iteration {self.iteration}")
                    break
            self.save(last=True)
            self.finish_save()
            if stopped is None and self.iteration >= train.train_iters:
                self.evaluate()
                self.evaluate("test")
                if self.signals.any_rank(self.torch_device):
                    stopped = 128 + (self.signals.received or signal.SIGTERM)
        return stopped or 0
