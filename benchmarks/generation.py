#!/usr/bin/env python3
"""Decode speed against context, on a CPU or a GPU: our engine with K=V and with qkv, and transformers.

All of them decode with a random model of one shape (its K=V or its qkv form) over caches filled with random
entries, not prefilled, in turn: each once per round, in random order. A step is what generation does per
token: one forward of every text in the batch, and the choice of the best token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, list_of, positive_float, positive_int, run_distributed
from megatron_sharedproj.profiling.progress import ProgressBar
from megatron_sharedproj.profiling.tables import write_csv

ROOT = Path(__file__).resolve().parents[1]

EXAMPLE = """
example:
  python benchmarks/generation.py --output generation.csv --plot generation.png
  python benchmarks/generation.py --contexts 1024 --batch-sizes 1 --budget-seconds 5
  python benchmarks/generation.py --rotary --output rotary.csv     (K=V under every --kv-rotary)

  tokens/s   new tokens of all texts of the batch per second, from the median step
  cache/w    bytes of the cache that a step reads / bytes of the weights that it reads
  x qkv      tokens/s / those of our engine with qkv; x hf: / those of transformers with its own cache
"""
# Contender -> its attention variant. transformers runs the exported K=V form; its own cache stores K and V.
CONTENDERS = {
    "ours qk_eq_v": "qk_eq_v",
    "ours qkv": "qkv",
    "transformers, SharedProjCache": "qk_eq_v",
    "transformers, StaticCache": "qk_eq_v",
    "transformers, DynamicCache": "qk_eq_v",
}
_HALF = {"rotary_percent": 0.5}
# With --rotary, all of them ours: the fields of ModelConfig that differ, and the cache policy.
ROTARY: dict[str, tuple[dict[str, Any], str]] = {
    "ours qkv": ({"attention_variant": "qkv"}, "rotate_at_read"),
    "rotate_values": ({"kv_rotary": "rotate_values"}, "rotate_at_read"),
    "partial 0.5": ({"kv_rotary": "partial", **_HALF}, "rotate_at_read"),
    "separate_rope_head 0.5": ({"kv_rotary": "separate_rope_head", **_HALF}, "rotate_at_read"),
    "rotate_keys, at read": ({"kv_rotary": "rotate_keys"}, "rotate_at_read"),
    "rotate_keys, both stored": ({"kv_rotary": "rotate_keys"}, "store_both"),
}
# The cache of each of transformers' forms.
CACHES = {"transformers, SharedProjCache": "shared", "transformers, StaticCache": "static"}
BASELINE, HF_BASELINE = "ours qkv", "transformers, DynamicCache"
COLUMNS = (
    "date", "commit", "device", "torch", "transformers", "threads", "dtype", "layers", "hidden_size", "heads",
    "groups", "vocab_size", "cache", "batch", "context", "contender", "ms_median", "ms_p10", "ms_p90",
    "repeats", "tokens_per_second", "cache_bytes_read", "cache_bytes_held", "weight_bytes",
    "cache_to_weights", "ratio_vs_qkv", "ratio_vs_transformers",
)  # fmt: skip
_SPARE = 64  # tokens that the timed steps may add; below, Machine.most + Machine.warm_up

Row = dict[str, str]


@dataclass(frozen=True)
class Case:
    """Texts in the batch, and tokens that each has in the cache."""

    batch: int
    context: int


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    numbers = list_of(positive_int)
    cases = parser.add_argument_group("cases")
    cases.add_argument(
        "--contexts", type=numbers, metavar="N,M", default=numbers("1024,2048,4096,8192,16384,32768")
    )
    cases.add_argument("--batch-sizes", type=numbers, metavar="N,M", default=numbers("1,8"))
    cases.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    cases.add_argument("--cache", choices=("paged", "contiguous"), default="paged", help="of our engine")
    model = parser.add_argument_group("model (random weights)")
    for flag, default in (
        ("--num-layers", 8), ("--hidden-size", 512), ("--num-attention-heads", 8), ("--vocab-size", 4096),
    ):  # fmt: skip
        model.add_argument(flag, type=int, default=default, help=f"default {default}")
    model.add_argument("--rotary", action="store_true", help="rotary positions: compare the schemes of K=V")
    model.add_argument("--num-query-groups", type=int, default=0, help="default: as many as heads")
    how = parser.add_argument_group("measurement")
    how.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    how.add_argument("--budget-seconds", type=positive_float, default=20.0, help="per case (default 20)")
    how.add_argument(
        "--memory-gib", type=positive_float, default=20.0, help="skip what needs more (default 20)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, metavar="CSV")
    files.add_argument("--plot", type=Path, metavar="PNG")
    return parser


def check(args: argparse.Namespace) -> Any:
    """The K=V model's ModelConfig. Raises ValueError for what would not run, before anything is built."""
    from megatron_sharedproj.config import ModelConfig
    from megatron_sharedproj.inference.prompts import check_output
    from megatron_sharedproj.reporting.figures import check_plot

    check_output(args.output, "--output", (".csv",))
    if args.plot:
        check_plot(args.plot)
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads}: must be at least 1")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ValueError("transformers is not installed; install the [hf] extra") from None
    return ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        padded_vocab_size=args.vocab_size,
        max_position_embeddings=max(args.contexts) + _SPARE,
        attention_variant="qk_eq_v",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all but the position table, of which it reads a row."""
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if "position" not in name
    )


def fill(tensor: Any) -> None:
    """Random entries [..., g, e], 64 tokens over and over: what they are does not change the time."""
    import torch

    flat = tensor.view(-1, *tensor.shape[-2:])
    block = torch.randn(64, *flat.shape[1:], device=tensor.device).to(tensor.dtype)
    for part in flat.split(64):
        part.copy_(block[: part.shape[0]])


class Ours:
    """This package's engine, one decode step at a time."""

    def __init__(self, config: Any, dtype: Any, device: Any, cache: str, policy: str = "rotate_at_read"):
        from megatron_sharedproj.model import build_model

        self.config, self.paged, self.policy = config, cache == "paged", policy
        self.model = build_model(config, parallel_output=False, dtype=dtype).to(device).eval()

    def start(self, case: Case) -> Callable[[], Any]:
        """Fill a cache; returns the step."""
        import torch

        from megatron_sharedproj.layers.kv_cache import CacheContext, KVCache

        self.cache = KVCache.for_model(
            self.model,
            self.config,
            policy=self.policy,
            max_sequences=case.batch,
            max_tokens=case.context + _SPARE,
            page_size=64 if self.paged else None,
            pages=case.batch * -(-(case.context + _SPARE) // 64) if self.paged else None,
        )
        for tensor in self.cache.tensors():
            fill(tensor)
        context = CacheContext(self.cache)
        slots = [self.cache.allocate() for _ in range(case.batch)]
        self.cache.extend(slots, case.context)
        tokens = torch.zeros(case.batch, 1, dtype=torch.long, device=next(self.model.parameters()).device)

        @torch.inference_mode()  # as Engine.run
        def step() -> list[int]:
            context.prepare(slots, 1)
            logits = self.model(
                tokens, context.positions, None, inference_context=context, runtime_gather_output=True
            )
            return logits[:, -1].float().argmax(-1).tolist()

        return step

    def held(self) -> int:
        return self.cache.nbytes()


class HuggingFace:
    """The exported form in transformers, with its own cache or ours."""

    def __init__(self, config: Any, dtype: Any, device: Any, cache: str):
        from transformers import AutoModelForCausalLM

        from megatron_sharedproj.conversion.config_map import hugging_face_config
        from megatron_sharedproj.layers.hf import SharedProjConfig

        values = hugging_face_config(config, vocab_size=config.padded_vocab_size, eos_token_id=0)
        values.pop("architectures"), values.pop("model_type")
        self.config, self.dtype, self.device, self.kind = config, dtype, device, cache
        self.model = AutoModelForCausalLM.from_config(SharedProjConfig(**values)).to(device, dtype).eval()

    def start(self, case: Case) -> Callable[[], Any]:
        """Fill a cache; returns the step."""
        import torch
        from transformers import DynamicCache, StaticCache

        from megatron_sharedproj.layers.hf import SharedProjCache

        config = self.model.config
        if self.kind == "shared":
            self.cache = SharedProjCache(config)
        elif self.kind == "static":
            self.cache = StaticCache(config=config, max_cache_len=case.context + _SPARE)
        else:
            self.cache = DynamicCache(config=config)
        g, e = self.config.num_query_groups, self.config.kv_channels
        for layer in range(self.config.num_layers):
            stored = torch.empty(case.batch, case.context, g, e, dtype=self.dtype, device=self.device)
            fill(stored)
            keys = stored.transpose(1, 2)
            self.cache.update(keys, keys, layer)  # as the model does: DynamicCache copies it twice
        tokens = torch.zeros(case.batch, 1, dtype=torch.long, device=self.device)

        def step() -> list[int]:
            logits = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits
            return logits[:, -1].float().argmax(-1).tolist()

        return step

    def held(self) -> int:
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


class Benchmark:
    """Builds the models once and measures case by case."""

    def __init__(self, args: argparse.Namespace, config: Any):
        import torch
        import transformers

        from megatron_sharedproj import distributed, formulas
        from megatron_sharedproj.device import get_device
        from megatron_sharedproj.profiling.attention_results import environment
        from megatron_sharedproj.profiling.timing import get_machine

        if args.threads:
            torch.set_num_threads(args.threads)
        device = distributed.initialize(get_device())
        self.args, self.config, self.machine = args, config, get_machine(device.type)
        self.dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
        width = torch.tensor([], dtype=self.dtype).element_size()
        entries = {name: ({"attention_variant": variant}, "") for name, variant in CONTENDERS.items()}
        if args.rotary:
            entries = {
                name: ({"position_embedding_type": "rope", **changes}, policy)
                for name, (changes, policy) in ROTARY.items()
            }
        self.per_token: dict[str, int] = {}
        self.contenders: dict[str, Any] = {}
        for name, (changes, policy) in entries.items():
            own = config.replace(**changes)
            policies = {"policy": policy} if policy else {}
            self.per_token[name] = formulas.kv_cache_bytes_per_token(own, width, **policies)
            self.contenders[name] = (
                HuggingFace(own, self.dtype, device, CACHES.get(name, "dynamic"))
                if name.startswith("transformers")
                else Ours(own, self.dtype, device, args.cache, **policies)
            )
        # transformers' own caches store a tied tensor twice.
        for name in {"transformers, StaticCache", HF_BASELINE} & set(entries):
            self.per_token[name] = self.per_token[BASELINE]
        run = {**environment(self.machine, ROOT), "transformers": transformers.__version__}
        run.pop("cuda")
        self.run = {
            **run,
            "dtype": args.dtype,
            "layers": str(config.num_layers),
            "hidden_size": str(config.hidden_size),
            "heads": str(config.num_attention_heads),
            "groups": str(config.num_query_groups),
            "vocab_size": str(config.padded_vocab_size),
            "cache": args.cache,
        }

    def needed(self, case: Case) -> float:
        """GiB of all caches of a case, with DynamicCache's concatenation of a layer."""
        tokens = case.batch * (case.context + _SPARE)
        copy = 2 * self.per_token.get(HF_BASELINE, 0) / self.config.num_layers
        return tokens * (sum(self.per_token.values()) + copy) / 2**30

    def measure(self, case: Case) -> list[Row]:
        """The rows of a case, one per contender."""
        import torch

        from megatron_sharedproj.profiling.timing import Operation, measure

        with torch.no_grad():
            steps = {name: Operation(one.start(case)) for name, one in self.contenders.items()}
            times = measure(steps, self.machine, self.args.budget_seconds)
        rate = {name: case.batch / found.median for name, found in times.items()}
        rows = []
        for name, found in times.items():
            weights = weight_bytes(self.contenders[name].model)
            read = self.per_token[name] * case.context * case.batch
            figures = {
                "ms_median": found.median * 1e3,
                "ms_p10": found.p10 * 1e3,
                "ms_p90": found.p90 * 1e3,
                "tokens_per_second": rate[name],
                "cache_to_weights": read / weights,
                "ratio_vs_qkv": rate[name] / rate[BASELINE],
            }
            if HF_BASELINE in rate:
                figures["ratio_vs_transformers"] = rate[name] / rate[HF_BASELINE]
            rows.append(
                {
                    "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    **self.run,
                    "batch": str(case.batch),
                    "context": str(case.context),
                    "contender": name,
                    "repeats": str(found.repeats),
                    "cache_bytes_read": str(read),
                    "cache_bytes_held": str(self.contenders[name].held()),
                    "weight_bytes": str(weights),
                    **{column: f"{value:.6g}" for column, value in figures.items()},
                }
            )
        for one in self.contenders.values():
            one.cache = None
        return rows


def print_rows(rows: Sequence[Row]) -> None:
    """A case's rows of the table on the screen."""
    for row in rows:
        spread = f"{float(row['ms_p10']):.1f}-{float(row['ms_p90']):.1f}"
        against = f"{float(row['ratio_vs_transformers']):>6.2f}" if "ratio_vs_transformers" in row else ""
        print(
            f"{row['batch']:>5} {row['context']:>8} {row['contender']:<30} {float(row['ms_median']):>9.2f} "
            f"{spread:>15} {float(row['tokens_per_second']):>9.1f} {float(row['cache_to_weights']):>8.2f} "
            f"{float(row['ratio_vs_qkv']):>6.2f} {against}",
            flush=True,
        )


def plot(rows: Sequence[Row], output: Path) -> None:
    """Tokens/s against context, a panel per batch size; a number at a point is its ratio to our qkv."""
    from megatron_sharedproj.reporting.figures import new_figure, save_figure

    figure = new_figure()
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure.set_size_inches(5.0 * len(batches), 4.2)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    styles = dict(zip(names, ("C0-o", "C3-s", "C9--v", "C2--^", "C1--x", "C4-.+"), strict=False))
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for name, style in styles.items():
            own = [row for row in rows if row["batch"] == batch and row["contender"] == name]
            x = [int(row["context"]) for row in own]
            y, low, high = (
                [int(batch) * 1e3 / float(row[f"ms_{key}"]) for row in own]
                for key in ("median", "p90", "p10")
            )
            axes.plot(x, y, style, label=name, markersize=4)
            axes.fill_between(x, low, high, color=style[:2], alpha=0.15, linewidth=0)
            if name == "ours qk_eq_v":
                for place, value, row in zip(x, y, own, strict=True):
                    label = f"{float(row['ratio_vs_qkv']):.2f}x"
                    axes.annotate(label, (place, value), (0, 6), textcoords="offset points", fontsize=7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens in the cache, per text")
        axes.set_ylabel("new tokens per second")
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    row = rows[0]
    figure.suptitle(
        f"{row['device']}, {row['threads']} thread(s), {row['dtype']}: {row['layers']} layers, "
        f"d {row['hidden_size']}, {row['heads']} heads, {row['groups']} groups; "
        f"{row['date'][:10]}, {row['commit']}",
        fontsize=8,
    )
    save_figure(figure, output)


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    config = check(args)
    benchmark = Benchmark(args, config)
    cases = [Case(batch, context) for batch in args.batch_sizes for context in args.contexts]
    small = [case for case in cases if benchmark.needed(case) <= args.memory_gib]
    for case in cases:
        if case not in small:
            print(
                f"batch {case.batch}, context {case.context}: needs {benchmark.needed(case):.1f} GiB, "
                f"--memory-gib is {args.memory_gib:g}: left out",
                file=sys.stderr,
            )
    titles = ("batch", "context", "contender", "ms", "p10-p90", "tokens/s", "cache/w", "x qkv", "x hf")
    print("{:>5} {:>8} {:<30} {:>9} {:>15} {:>9} {:>8} {:>6} {:>6}".format(*titles))
    rows: list[Row] = []
    progress = ProgressBar(len(small))
    try:
        for index, case in enumerate(small):
            progress.show(index, f"batch {case.batch}, context {case.context}")
            found = benchmark.measure(case)
            progress.clear()
            print_rows(found)
            rows += found
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
