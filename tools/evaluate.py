#!/usr/bin/env python3
"""Evaluate a model.

perplexity: packed (real tokens only) and the paper's padded protocol, on a checkpoint.
lm-eval: the paper's five tasks, or any other task of lm-eval, on a checkpoint or an exported directory.
recall: whether a checkpoint finds in its context what belongs to a key; also as tasks for lm-eval.
compare: results of several models side by side, as a table and a plot.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Progress bars belong on a terminal. tqdm looks once, when torch imports it.
if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from megatron_sharedproj import distributed
from megatron_sharedproj.command_line import Parser, list_of, positive_int, run_distributed
from megatron_sharedproj.config import write_json

EXAMPLE = """example:
  python tools/evaluate.py perplexity --load runs/k_eq_v --data-path data/slimpajama_validation_text_document
  torchrun --nproc-per-node 2 tools/evaluate.py perplexity ...   (data parallel; or with
      --tensor-model-parallel-size 2)
  python tools/fetch_eval_tasks.py --output eval_tasks
  python tools/evaluate.py lm-eval --load runs/k_eq_v --include-path eval_tasks --num-fewshot 0,5 \\
      --output k_eq_v.json
  python tools/evaluate.py compare qkv.json k_eq_v.json --output compare.png
  python tools/evaluate.py recall --load runs/k_eq_v --output runs/k_eq_v/recall.json
"""


def build_parser() -> argparse.ArgumentParser:
    from megatron_sharedproj.inference.loading import add_loading_args

    parser = Parser(description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    perplexity = commands.add_parser("perplexity", help="perplexity and bits per byte over indexed data")
    add_loading_args(perplexity)
    group = perplexity.add_argument_group("data")
    group.add_argument("--data-path", required=True, metavar="PREFIX", help="indexed data (without .bin)")
    group.add_argument(
        "--protocol",
        choices=("packed", "padded", "both", "rolling"),
        default="packed",
        help="packed: real tokens only (default); padded: the paper's, padding scored; both: these two; "
        "rolling: as lm-eval's perplexity tasks, each document by itself",
    )
    group.add_argument("--seq-length", type=int, default=0, help="tokens per row (default: the run's)")
    group.add_argument("--micro-batch-size", type=int, default=8, help="rows per forward pass")
    group.add_argument("--max-tokens", type=int, default=0, help="use the first N tokens (default: all)")
    group.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    perplexity.set_defaults(run=run_perplexity)
    _add_lm_eval(commands)
    _add_recall(commands)
    compare = commands.add_parser("compare", help="lm-eval results of several models side by side")
    compare.add_argument("results", nargs="+", type=Path, metavar="FILE", help="what lm-eval --output wrote")
    compare.add_argument("--output", type=Path, metavar="PNG", help="also draw the accuracies")
    compare.set_defaults(run=run_compare)
    return parser


def _add_lm_eval(commands: argparse._SubParsersAction[Parser]) -> None:
    from megatron_sharedproj.inference.loading import add_loading_args

    # --load is required elsewhere; here it is one of two, so the flag is given again.
    parser = commands.add_parser(
        "lm-eval",
        help="tasks of lm-eval",
        description="Tasks of lm-eval on a Megatron checkpoint (--load) or an exported directory (--hf).",
        conflict_handler="resolve",
    )
    add_loading_args(parser)
    parser.add_argument("--load", metavar="PATH", help="a --save folder, or one iter_NNNNNNN of it")
    group = parser.add_argument_group("exported directory, instead of a checkpoint")
    group.add_argument("--hf", type=Path, metavar="DIR", help="its Python files are run (trust_remote_code)")
    group.add_argument("--device", help="default: cuda where a GPU is visible, else cpu")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto")
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        metavar="NAME,NAME",
        help="tasks, groups or tags; default: the paper's five (hellaswag, piqa, arc_easy, arc_challenge, "
        "winogrande), from --include-path where it holds a group paper_five",
    )
    group.add_argument(
        "--num-fewshot",
        default="0",
        metavar="N,N",
        help="examples before the question (default 0), a run each",
    )
    group.add_argument("--include-path", type=Path, metavar="DIR", help="folder of further task YAML files")
    group.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task")
    group.add_argument("--batch-size", type=int, default=8, help="rows per forward pass (default 8)")
    group.add_argument("--seed", type=int, default=1234, help="of the choice of examples (default 1234)")
    group.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="write the results: a .json file, or a folder for lm_eval.json",
    )
    group.add_argument(
        "--log-samples", action="store_true", help="also write each document with the model's answers"
    )
    parser.set_defaults(run=run_lm_eval)


def _add_recall(commands: argparse._SubParsersAction[Parser]) -> None:
    from megatron_sharedproj.evaluation.recall import DEFAULT_KEYS, DEFAULT_PAIRS, RecallPlan
    from megatron_sharedproj.inference.loading import add_loading_args

    parser = commands.add_parser(
        "recall",
        help="multi-query associative recall in a model's own words",
        description="Pairs of words, then some keys again: does the model find their values? Perplexity does "
        "not show it.",
        conflict_handler="resolve",
    )
    add_loading_args(parser)
    parser.add_argument("--load", metavar="PATH", help="a --save folder, or one iter_NNNNNNN of it")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--pairs",
        type=list_of(positive_int),
        default=(),
        metavar="N,N",
        help=f"loads: pairs in a prompt (default: those of {','.join(map(str, DEFAULT_PAIRS))} that fit)",
    )
    group.add_argument(
        "--keys",
        type=list_of(positive_int),
        default=(),
        metavar="N,N",
        help="distinct keys, and as many values, that prompts are drawn from (default: those of "
        f"{','.join(map(str, DEFAULT_KEYS))} that the vocabulary has)",
    )
    default = RecallPlan()
    group.add_argument(
        "--sequences",
        type=positive_int,
        default=default.sequences,
        metavar="N",
        help=f"prompts for each load and number of keys (default {default.sequences})",
    )
    group.add_argument(
        "--queries",
        type=positive_int,
        default=default.queries,
        metavar="N",
        help=f"keys that a prompt asks for (default {default.queries})",
    )
    group.add_argument(
        "--pattern", default=default.pattern, help=f"how a pair is written (default {default.pattern!r})"
    )
    group.add_argument(
        "--seq-length",
        type=int,
        default=0,
        help="tokens that a prompt may have (default: the run's; without a run 1024)",
    )
    group.add_argument("--seed", type=int, default=default.seed, help=f"default {default.seed}")
    group.add_argument("--micro-batch-size", type=int, default=32, help="rows per forward pass (default 32)")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")
    group.add_argument(
        "--write-task",
        type=Path,
        metavar="DIR",
        help="write the prompts as tasks for lm-eval (group recall; --include-path DIR); without --load, "
        "with --tokenizer-model, nothing else is done",
    )
    parser.set_defaults(run=run_recall)


def run_perplexity(args: argparse.Namespace) -> None:
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: {args.output.parent} is not a folder")
    from megatron_sharedproj.data.inspection import validate_indexed
    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity
    from megatron_sharedproj.inference.loading import load_model

    for suffix in (".bin", ".idx"):
        if not Path(args.data_path + suffix).is_file():
            raise ValueError(f"--data-path {args.data_path}: {args.data_path}{suffix} does not exist")
    loaded = load_model(args, parallel_output=True)
    validate_indexed(args.data_path, loaded.tokenizer.vocab_size)
    chosen = ("packed", "padded") if args.protocol == "both" else (args.protocol,)
    first = distributed.is_rank_0()
    results = {
        protocol: evaluate_perplexity(
            loaded,
            args.data_path,
            protocol=protocol,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            max_tokens=args.max_tokens,
            show_progress=first and sys.stderr.isatty(),
        )
        for protocol in chosen
    }
    if not first:
        return
    print(f"{loaded.folder}: {loaded.config.model.attention_variant}, {args.data_path}")
    for protocol, r in results.items():
        real = "all real" if r["real_tokens"] == r["tokens"] else f"{r['real_tokens']} real"
        line = f"{protocol}: perplexity {r['perplexity']:.4f}, loss {r['loss']:.6f} nats per token"
        if "bits_per_byte" in r:
            line += f", {r['bits_per_byte']:.4f} bits per byte"
        print(f"{line}, over {r['tokens']} tokens ({real}), {r['tokens_per_second']:.0f} tokens/s")
    print(
        f"unigram entropy of the data: {next(iter(results.values()))['unigram_entropy']:.6f} nats per token"
    )
    if args.output:
        write_json(args.output, {"checkpoint": str(loaded.folder), "data": args.data_path, **results})


def run_recall(args: argparse.Namespace) -> None:
    from megatron_sharedproj.evaluation.recall import RecallPlan, all_prompts, evaluate_recall
    from megatron_sharedproj.evaluation.recall_task import check_folder, write_task

    plan = RecallPlan(args.pairs, args.keys, args.sequences, args.queries, args.pattern, args.seed)
    plan.check()
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: {args.output.parent} is not a folder")
    if args.write_task:
        check_folder(args.write_task)
    if args.load is None:
        if args.write_task is None or args.output:
            raise ValueError("--load: names the model; only --write-task does without, and has no --output")
        from megatron_sharedproj.data.tokenizers import build_tokenizer

        kind = args.tokenizer_type or ("GPT2BPETokenizer" if args.vocab_file else "HuggingFaceTokenizer")
        tokenizer = build_tokenizer(kind, args.tokenizer_model, args.vocab_file, args.merge_file)
        names = write_task(args.write_task, all_prompts(tokenizer, plan, args.seq_length or 1024))
        print(f"{args.write_task}: {', '.join(names)}")
        return
    from megatron_sharedproj.inference.loading import load_model
    from megatron_sharedproj.profiling.tables import Column, write_rows

    loaded = load_model(args, parallel_output=False)
    result = evaluate_recall(loaded, plan, seq_length=args.seq_length, micro_batch_size=args.micro_batch_size)
    if not distributed.is_rank_0():
        return
    variant = loaded.config.model.attention_variant
    print(f"{loaded.folder}: {variant}, {plan.pattern!r}, {result['words']} words of one token")
    columns = [
        Column("keys", "keys"),
        Column("pairs", "pairs"),
        Column("queries", "queries", ","),
        Column("accuracy", "among the values", ".3f"),
        Column("stderr", "stderr", ".3f"),
        Column("chance", "chance", ".3f"),
        Column("argmax_accuracy", "among all tokens", ".3f"),
        Column("margin", "nats over the others", "+.2f"),
        Column("margin_stderr", "stderr", ".2f"),
    ]
    write_rows(result["cells"], columns, argparse.Namespace(format="table", output=None))
    if args.output:
        write_json(args.output, {"checkpoint": str(loaded.folder), "variant": variant, **result})
    if args.write_task:
        prompts = all_prompts(loaded.tokenizer, plan, result["seq_length"])
        print(f"{args.write_task}: {', '.join(write_task(args.write_task, prompts))}")


def run_lm_eval(args: argparse.Namespace) -> None:
    from megatron_sharedproj.evaluation.lm_eval_record import Plan, make_record, output_file, write_record
    from megatron_sharedproj.profiling.attention_results import commit
    from megatron_sharedproj.reporting.lm_eval_table import score_table

    if (args.load is None) == (args.hf is None):
        raise ValueError("--load, --hf: give one of them, a Megatron checkpoint or an exported directory")
    if args.log_samples and not args.output:
        raise ValueError("--log-samples: needs --output, beside which the samples are written")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    file = output_file(args.output) if args.output else None
    try:
        shots = tuple(int(word) for word in args.num_fewshot.split(","))
    except ValueError:
        raise ValueError(f"--num-fewshot {args.num_fewshot}: give whole numbers, as 0 or 0,5") from None
    from megatron_sharedproj.evaluation import lm_eval_run

    lm_eval_run.require_lm_eval()
    from megatron_sharedproj.evaluation.lm_eval_tasks import (
        check_shots,
        default_tasks,
        find_tasks,
        load_tasks,
    )

    names = (
        default_tasks(args.include_path) if args.tasks is None else tuple(filter(None, args.tasks.split(",")))
    )
    plan = Plan(names, shots, args.limit, args.seed, args.include_path, args.log_samples)
    plan.check()
    manager = find_tasks(plan.tasks, plan.include_path)
    check_shots(load_tasks(plan.tasks, manager), shots)  # what is wrong is said before a model is loaded
    if args.hf is not None:
        lm = lm_eval_run.load_exported(args)
        model = lm_eval_run.hugging_face_description(args.hf, lm)
    else:
        lm = lm_eval_run.load_checkpoint(args)
        model = lm_eval_run.megatron_description(lm.loaded, args.tensor_model_parallel_size)
    outcome = lm_eval_run.run(lm, plan, manager)
    if not distributed.is_rank_0():
        return
    print(f"{model['path']}: {model['parameters']:,} parameters, {model['dtype']}")
    print(score_table(outcome.scores))
    if outcome.truncated:
        print(
            f"{outcome.truncated} requests were longer than the model's {lm.max_length} positions: cut on "
            "the left"
        )
    if file:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        record = make_record(
            outcome,
            plan,
            model,
            batch_size=args.batch_size,
            command=command,
            commit=commit(Path(__file__).parent),
        )
        print("written:", *write_record(file, record, outcome))


def run_compare(args: argparse.Namespace) -> None:
    from megatron_sharedproj.reporting.lm_eval_plot import plot_comparison
    from megatron_sharedproj.reporting.lm_eval_table import comparison_table, load_scores

    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: {args.output.parent} is not a folder")
    models = load_scores(args.results)
    if args.output:
        plot_comparison(models, args.output)
    print(comparison_table(models))
    print("p: two-sided, errors taken for independent; * below 0.05; chance: what guessing scores")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 for a mistake in the flags (one line on stderr)."""
    return run_distributed(build_parser(), lambda args: args.run(args), argv)


if __name__ == "__main__":
    sys.exit(main())
