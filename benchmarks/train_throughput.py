#!/usr/bin/env python3
"""Training speed: this package's trainer against a plain-PyTorch GPT of the same shape, in the same run.

ours   the Trainer of python -m megatron_sharedproj.pretrain (Megatron-Core's engine, this package's
       attention), on its synthetic data
plain  the GPT and the loop below: SDPA, fused AdamW, clipping, the batches in memory; torch.compile on a
       GPU, autocast over fp32 weights for bf16 (ours: bf16 weights, fp32 masters and gradients)
Both train the same model with the same dropout, batch and dtype. They take turns in random order, each turn
a window of steps behind one that is not timed; the medians are over windows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import io
import itertools
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sharedproj.command_line import Parser, list_of, positive_float, positive_int, run_distributed
from megatron_sharedproj.config import PRESETS, DataConfig, ModelConfig, RunConfig, TrainConfig
from megatron_sharedproj.device import get_device
from megatron_sharedproj.profiling.progress import ProgressBar
from megatron_sharedproj.profiling.tables import write_csv
from megatron_sharedproj.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]

EXAMPLE = """
example:
  python benchmarks/train_throughput.py --output train.csv --plot train.png
  python benchmarks/train_throughput.py --sizes 10m --vocab-sizes 8192 --budget-seconds 30

  tokens/s   of the median window
  MFU        tokens/s * FLOPs per token / peak; FLOPs per token = 6 * multiply-accumulates of the forward
             pass per token, causal scores only (T (T + 1) / 2 pairs), as in the trainer's log
  MFU T^2    the same with all T^2 pairs counted, the convention of most papers
  peak       a GPU's by its data sheet (dense bf16); on a CPU the fastest matrix product measured in this run
  x plain    tokens/s / those of the plain loop with the same variant and dtype
  x qkv      tokens/s / those of the same engine and dtype with qkv; FLOPs: what the FLOP counts would
             make of it
  x fp32     tokens/s / those of the same engine and variant in fp32
"""
# With the default vocabularies beside them, 10m has 10 and 24 million parameters, 30m 30 and 51 million.
SIZES: dict[str, dict[str, int]] = {
    "10m": {"num_layers": 6, "hidden_size": 320, "num_attention_heads": 5},
    "30m": {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8},
    **{
        name: {key: getattr(one, key) for key in ("num_layers", "hidden_size", "num_attention_heads")}
        for name, one in PRESETS.items()
    },
}
_LR, _BETAS, _DECAY, _CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
_IDENTITY = (
    "device", "torch", "threads", "dtype", "compile", "size", "vocab_size", "seq_length", "micro_batch_size",
    "hidden_dropout", "engine", "variant",
)  # fmt: skip
COLUMNS = (
    "date", "commit", *_IDENTITY, "parameters", "tokens_per_second", "tokens_per_second_p10",
    "tokens_per_second_p90", "windows", "steps_per_window", "flops_per_token", "mfu", "mfu_full_scores",
    "peak_tflops", "peak_is", "matrix_product_tflops", "percent_of_matrix_product", "peak_memory_mb",
    "last_loss", "ratio_vs_plain", "ratio_vs_qkv", "flop_ratio_vs_qkv", "ratio_vs_fp32",
)  # fmt: skip

Row = dict[str, str]
Key = tuple[str, str, str]  # engine, variant, dtype
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A size and a vocabulary."""

    size: str
    vocab_size: int


class PlainBlock(nn.Module):
    """A pre-norm block; what the variant ties is one projected tensor. x [b, s, d]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads, self.variant = config.hidden_size, config.num_attention_heads, config.variant
        self.names = self.variant.projections
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.projection, self.out = nn.Linear(d, len(self.names) * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, config.ffn_hidden_size), nn.Linear(config.ffn_hidden_size, d)
        self.dropout = config.hidden_dropout
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        mixed = self.projection(self.norm_1(x)).view(b, s, len(self.names), self.heads, -1)
        of = dict(zip(self.names, mixed.permute(2, 0, 3, 1, 4), strict=True))
        v = self.variant
        y = F.scaled_dot_product_attention(of[v.query], of[v.key], of[v.value], is_causal=True)
        y = self.out(y.transpose(1, 2).reshape(b, s, d))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.down(F.gelu(self.up(self.norm_2(x)), approximate=self.approximate))
        return x + F.dropout(y, self.dropout, self.training)


class PlainGPT(nn.Module):
    """The model of a ModelConfig (learned positions, LayerNorm, tied head) in plain PyTorch."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm, self.dropout = nn.LayerNorm(config.hidden_size), config.hidden_dropout
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_method_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of tokens and labels [b, s]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels.reshape(-1))


@dataclass
class Contender:
    """Something that trains.

    step: one optimizer step; loss: the last step's; peak: the most bytes that it has held, measured.
    """

    step: Callable[[], Any]
    loss: Callable[[], float]
    peak: int = 0


def plain(config: ModelConfig, args: argparse.Namespace, dtype: str, device: torch.device) -> Contender:
    """The plain loop."""
    torch.manual_seed(1)
    model: Any = PlainGPT(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=_BETAS, weight_decay=_DECAY, fused=True)
    params = list(model.parameters())
    if args.compile:
        model = torch.compile(model)
    shape = (8, args.micro_batch_size, args.seq_length + 1)
    batches = torch.randint(config.padded_vocab_size, shape, device=device)
    last: list[Tensor] = [torch.zeros(())]

    def step() -> None:
        batch = batches[random.randrange(len(batches))]
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, _CLIP)
        optimizer.step()
        last[0] = loss.detach()

    return Contender(step, lambda: last[0].item())


def ours(config: ModelConfig, args: argparse.Namespace, dtype: str, device: torch.device) -> Contender:
    """The trainer's own steps."""
    from megatron_sharedproj.pretrain import build_trainer, prepare
    from megatron_sharedproj.profiling.step_profile import arguments_of

    run = RunConfig(
        model=config,
        train=TrainConfig(
            seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, train_iters=100_000,
            lr=_LR, min_lr=_LR, adam_beta1=_BETAS[0], adam_beta2=_BETAS[1], weight_decay=_DECAY,
            clip_grad=_CLIP, eval_iters=0, bf16=dtype == "bf16",
        ),
        data=DataConfig(
            mock_data=True, tokenizer_type="NullTokenizer", vocab_size=config.padded_vocab_size - 1,
            num_workers=0 if device.type == "cpu" else 2,
        ),
    )  # fmt: skip
    run.log.log_interval = sys.maxsize
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = build_trainer(*prepare(arguments_of(run)))
    trainer.model.train()
    iterator = trainer._iterator(trainer.train_data, 0)
    return Contender(lambda: trainer.step(iterator), lambda: trainer.last_loss)


BUILDERS = {"ours": ours, "plain": plain}


class Memory:
    """Bytes in use, and the most since the last reset: a GPU's allocator, or on Linux the process itself."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def reset(self) -> None:
        """Forget the most; give free memory back, so that what follows is not served from it unseen."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else self._status("VmRSS")

    def most(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    cases = parser.add_argument_group("cases")
    cases.add_argument(
        "--sizes", type=list_of(str, tuple(SIZES)), metavar="NAME,NAME",
        help=f"of {', '.join(SIZES)} (default: 10m,30m on a CPU, 300m,1b on a GPU)",
    )  # fmt: skip
    cases.add_argument(
        "--vocab-sizes", type=list_of(positive_int), metavar="N,M",
        help="default: 8192,50304 on a CPU, 50304 on a GPU",
    )  # fmt: skip
    cases.add_argument(
        "--variants", type=list_of(str, tuple(VARIANTS)), default=("qkv", "qk_eq_v"), metavar="NAME,NAME",
        help="default: qkv,qk_eq_v",
    )  # fmt: skip
    cases.add_argument(
        "--engines",
        type=list_of(str, tuple(BUILDERS)),
        default=tuple(BUILDERS),
        metavar="NAME",
        help="default: ours,plain",
    )
    cases.add_argument("--seq-length", type=positive_int, help="default: 512 on a CPU, 2048 on a GPU")
    cases.add_argument("--micro-batch-size", type=positive_int, help="default: 4 on a CPU, 8 on a GPU")
    cases.add_argument(
        "--dtypes", type=list_of(str, tuple(DTYPES)), metavar="NAME,NAME",
        help="default: fp32,bf16 on a CPU, bf16 on a GPU",
    )  # fmt: skip
    cases.add_argument("--hidden-dropout", type=float, default=0.0, metavar="P", help="default 0")
    cases.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the plain model (default: on a GPU)",
    )  # fmt: skip
    how = parser.add_argument_group("measurement")
    how.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")
    how.add_argument(
        "--budget-seconds", type=positive_float, default=60.0, metavar="X", help="per case (default 60)"
    )
    how.add_argument(
        "--window-seconds", type=positive_float, default=2.0, metavar="X", help="of a window (default 2)"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output", type=Path, metavar="CSV", help="written after each case; a case that it has is skipped"
    )
    files.add_argument("--plot", type=Path, metavar="PNG")
    return parser


def check(args: argparse.Namespace, on_gpu: bool) -> list[tuple[Case, ModelConfig]]:
    """Fill in the device's defaults; the cases and their qkv models. Raises ValueError."""
    from megatron_sharedproj.inference.prompts import check_output
    from megatron_sharedproj.reporting.figures import check_plot

    check_output(args.output, "--output", (".csv",))
    if args.plot:
        check_plot(args.plot)
    args.sizes = args.sizes or (("300m", "1b") if on_gpu else ("10m", "30m"))
    args.vocab_sizes = args.vocab_sizes or ((50304,) if on_gpu else (8192, 50304))
    args.seq_length = args.seq_length or (2048 if on_gpu else 512)
    args.micro_batch_size = args.micro_batch_size or (8 if on_gpu else 4)
    args.dtypes = args.dtypes or (("bf16",) if on_gpu else ("fp32", "bf16"))
    args.compile = on_gpu if args.compile is None else args.compile
    return [
        (
            Case(size, vocab),
            ModelConfig(
                **SIZES[size],
                padded_vocab_size=vocab,
                max_position_embeddings=args.seq_length,
                attention_dropout=0.0,
                hidden_dropout=args.hidden_dropout,
            ),
        )
        for size in args.sizes
        for vocab in args.vocab_sizes
    ]


def read_rows(path: Path | None) -> list[Row]:
    """The rows of a CSV that an earlier run wrote. Raises ValueError for another kind of file."""
    if path is None or not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"--output {path}: has other columns than this benchmark's; give another name")
        return list(reader)


class Benchmark:
    """Measures case by case."""

    def __init__(self, args: argparse.Namespace):
        from megatron_sharedproj import distributed, formulas
        from megatron_sharedproj.profiling.attention_results import environment
        from megatron_sharedproj.profiling.roofline import measure_roofline
        from megatron_sharedproj.profiling.timing import get_machine

        if args.threads:
            torch.set_num_threads(args.threads)
        self.args = args
        self.device = distributed.initialize(get_device())
        self.memory = Memory(self.device)
        self.machine = get_machine(self.device.type)
        dtypes = {name: DTYPES[name] for name in args.dtypes}
        self._rates = lambda: {
            name: measure_roofline([dtype], self.machine).flops[dtype] for name, dtype in dtypes.items()
        }
        self.products, self.sheet = self._rates(), formulas.peak_flops(self.machine.name)
        self.peak_is = "data sheet, dense bf16" if self.sheet else "measured matrix product"
        run = environment(self.machine, ROOT)
        run.pop("cuda")
        self.run: Row = {
            **run,
            "compile": str(args.compile).lower(),
            "seq_length": str(args.seq_length),
            "micro_batch_size": str(args.micro_batch_size),
            "hidden_dropout": f"{args.hidden_dropout:g}",
        }

    def peak(self, dtype: str) -> float:
        """FLOP/s that MFU is a fraction of."""
        return self.sheet or self.products[dtype]

    def keys(self) -> list[Key]:
        """What is compared in a case."""
        return list(itertools.product(self.args.engines, self.args.variants, self.args.dtypes))

    def identity(self, case: Case, key: Key) -> tuple[str, ...]:
        """What tells one measurement from another."""
        engine, variant, dtype = key
        row = {
            **self.run, "size": case.size, "vocab_size": str(case.vocab_size), "engine": engine,
            "variant": variant, "dtype": dtype,
        }  # fmt: skip
        return tuple(row[name] for name in _IDENTITY)

    def _window(self, contender: Contender, count: int) -> float:
        """Seconds of one step, from a window of `count` behind one that is not timed."""
        contender.step()
        self.machine.wait()
        start = time.perf_counter()
        for _ in range(count):
            contender.step()
        self.machine.wait()
        return (time.perf_counter() - start) / count

    def _build(self, config: ModelConfig, key: Key) -> Contender:
        engine, variant, dtype = key
        self.memory.reset()
        before = self.memory.now()
        own = config.replace(attention_variant=variant)
        contender: Contender = BUILDERS[engine](own, self.args, dtype, self.device)
        for _ in range(2):  # the optimizer's state is made in the first
            contender.step()
        self.machine.wait()
        contender.peak = self.memory.most() - before
        return contender

    def measure(self, case: Case, config: ModelConfig) -> list[Row]:
        """The rows of a case, one per engine, variant and dtype."""
        from megatron_sharedproj.profiling.timing import Times

        contenders = {key: self._build(config, key) for key in self.keys()}
        samples: dict[Key, list[float]] = {key: [] for key in contenders}
        counts = {
            key: max(1, math.ceil(self.args.window_seconds / self._window(one, 1)))
            for key, one in contenders.items()
        }
        order, keys = random.Random(0), list(contenders)
        start = time.perf_counter()
        while not samples[keys[0]] or time.perf_counter() - start < self.args.budget_seconds:
            order.shuffle(keys)
            for key in keys:
                samples[key].append(self._window(contenders[key], counts[key]))
        # Again: on a shared machine one moment's rate may be half of another's, and a peak is the best.
        self.products = {name: max(self.products[name], rate) for name, rate in self._rates().items()}
        times = {key: Times.of(taken) for key, taken in samples.items()}
        return [self._row(case, config, key, contenders[key], times, counts[key]) for key in contenders]

    def _row(
        self,
        case: Case,
        config: ModelConfig,
        key: Key,
        contender: Contender,
        times: dict[Key, Any],
        count: int,
    ) -> Row:
        from megatron_sharedproj import formulas

        engine, variant, dtype = key
        own, found = config.replace(attention_variant=variant), times[key]
        length = self.args.seq_length
        tokens = self.args.micro_batch_size * length
        rate = tokens / found.median
        flops = formulas.train_flops_per_token(own, length)
        full = 6 * formulas.macs(own, length)["total"] / length

        def against(other: Key) -> float | None:
            return times[other].median / found.median if other in times else None

        figures: dict[str, float | None] = {
            "tokens_per_second": rate,
            "tokens_per_second_p10": tokens / found.p90,
            "tokens_per_second_p90": tokens / found.p10,
            "flops_per_token": flops,
            "mfu": rate * flops / self.peak(dtype),
            "mfu_full_scores": rate * full / self.peak(dtype),
            "peak_tflops": self.peak(dtype) / 1e12,
            "matrix_product_tflops": self.products[dtype] / 1e12,
            "percent_of_matrix_product": 100 * rate * flops / self.products[dtype],
            "peak_memory_mb": contender.peak / 1e6,
            "last_loss": contender.loss(),
            "ratio_vs_plain": against(("plain", variant, dtype)),
            "ratio_vs_qkv": against((engine, "qkv", dtype)),
            "ratio_vs_fp32": against((engine, variant, "fp32")),
            "flop_ratio_vs_qkv": formulas.train_flops_per_token(config, length) / flops,
        }
        return {
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": self.run["commit"],
            **dict(zip(_IDENTITY, self.identity(case, key), strict=True)),
            "parameters": str(formulas.parameters(own)["total"]),
            "windows": str(found.repeats),
            "steps_per_window": str(count),
            "peak_is": self.peak_is,
            **{name: "" if value is None else f"{value:.6g}" for name, value in figures.items()},
        }


_TITLES = ("engine", "variant", "dtype", "tokens/s", "p10-p90", "windows", "MFU", "MFU T^2", "peak MB",
           "x plain", "x qkv", "FLOPs", "x fp32")  # fmt: skip
_LINE = "{:<6} {:<12} {:<5} {:>9} {:>17} {:>8} {:>6} {:>7} {:>8} {:>7} {:>6} {:>6} {:>6}"


def print_rows(rows: Sequence[Row]) -> None:
    """A case's rows on the screen."""
    for row in rows:
        number = {name: float(value) if value else None for name, value in row.items() if name not in
                  ("date", "commit", "peak_is", *_IDENTITY)}  # fmt: skip
        spread = f"{number['tokens_per_second_p10']:,.0f}-{number['tokens_per_second_p90']:,.0f}"
        ratios = [
            "-" if number[name] is None else f"{number[name]:.3f}"
            for name in ("ratio_vs_plain", "ratio_vs_qkv", "flop_ratio_vs_qkv", "ratio_vs_fp32")
        ]
        print(
            _LINE.format(
                row["engine"], row["variant"], row["dtype"],
                f"{number['tokens_per_second']:,.0f}", spread, row["windows"],
                f"{100 * (number['mfu'] or 0):.1f}%", f"{100 * (number['mfu_full_scores'] or 0):.1f}%",
                f"{number['peak_memory_mb']:,.0f}", *ratios,
            ),
            flush=True,
        )  # fmt: skip


def plot(rows: Sequence[Row], output: Path) -> None:
    """Tokens/s as bars, a panel per case; the number on a bar is its ratio to the plain loop's."""
    from megatron_sharedproj.reporting.figures import new_figure, save_figure

    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["size"], row["vocab_size"]), []).append(row)
    figure = new_figure()
    figure.set_size_inches(max(6.0, max(3.2, 0.55 * len(rows) / len(cases)) * len(cases)), 4.0)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, ((size, vocab), own) in zip(panels, cases.items(), strict=True):
        rates, low, high = (
            [float(row[f"tokens_per_second{end}"]) for row in own] for end in ("", "_p10", "_p90")
        )
        spread = [
            [rate - bottom for rate, bottom in zip(rates, low, strict=True)],
            [top - rate for rate, top in zip(rates, high, strict=True)],
        ]
        colors = ["C0" if row["engine"] == "ours" else "0.6" for row in own]
        bars = axes.bar(range(len(own)), rates, color=colors, yerr=spread, capsize=3)
        labels = [f"{float(row['ratio_vs_plain']):.2f}x" if row["ratio_vs_plain"] else "" for row in own]
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color="white")
        names = [f"{row['engine']}\n{row['variant']}\n{row['dtype']}" for row in own]
        axes.set_xticks(range(len(own)), names, fontsize=7)
        axes.set_ylabel("tokens per second")
        axes.set_title(f"{size}, vocabulary {int(vocab):,}", fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    row = rows[-1]
    figure.suptitle(
        f"{row['device']}, {row['threads']} thread(s): sequence {row['seq_length']}, micro "
        f"batch {row['micro_batch_size']}; {row['date'][:10]}, {row['commit']}",
        fontsize=8,
    )
    save_figure(figure, output)


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    cases = check(args, torch.cuda.is_available())
    rows = read_rows(args.output)
    # It says that it keeps no index of the synthetic data.
    logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.ERROR)
    benchmark = Benchmark(args)
    known = {tuple(row[name] for name in _IDENTITY) for row in rows}
    # What is compared comes from one run: a case that lacks a row is measured as a whole.
    wanted = {case: {benchmark.identity(case, key) for key in benchmark.keys()} for case, _ in cases}
    todo = [(case, config) for case, config in cases if wanted[case] - known]
    if len(todo) < len(cases):
        print(f"{len(cases) - len(todo)} of {len(cases)} cases are in {args.output}")
    print(
        f"{benchmark.machine.name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"peak {', '.join(f'{d} {benchmark.peak(d) / 1e12:.4g}' for d in args.dtypes)} TFLOP/s "
        f"({benchmark.peak_is}, so far)\n"
        "MFU = tokens/s * 6 * multiply-accumulates per token / peak, causal scores only (MFU T^2: all)"
    )
    progress = ProgressBar(len(todo))
    try:
        for index, (case, config) in enumerate(todo):
            name = f"{case.size}, vocabulary {case.vocab_size:,}"
            progress.show(index, name)
            with get_device().keep_freed_memory():  # as in the trainer's loop, for both engines
                found = benchmark.measure(case, config)
            progress.clear()
            print(f"\n{name}: {int(found[0]['parameters']):,} parameters")
            print(_LINE.format(*_TITLES))
            print_rows(found)
            rows = [row for row in rows if tuple(row[name] for name in _IDENTITY) not in wanted[case]] + found
            if args.output:
                write_csv(args.output, COLUMNS, rows)
    except KeyboardInterrupt:
        progress.clear()
        raise KeyboardInterrupt("finished cases are kept" if args.output else "") from None
    if args.plot and rows:
        plot(rows, args.plot)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the flags (one line), 130 after Ctrl-C (finished cases are kept)."""
    return run_distributed(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
