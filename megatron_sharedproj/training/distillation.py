"""Learning from a teacher: its logits beside the labels, over logits that are split by vocabulary.

Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2; the
paper's surgery (arXiv 2606.04032) takes CE + KL with T = 2, alpha = 0.5.

Shape legend: s sequence, b micro batch, n rows (s * b), v vocabulary on this rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sharedproj.checkpointing.selection import Choice, agree
from megatron_sharedproj.checkpointing.sharded import load_checkpoint
from megatron_sharedproj.config import ModelConfig, RunConfig
from megatron_sharedproj.device import Device
from megatron_sharedproj.model import ModelChunks, build_chunks

# Elements of a block in fp32: 4 MiB, which stays in a CPU's cache; on a GPU enough for a kernel's launch.
_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}


class _Losses(torch.autograd.Function):
    """Cross-entropy and KL [s, b] in fp32 of one pair of logits [s, b, v]; the gradient is the student's.

    Only blocks of rows are ever in fp32. As Megatron's cross-entropy does, backward writes the gradient
    over the student's logits, so that it can run once.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor, temperature: float, group: Any
    ) -> tuple[Tensor, Tensor]:
        v = student.shape[-1]
        ours, theirs = student.view(-1, v), teacher.view(-1, v)
        index = target.flatten() - (group.rank() * v if group is not None else 0)
        absent = (index < 0) | (index >= v)
        index = index.masked_fill(absent, 0)[:, None]
        largest = torch.stack([rows.amax(-1).float() for rows in (ours, theirs)])
        if group is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        # Sums of exp(z), of exp(z / T), of the teacher's, of its differences weighted; the label's logit.
        sums = largest.new_empty(5, largest.shape[1])
        sums[4] = ours.gather(1, index)[:, 0].float().masked_fill(absent, 0.0)
        for part in _blocks(ours):
            z = ours[part].float() - largest[0, part, None]
            sums[0, part] = z.exp().sum(-1)
            z /= temperature
            sums[1, part] = z.exp().sum(-1)
            t = (theirs[part].float() - largest[1, part, None]) / temperature
            weight = t.exp()
            sums[2, part] = weight.sum(-1)
            sums[3, part] = (weight * t.sub_(z)).sum(-1)
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        entropy = largest[0] + sums[0].log() - sums[4]
        # sum p (log p - log q) = sum p (t - z) - log(sum exp t) + log(sum exp z)
        divergence = sums[3] / sums[2] + sums[1].log() - sums[2].log()
        ctx.save_for_backward(student, teacher, largest, sums, index, absent)
        ctx.temperature = temperature
        return entropy.view_as(target), divergence.view_as(target)

    @staticmethod
    def backward(ctx: Any, of_entropy: Tensor, of_divergence: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        student, teacher, largest, sums, index, absent = ctx.saved_tensors
        temperature, v = ctx.temperature, student.shape[-1]
        ours, theirs = student.view(-1, v), teacher.view(-1, v)
        plain = of_entropy.flatten().float()
        soft = of_divergence.flatten().float() / temperature
        at_target = plain.masked_fill(absent, 0.0).neg()[:, None]
        for part in _blocks(ours):
            z = ours[part].float() - largest[0, part, None]
            gradient = z.exp() * (plain / sums[0])[part, None]
            gradient += (z / temperature).exp_() * (soft / sums[1])[part, None]
            t = (theirs[part].float() - largest[1, part, None]) / temperature
            gradient -= t.exp_() * (soft / sums[2])[part, None]
            ours[part] = gradient.scatter_add_(1, index[part], at_target[part]).to(ours.dtype)
        return student, None, None, None, None


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK.get(rows.device.type, _BLOCK["cuda"]) // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        yield slice(start, min(start + size, rows.shape[0]))


def distillation_losses(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the labels, and KL(teacher || student) with both logits divided by T.

    Args:
        student, teacher: logits [s, b, v], contiguous, of this rank's part of the vocabulary; the backward
            pass overwrites the student's.
        target: [s, b] int64, ids of the whole vocabulary.
        temperature: T, above 0.
        group: the tensor-parallel ranks; None: this one has the whole vocabulary.
    Returns:
        Both [s, b] in fp32, nats; the KL is without the factor T^2.
    Raises:
        ValueError: for logits of two shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape"
        )
    split = group is not None and group.size() > 1
    return _Losses.apply(student, teacher, target, temperature, group if split else None)


class Teacher:
    """A trained model that only runs forward, split as the student is, and what the student learns from it.

    It is in evaluation mode (no dropout), has no gradients, and is in no optimizer and no checkpoint.

    Args:
        chunks: this rank's part of it; student: the unwrapped chunks that learn.
    """

    def __init__(self, chunks: list[Any], student: list[Any], *, temperature: float, alpha: float):
        self.chunks, self.temperature, self.alpha = chunks, temperature, alpha
        self._waiting: list[Tensor] = []  # logits [s, b, v] of micro batches that the student comes to next
        for chunk in chunks:
            if chunk.post_process:
                chunk.compute_language_model_loss = lambda labels, logits: logits
        for chunk in student:
            if chunk.post_process:
                # The method of a GPTModel that has both the logits and the labels.
                chunk.compute_language_model_loss = partial(
                    self._losses, chunk.compute_language_model_loss, chunk.pg_collection.tp
                )

    @property
    def ahead(self) -> bool:
        """A global batch is run through the teacher first: the stages of a pipeline depend on each other."""
        return parallel_state.get_pipeline_model_parallel_world_size() > 1

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Run one micro batch: the arguments of a GPTModel, which the student gets next."""
        self._waiting.append(self.chunks[0](*args, **kwargs))

    @torch.no_grad()
    def run_ahead(self, forward_step: Any, iterator: Any, **schedule: Any) -> None:
        """Run a global batch through the pipeline, and keep its logits on the last stage.

        Those are micro batches x s x b x v elements, in the dtype of the run.

        Args:
            forward_step: Megatron's, of the teacher; schedule: further arguments of Megatron's schedule.
        """
        self._waiting = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=self.chunks,
            forward_only=True,
            collect_non_loss_data=True,
            **schedule,
        )

    def reduce(self, losses: tuple[Tensor, Tensor]) -> Tensor:
        """The loss that is minimised, of the means of both."""
        return (1 - self.alpha) * losses[0] + self.alpha * self.temperature**2 * losses[1]

    def _losses(self, plain: Any, group: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """In place of GPTModel's loss: [b, s] without a teacher (validation), else [2, b, s]."""
        if not self._waiting:
            return plain(labels, logits)
        target = labels.transpose(0, 1).contiguous()
        both = distillation_losses(logits.contiguous(), self._waiting.pop(0), target, self.temperature, group)
        return torch.stack([loss.transpose(0, 1) for loss in both])


def build_teacher(
    config: RunConfig, choice: Choice, model: ModelConfig, device: Device, student: Iterable[Any]
) -> Teacher:
    """Build and load the teacher of a run. Collective.

    Args:
        choice: its checkpoint, verified here; model: its shape.
        student: the unwrapped chunks of this rank.
    Raises:
        ValueError: if the checkpoint is damaged.
    """
    distill = config.distill
    whole = agree(choice, verify=not config.checkpoint.no_verify_integrity)
    # Nothing is computed twice where no backward runs.
    parallel = dataclasses.replace(
        config.parallel, recompute_granularity="", recompute_method="", recompute_num_layers=0
    )
    # Every weight is loaded: none has to be drawn.
    chunks = build_chunks(
        model,
        parallel,
        dtype=getattr(torch, config.train.params_dtype),
        deterministic_mode=config.train.deterministic_mode,
        perform_initialization=False,
    )
    module = chunks[0] if len(chunks) == 1 else ModelChunks(chunks)
    load_checkpoint(whole.folder, device, model=module, verify=False)
    module.to(device.current()).eval().requires_grad_(False)
    return Teacher(
        chunks, list(student), temperature=distill.distill_temperature, alpha=distill.distill_alpha
    )
