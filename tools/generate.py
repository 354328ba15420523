#!/usr/bin/env python3
"""Generate text from a checkpoint, with a cache that holds a tied key/value once (bytes printed)."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj import distributed
from megatron_sharedproj.command_line import Parser, print_error, run_distributed
from megatron_sharedproj.config import write_json
from megatron_sharedproj.inference.loading import add_loading_args, load_model
from megatron_sharedproj.inference.prompts import (
    JsonLines,
    ProgressLine,
    Prompt,
    check_output,
    check_text,
    read_prompts,
)
from megatron_sharedproj.variants import CACHE_POLICIES

EXAMPLE = """examples:
  python tools/generate.py --load runs/k_eq_v --prompt "The state of the Union" --top-p 0.9
  python tools/generate.py --load runs/k_eq_v --prompt-file prompts.jsonl --num-samples 4 --output texts.jsonl
  torchrun --nproc-per-node 2 tools/generate.py --load runs/k_eq_v --tensor-model-parallel-size 2
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=EXAMPLE)
    add_loading_args(parser)
    group = parser.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="text to continue (default: start of a document)")
    source.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help='one prompt per line; .jsonl: {"prompt": ...} per line, other keys go to a .jsonl --output '
        "(but for those that it has itself)",
    )
    group.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt")
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=64)
    group.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    group.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens (0: all)")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens of this mass")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)"
    )
    group.add_argument("--seed", type=int, default=1234, help="each prompt and sample has its own stream")
    group = parser.add_argument_group("engine (changes no text, up to rounding)")
    group.add_argument("--max-batch-size", type=int, default=8, help="texts decoded at once (default 8)")
    group.add_argument("--cache", choices=("paged", "contiguous"), default="paged")
    group.add_argument("--page-size", type=int, default=64, help="tokens of a page (default 64)")
    group.add_argument(
        "--prefill-chunk-size",
        type=int,
        default=4096,
        metavar="N",
        help="prompt tokens in one forward pass (default 4096; 0: any number)",
    )
    group.add_argument(
        "--kv-cache-policy",
        choices=CACHE_POLICIES,
        default=CACHE_POLICIES[0],
        help="of a model with --kv-rotary rotate_keys: one tensor, rotated at every step, or two (default "
        f"{CACHE_POLICIES[0]})",
    )
    group.add_argument("--no-cache", action="store_true", help="recompute the prefix at every step")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=".json: texts and figures at the end; .jsonl: a line for each text as it ends (prompt, text, "
        "finish_reason, tokens), instead of printing it",
    )
    group.add_argument("--no-stream", action="store_true", help="print a single text when it is complete")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked without the model, load it, generate."""
    check_output(args.output, "--output", (".json", ".jsonl"))
    for flag in ("num_samples", "max_new_tokens"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if "" in args.stop:
        raise ValueError("--stop '': give a text that is not empty")
    for flag, text in (("--prompt", args.prompt), *(("--stop", text) for text in args.stop)):
        check_text(text, flag)
    if args.output and args.prompt_file and args.output.exists() and args.output.samefile(args.prompt_file):
        raise ValueError(f"--output {args.output}: is the --prompt-file; give another place")
    prompts = read_prompts(args.prompt_file) if args.prompt_file else [Prompt(args.prompt, "--prompt")]
    from megatron_sharedproj.inference.engine import Engine, EngineOptions, requests_for
    from megatron_sharedproj.inference.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    sampling.check()
    cache = "" if args.no_cache else args.cache
    options = EngineOptions(
        args.max_batch_size,
        cache,
        args.page_size,
        prefill_chunk_size=args.prefill_chunk_size,
        kv_cache_policy=args.kv_cache_policy,
    )
    options.check()

    engine = Engine(load_model(args, parallel_output=False), options)
    requests = []
    for index, prompt in enumerate(prompts):
        try:
            found = requests_for(
                engine.loaded.tokenizer,
                [prompt.text],
                max_new_tokens=args.max_new_tokens,
                num_samples=args.num_samples,
                stop=args.stop,
                first_prompt=index,
            )
            engine.check(found[0])
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
        requests += found
    output = Output(args, prompts, len(requests)) if distributed.is_rank_0() else None
    try:
        hooks: dict[str, Any] = {"on_text": output.text, "on_done": output.done} if output else {}
        completions = engine.run(requests, sampling, **hooks)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(output.interrupted() if output else "") from None
    finally:
        if output:
            output.close()
    report(args, engine, completions)


class Output:
    """Where texts go while they are generated: the terminal, a .jsonl file, a progress line."""

    def __init__(self, args: argparse.Namespace, prompts: list[Prompt], total: int):
        self._prompts, self._samples = prompts, args.num_samples
        self._lines = JsonLines(args.output) if args.output and args.output.suffix == ".jsonl" else None
        self._single = total == 1
        self._streams = self._single and not args.no_stream
        self._progress = ProgressLine(0 if self._single else total)
        self._total, self._done, self._tokens = total, 0, 0
        if self._streams:
            print(prompts[0].text, end="", flush=True)

    def text(self, request: Any, piece: str) -> None:
        """A piece of a text."""
        if self._streams:
            print(piece, end="", flush=True)

    def done(self, completion: Any) -> None:
        """A text that has ended."""
        request = completion.request
        prompt = self._prompts[request.prompt]
        self._done += 1
        self._tokens += len(completion.tokens)
        if self._streams:
            print()
        elif self._single:
            print(prompt.text + completion.text)
        elif self._lines is None:
            self._progress.clear()
            title = f"prompt {request.prompt + 1}, " if len(self._prompts) > 1 else ""
            print(f"--- {title}sample {request.sample + 1}\n{prompt.text}{completion.text}", flush=True)
        if self._lines:
            self._lines.write(
                {
                    **prompt.extra,
                    "prompt": prompt.text,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "tokens": completion.tokens,
                    "prompt_index": request.prompt,
                    "sample": request.sample,
                }
            )
        if not self._single:
            self._progress.show(self._done, self._tokens)

    def interrupted(self) -> str:
        """What Ctrl-C leaves, for the error line."""
        if self._streams:
            print(flush=True)
        self._progress.clear()
        where = f"; {self._lines.path} has those" if self._lines else ""
        return f"{self._done} of {self._total} texts were complete{where}"

    def close(self) -> None:
        if self._lines:
            self._lines.close()


def report(args: argparse.Namespace, engine: Any, completions: list[Any]) -> None:
    """The figures: a line on stderr, and the .json file."""
    from megatron_sharedproj.inference.generate import measured

    result, loaded = measured(engine, completions), engine.loaded
    if not distributed.is_rank_0():
        return
    stored = ", ".join(
        tensor.describe() for tensor in loaded.config.model.cached_tensors(args.kv_cache_policy)
    )
    note = (
        f"cache: {result.cache_bytes} bytes measured ({stored}), {result.cache_formula_bytes} by the formula"
    )
    ranks = args.tensor_model_parallel_size
    if args.no_cache:
        note = "no cache"
    elif ranks > 1:
        note += f", over all {ranks} ranks"
        if loaded.config.model.num_query_groups < ranks:
            note += " (fewer key/value heads than ranks: each rank holds a copy of its own)"
        elif loaded.config.model.rotary_scheme.rope_head:
            note += " (each rank holds the rotary head)"
    print(
        f"{loaded.folder}: {loaded.config.model.attention_variant}; {result.tokens_per_second:.1f} tokens/s "
        f"decoding; {note}",
        file=sys.stderr,
    )
    if args.output and args.output.suffix == ".json":
        figures = {
            "checkpoint": str(loaded.folder),
            "text": result.text,
            "finish_reason": [completion.finish_reason for completion in completions],
            "tokens_per_second": result.tokens_per_second,
            "cache_bytes": result.cache_bytes,
            "cache_formula_bytes": result.cache_formula_bytes,
            "cache_tokens": result.cache_tokens,
        }
        write_json(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if output failed, 2 for a mistake in the flags (one line), 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run_distributed(build_parser(), run, argv)
    except BrokenPipeError:  # the reader went away; the interpreter must not complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print_error(f"{error}; texts written before are kept")
        return 1


if __name__ == "__main__":
    sys.exit(main())
