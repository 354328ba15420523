"""What a run says: Megatron's log line, JSON lines, TensorBoard, Weights & Biases, a progress line.

Only one rank logs (the last, as in Megatron-LM; its loss is the average over all).
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from megatron_sharedproj import formulas
from megatron_sharedproj.config import RunConfig, to_dict
from megatron_sharedproj.duration import format_duration

JSON_LOG = "log.jsonl"
GROUP_NORM = "grad_norm_"  # prefix of a record's gradient norms by group


class TrainingLog:
    """Collects steps and writes a record every ``--log-interval`` steps."""

    def __init__(self, config: RunConfig, *, world_size: int, device_name: str, enabled: bool):
        self.config, self.world_size, self.enabled = config, world_size, enabled
        self._peak = formulas.peak_flops(device_name)
        self._flops_per_token = formulas.train_flops_per_token(config.model, config.train.seq_length)
        self._losses: list[float] = []
        self._distilled: list[float] = []
        self._skipped = 0
        self._bad = 0  # with a NaN or infinite loss or gradient
        self._timed = 0  # steps since the clock was started; a resumed interval has more losses
        self._samples = 0  # of the timed steps
        self._interval_start = time.perf_counter()
        self._started = time.perf_counter()
        self._first_iteration: int | None = None
        self._json: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._told_ranks = False
        self._progress = enabled and sys.stderr.isatty()

    def open(self, iteration: int = 0) -> None:
        """Create the files; before it, messages are printed and nothing is written.

        Args:
            iteration: that the run goes on from: later TensorBoard events of a killed run are dropped.
        """
        if not self.enabled:
            return
        log, save = self.config.log, self.config.checkpoint.save
        if save:
            Path(save).mkdir(parents=True, exist_ok=True)
            path = Path(save) / JSON_LOG
            if path.exists():
                # A killed run may have left half a record at the end.
                written = path.read_bytes()
                os.truncate(path, written.rfind(b"\n") + 1)
            self._json = path.open("a", buffering=1)
        if log.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(log.tensorboard_dir, purge_step=iteration + 1)
        if log.wandb_project:
            import wandb

            wandb.init(
                project=log.wandb_project,
                name=log.wandb_exp_name or None,
                dir=log.wandb_save_dir or None,
                config={**to_dict(self.config), "world_size": self.world_size},
            )
            self._wandb = wandb

    def state(self) -> dict[str, Any]:
        """The interval under way, JSON-ready, for a checkpoint."""
        return {
            "losses": self._losses,
            "distilled": self._distilled,
            "skipped": self._skipped,
            "bad": self._bad,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the interval that a checkpoint was saved in."""
        self._losses, self._skipped = list(state["losses"]), int(state["skipped"])
        self._bad, self._distilled = int(state.get("bad", 0)), list(state.get("distilled", []))

    def message(self, text: str) -> None:
        """One line for people, on the logging rank."""
        if self.enabled:
            self._clear_progress()
            print(f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] {text}", flush=True)

    def due(self, iteration: int) -> bool:
        """Whether the record of a step is written: on every rank alike."""
        return iteration % self.config.log.log_interval == 0 or iteration == self.config.train.train_iters

    def restart_clock(self) -> None:
        """Leave the time since the last step (evaluation, saving) out of the step time."""
        self._interval_start = time.perf_counter()
        if self._first_iteration is None:
            # What came before the first step (data, checkpoint) says nothing about the time that is left.
            self._started = self._interval_start

    def pause(self) -> float:
        """Seconds of the running interval so far; give them back to :meth:`resume`."""
        return time.perf_counter() - self._interval_start

    def resume(self, elapsed: float) -> None:
        self._interval_start = time.perf_counter() - elapsed

    def step(
        self,
        iteration: int,
        *,
        loss: float,
        grad_norm: float | None,
        learning_rate: float,
        batch_size: int,
        consumed_samples: int,
        skipped: bool,
        bad: bool = False,
        loss_scale: float,
        distillation: float | None = None,
        figures: dict[str, Any] | None = None,
    ) -> None:
        """Note a step; write the record when its interval is full.

        Args:
            bad: the loss or a gradient is NaN or infinite; the loss is left out of the interval's mean.
            distillation: T^2 KL(teacher || student) per token, of a run with a teacher.
            figures: of metrics.py, for the record of a step that is :meth:`due`.
        """
        if self._first_iteration is None:
            self._first_iteration = iteration - 1
        # Every rank counts, since a checkpoint of any of them carries the interval that is under way.
        if not bad:
            self._losses.append(loss)
            if distillation is not None:
                self._distilled.append(distillation)
        self._skipped += skipped
        self._bad += bad
        self._timed += 1
        self._samples += batch_size
        if self._progress:
            self._show_progress(iteration, loss)
        if not self.due(iteration):
            return
        losses, skipped_steps, bad_steps = self._losses, self._skipped, self._bad
        distilled, self._distilled = self._distilled, []
        timed, samples = self._timed, self._samples
        self._losses, self._skipped, self._bad, self._timed, self._samples = [], 0, 0, 0, 0
        if not self.enabled:
            return
        train = self.config.train
        seconds = (time.perf_counter() - self._interval_start) / timed
        tokens = samples * train.seq_length / timed
        record: dict[str, Any] = {
            "iteration": iteration,
            "train_iters": train.train_iters,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * train.seq_length,
            "elapsed_ms_per_iteration": seconds * 1000,
            "tokens_per_second": tokens / seconds,
            "tflops_per_rank": tokens * self._flops_per_token / seconds / self.world_size / 1e12,
            "learning_rate": learning_rate,
            "global_batch_size": batch_size,
            "lm_loss": sum(losses) / len(losses) if losses else None,
            **({"distillation_loss": sum(distilled) / len(distilled)} if distilled else {}),
            "loss_scale": loss_scale,
            "grad_norm": grad_norm,
            "skipped_iterations": skipped_steps,
            "nan_iterations": bad_steps,
            "variant": self.config.model.attention_variant,
            **(figures or {}),
        }
        per_rank = record.get("peak_memory_bytes_per_rank", [])
        if self._told_ranks:
            record.pop("peak_memory_bytes_per_rank", None)  # from here on the most of them is enough
        elif per_rank:
            self._told_ranks = True
            text = ", ".join(f"{peak / 2**20:.1f}" for peak in per_rank)
            self.message(f"memory (MiB) after {iteration} iterations, rank 0 to {len(per_rank) - 1}: {text}")
        if self._peak is not None:
            record["mfu"] = record["tflops_per_rank"] * 1e12 / self._peak
        self._print(record)
        self._write(record)
        self.restart_clock()

    def _print(self, r: dict[str, Any]) -> None:
        # Megatron's fields in Megatron's order, then ours.
        throughput = ""
        if self.config.log.log_throughput:
            throughput = f" throughput per GPU (TFLOP/s/GPU): {r['tflops_per_rank']:.3f} |"
            if "mfu" in r:
                throughput += f" MFU: {100 * r['mfu']:.1f}% |"
        norm = f" grad norm: {r['grad_norm']:.3f} |" if r["grad_norm"] is not None else ""
        if "num_zeros" in r:
            norm += f" num zeros: {r['num_zeros']} |"
        if "params_norm" in r:
            norm += f" params norm: {r['params_norm']:.3f} |"
        groups = [(key, value) for key, value in r.items() if key.startswith(GROUP_NORM)]
        parts = "".join(f" grad norm {key.removeprefix(GROUP_NORM)}: {value:.3f} |" for key, value in groups)
        if "peak_memory_bytes" in r:
            parts += f" memory (MiB): {r['peak_memory_bytes'] / 2**20:.1f} on rank {r['peak_memory_rank']} |"
        distilled = f" distillation loss: {r['distillation_loss']:.6E} |" if "distillation_loss" in r else ""
        loss = "nan" if r["lm_loss"] is None else f"{r['lm_loss']:.6E}"
        self.message(
            f"iteration {r['iteration']:8d}/{r['train_iters']:8d} | "
            f"consumed samples: {r['consumed_samples']:12d} | "
            f"elapsed time per iteration (ms): {r['elapsed_ms_per_iteration']:.1f} |{throughput} "
            f"learning rate: {r['learning_rate']:.6E} | global batch size: {r['global_batch_size']:5d} | "
            f"lm loss: {loss} |{distilled} loss scale: {r['loss_scale']:.1f} |{norm} "
            f"number of skipped iterations: {r['skipped_iterations']:3d} | "
            f"number of nan iterations: {r['nan_iterations']:3d} | "
            f"tokens/s: {r['tokens_per_second']:.0f} |{parts} variant: {r['variant']} |"
        )

    def evaluation(self, name: str, iteration: int, results: dict[str, float]) -> None:
        """Record a validation or test: ``lm_loss``, and ``perplexity`` or ``padded_perplexity``."""
        if not self.enabled:
            return
        # Both words in the line; in the records the plain name is the packed one.
        named = {"packed_perplexity" if key == "perplexity" else key: value for key, value in results.items()}
        text = " | ".join(f"{key.replace('_', ' ')}: {value:.6E}" for key, value in named.items())
        self.message(f"{name} at iteration {iteration} | {text} |")
        self._write({"iteration": iteration, **{f"{name}_{k}": v for k, v in results.items()}})

    def _write(self, record: dict[str, Any]) -> None:
        if self._json is not None:
            self._json.write(json.dumps(record) + "\n")
        tags = {
            "lm_loss": "lm loss",
            "distillation_loss": "distillation loss",
            "learning_rate": "learning-rate",
            "global_batch_size": "batch-size",
            "loss_scale": "loss-scale",
            "grad_norm": "grad-norm",
            "elapsed_ms_per_iteration": "iteration-time",
            "tflops_per_rank": "throughput",
            "tokens_per_second": "tokens-per-second",
            "mfu": "mfu",
            "skipped_iterations": "skipped-iterations",
            "params_norm": "params-norm",
            "num_zeros": "num-zeros",
            "mem_reserved_bytes": "mem-reserved-bytes",
            "mem_allocated_bytes": "mem-allocated-bytes",
            "mem_max_allocated_bytes": "mem-max-allocated-bytes",
            "mem_allocated_count": "mem-allocated-count",
            "peak_memory_bytes": "peak-memory-bytes of any rank",
            "validation_lm_loss": "lm loss validation",
            "validation_perplexity": "lm loss validation ppl",
            "test_lm_loss": "lm loss test",
            "test_perplexity": "lm loss test ppl",
            "validation_padded_perplexity": "lm loss validation padded ppl",
            "test_padded_perplexity": "lm loss test padded ppl",
        }
        groups = (key for key in record if key.startswith(GROUP_NORM))
        tags |= {key: f"grad-norm {key.removeprefix(GROUP_NORM)}" for key in groups}
        shown = {tag: record[key] for key, tag in tags.items() if record.get(key) is not None}
        if self._tensorboard is not None:
            for tag, value in shown.items():
                self._tensorboard.add_scalar(tag, value, record["iteration"])
            if record.get("lm_loss") is not None:
                self._tensorboard.add_scalar(
                    "lm loss vs samples", record["lm_loss"], record["consumed_samples"]
                )
        if self._wandb is not None:
            self._wandb.log(shown, step=record["iteration"])

    def _show_progress(self, iteration: int, loss: float) -> None:
        assert self._first_iteration is not None
        done = iteration - self._first_iteration
        rate = (time.perf_counter() - self._started) / done
        total = self.config.train.train_iters
        left = format_duration(rate * (total - iteration))
        sys.stderr.write(f"\r\033[Kstep {iteration}/{total}  loss {loss:.4f}  {rate:.2f} s/step  ETA {left}")
        sys.stderr.flush()

    def _clear_progress(self) -> None:
        if self._progress:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def close(self) -> None:
        self._clear_progress()
        for writer in (self._json, self._tensorboard):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()
