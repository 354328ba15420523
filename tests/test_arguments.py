"""The trainer's command line: names, defaults, derived values, and every refusal before step 0."""

from __future__ import annotations

import argparse

import pytest

from megatron_sharedproj.arguments import add_sharedproj_args, build_parser, model_config, run_config
from megatron_sharedproj.config import RunConfig
from megatron_sharedproj.device import CpuDevice
from megatron_sharedproj.validation import check_device

VOCAB = 50257
REQUIRED = {
    "--num-layers": "2",
    "--hidden-size": "64",
    "--num-attention-heads": "8",
    "--max-position-embeddings": "128",
    "--seq-length": "32",
    "--micro-batch-size": "4",
    "--train-iters": "100",
    "--lr": "1e-3",
}


def parse(flags: str = "", *, without: str = "") -> argparse.Namespace:
    """The required flags, with ``flags`` after them (a repeated flag wins) and ``without`` left out."""
    words = [word for pair in REQUIRED.items() if pair[0] != without for word in pair]
    return build_parser().parse_args(words + flags.split())


def config_of(flags: str = "", *, world_size: int = 1, without: str = "") -> RunConfig:
    return run_config(parse(flags, without=without), VOCAB, world_size)


@pytest.mark.parametrize(
    "flag, default",
    [
        # Megatron-LM's names and defaults
        ("position_embedding_type", "learned_absolute"),
        ("rotary_base", 10000),
        ("rotary_percent", 1.0),
        ("normalization", "LayerNorm"),
        ("norm_epsilon", 1e-5),
        ("attention_dropout", 0.1),
        ("hidden_dropout", 0.1),
        ("init_method_std", 0.02),
        ("untie_embeddings_and_output_weights", False),
        ("group_query_attention", False),
        ("swiglu", False),
        ("disable_bias_linear", False),
        ("make_vocab_size_divisible_by", 128),
        ("tensor_model_parallel_size", 1),
        ("pipeline_model_parallel_size", 1),
        ("context_parallel_size", 1),
        ("num_virtual_stages_per_pipeline_rank", 1),
        ("num_layers_per_virtual_pipeline_stage", None),
        ("sequence_parallel", False),
        ("use_distributed_optimizer", False),
        ("overlap_grad_reduce", False),
        ("overlap_param_gather", False),
        ("distributed_timeout_minutes", 10),
        ("seed", 1234),
        ("eval_interval", 1000),
        ("eval_iters", 100),
        ("bf16", False),
        ("fp16", False),
        ("weight_decay", 0.01),
        ("adam_beta1", 0.9),
        ("adam_beta2", 0.999),
        ("adam_eps", 1e-8),
        ("clip_grad", 1.0),
        ("lr_warmup_fraction", None),
        ("lr_warmup_iters", 0),
        ("data_path", []),
        ("split", "969,30,1"),
        ("num_workers", 2),
        ("log_interval", 100),
        ("ckpt_format", "torch_dist"),
        # ours
        ("attention_variant", "qkv"),
        ("no_scaled_init", False),
        ("weight_decay_on_all", False),
        ("require_kernel", False),
    ],
)
def test_default(flag: str, default: object) -> None:
    value = getattr(build_parser().parse_args([]), flag)
    assert value == default
    assert type(value) is type(default)


def test_required_flags_are_enough() -> None:
    config = config_of()
    assert config.model.num_query_groups == config.model.num_attention_heads == 8
    assert (config.model.kv_channels, config.model.ffn_hidden_size) == (8, 256)
    assert config.model.padded_vocab_size == 50304
    assert config.train.global_batch_size == 4
    assert config.train.lr_decay_iters == 100


def test_given_values_reach_the_configuration() -> None:
    config = config_of(
        "--kv-channels 16 --ffn-hidden-size 96 --normalization RMSNorm --norm-epsilon 1e-6 --qk-layernorm "
        "--disable-bias-linear --no-scaled-init --weight-decay-on-all --data-path 0.3 a 0.7 b --save out "
        "--save-interval 5 --log-interval 2 --lr-decay-iters 80 --global-batch-size 12 --adam-beta2 0.95"
    )
    model = config.model
    assert (model.kv_channels, model.ffn_hidden_size, model.layernorm_epsilon) == (16, 96, 1e-6)
    assert (model.normalization, model.qk_layernorm) == ("RMSNorm", True)
    assert (model.add_bias_linear, model.scaled_init) == (False, False)
    assert config.train.weight_decay_on_all
    assert (config.train.lr_decay_iters, config.train.global_batch_size) == (80, 12)
    assert config.train.adam_beta2 == 0.95
    assert config.data.data_path == ["0.3", "a", "0.7", "b"]
    assert (config.checkpoint.save, config.checkpoint.save_interval, config.log.log_interval) == ("out", 5, 2)


@pytest.mark.parametrize("spelling", ["qk_eq_v", "Q-K=V", "K=V", "k=v"])
def test_variant_aliases(spelling: str) -> None:
    assert config_of(f"--attention-variant {spelling}").model.attention_variant == "qk_eq_v"


@pytest.mark.parametrize("hidden, ffn", [(64, 128), (1024, 2688), (2048, 5440), (16, 64)])
def test_swiglu_width_is_megatrons_rule(hidden: int, ffn: int) -> None:
    # 4 d * 2/3, rounded down to 64.
    assert config_of(f"--swiglu --hidden-size {hidden}").model.ffn_hidden_size == ffn
    assert config_of(f"--swiglu --hidden-size {hidden} --ffn-hidden-size 320").model.ffn_hidden_size == 320


@pytest.mark.parametrize(
    "flags, activation",
    [
        ("", "gelu_tanh"),
        ("--no-bias-gelu-fusion", "gelu"),
        ("--swiglu", "swiglu"),
        ("--swiglu --no-bias-gelu-fusion", "swiglu"),
    ],
)
def test_activation(flags: str, activation: str) -> None:
    assert config_of(flags).model.activation == activation


@pytest.mark.parametrize(
    "flags, groups",
    [
        ("", 8),
        ("--group-query-attention", 1),
        ("--group-query-attention", 1),
        ("--group-query-attention --num-query-groups 2", 2),
        ("--group-query-attention --num-query-groups 4 --attention-variant qk_eq_v", 4),
    ],
)
def test_groups(flags: str, groups: int) -> None:
    assert config_of(flags).model.num_query_groups == groups


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("", 0),
        ("--lr-warmup-iters 7", 7),
        ("--lr-warmup-fraction 0.1", 10),
        ("--lr-warmup-fraction 0.1 --lr-decay-iters 50", 5),
        ("--lr-warmup-fraction 0.019", 1),
        ("--lr-warmup-fraction 0", 0),
    ],
)
def test_warm_up(flags: str, steps: int) -> None:
    assert config_of(flags).train.lr_warmup_iters == steps


@pytest.mark.parametrize("tp, batch", [(1, 16), (2, 8), (4, 4)])
def test_default_global_batch_is_one_micro_batch_per_replica(tp: int, batch: int) -> None:
    config = config_of(f"--tensor-model-parallel-size {tp}", world_size=4)
    assert config.train.global_batch_size == batch


@pytest.mark.parametrize("divisor, padded", [(128, 50304), (1, 50257), (1000, 51000)])
def test_padded_vocabulary_does_not_depend_on_the_ranks(divisor: int, padded: int) -> None:
    flags = f"--make-vocab-size-divisible-by {divisor}"
    assert model_config(parse(flags), VOCAB).padded_vocab_size == padded
    assert config_of(flags, world_size=2).model.padded_vocab_size == padded


def test_flags_that_name_what_is_always_so_are_accepted() -> None:
    flags = (
        "--use-mcore-models --use-cpu-initialization --no-gradient-accumulation-fusion --no-rope-fusion "
        "--no-masked-softmax-fusion --no-persist-layer-norm --no-create-attention-mask-in-dataloader "
        "--ckpt-format torch_dist"
    )
    assert config_of(flags) == config_of()


def test_our_flags_can_be_added_to_another_parser() -> None:
    parser = argparse.ArgumentParser()
    assert add_sharedproj_args(parser) is parser
    added = vars(parser.parse_args(["--attention-variant", "K=V"]))
    assert added == {
        "attention_variant": "K=V",
        "no_scaled_init": False,
        "weight_decay_on_all": False,
        "match_parameters_of": "",
        "require_kernel": False,
    }


def test_parameters_are_matched_before_step_0() -> None:
    flags = "--attention-variant qk_eq_v --match-parameters-of qkv"
    config = config_of(flags)
    assert (config.model.ffn_hidden_size, config.train.width_before_match) == (288, 256)
    assert config_of(flags + " --ffn-hidden-size 128").train.width_before_match == 128
    with pytest.raises(ValueError, match="--match-parameters-of q_k: "):
        config_of("--match-parameters-of q_k")


def test_help_has_groups_and_examples() -> None:
    text = build_parser().format_help()
    for title in (
        "shared projections", "network size", "regularization and initialization", "parallelism", "training",
        "optimizer and schedule", "data and tokenizer", "checkpoints", "logging",
    ):  # fmt: skip
        assert f"\n{title}:\n" in text
    example = text[text.index("examples:") :]
    assert "torchrun --nproc-per-node 1 -m megatron_sharedproj.pretrain" in example
    assert "--attention-variant qk_eq_v" in example
    assert "--group-query-attention --num-query-groups 1" in example
    assert "{qkv,q_eq_k,qk_eq_v,q_eq_k_eq_v}" in text


def test_the_example_of_the_help_is_valid() -> None:
    text = build_parser().format_help()
    start = text.index("megatron_sharedproj.pretrain", text.index("one process, K=V"))
    command = text[start : text.index("shared heads too")].replace("\\\n", " ").split()[1:]
    config = run_config(build_parser().parse_args(command), VOCAB, 1)
    assert config.model.attention_variant == "qk_eq_v"
    assert config.train.global_batch_size == 32


@pytest.mark.parametrize("flags", ["--num-layer 3", "--no-such-flag", "--num-layers two", "--ckpt-format x"])
def test_what_the_parser_does_not_know_is_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings"]
)
def test_model_flags_are_required(flag: str) -> None:
    with pytest.raises(ValueError) as error:
        config_of(without=flag)
    assert str(error.value) == f"{flag}: required"


@pytest.mark.parametrize("flag", ["--seq-length", "--train-iters", "--lr"])
def test_training_flags_are_required(flag: str) -> None:
    with pytest.raises(ValueError, match=rf"^{flag} 0(\.0)?: must be given and positive$"):
        config_of(without=flag)


GQA = "--group-query-attention --num-query-groups"
TP = "--tensor-model-parallel-size"
PP = "--pipeline-model-parallel-size"
CP = "--context-parallel-size"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
PER_CHUNK = "--num-layers-per-virtual-pipeline-stage"
DEEP = f"--num-layers 8 {PP} 2"
RECOMPUTE = "--recompute-"
REFUSALS = [
    # arguments.py
    ("--num-query-groups 2", 1, ["--num-query-groups 2", "needs --group-query-attention"]),
    ("--grad-reduce-in-bf16", 1, ["--grad-reduce-in-bf16", "needs --bf16"]),
    ("--micro-batch-size 0 --train-samples 100", 1, ["--micro-batch-size 0", "at least 1"]),
    (f"{GQA} 0", 1, ["--num-query-groups 0", "at least 1"]),
    (
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
        1,
        ["--lr-warmup-fraction 0.1", "--lr-warmup-iters 5", "give one"],
    ),
    # config.py, through the flags
    ("--attention-variant Q=V", 1, ["--attention-variant Q=V", "choose one of qkv, q_eq_k, qk_eq_v"]),
    (f"{GQA} 3", 1, ["--num-query-groups 3", "must divide --num-attention-heads 8"]),
    (f"{GQA} 2 --attention-variant q_eq_k", 1, ["--num-query-groups 2", "q_eq_k", "drop --group-query"]),
    ("--hidden-size 60", 1, ["--hidden-size 60", "--num-attention-heads 8", "give --kv-channels"]),
    (
        "--position-embedding-type rope --attention-variant K=V",
        1,
        ["--position-embedding-type rope", "qk_eq_v", "--kv-rotary", "use learned_absolute"],
    ),
    ("--kv-rotary rotate_values --attention-variant K=V", 1, ["--kv-rotary rotate_values", "rope"]),
    ("--normalization none", 1, ["--normalization none", "LayerNorm, RMSNorm"]),
    ("--hidden-dropout 1", 1, ["--hidden-dropout 1.0", "[0, 1)"]),
    # validation.check_parallel
    (f"{TP} 3", 4, [f"{TP} 3", "number of processes, 4", "use one of [1, 2, 4]", "multiple of 3"]),
    (f"{TP} 0", 4, [f"{TP} 0", "use one of [1, 2, 4]"]),
    (f"{TP} 16", 16, [f"{TP} 16", "must divide --num-attention-heads 8"]),
    (
        f"{TP} 4 --num-attention-heads 12 --hidden-size 96 {GQA} 6",
        4,
        [f"{TP} 4", "must divide --num-query-groups 6", "or be a multiple"],
    ),
    (f"{TP} 4 --ffn-hidden-size 102", 4, [f"{TP} 4", "must divide --ffn-hidden-size, 102"]),
    (
        f"{TP} 2 --make-vocab-size-divisible-by 1",
        2,
        [f"{TP} 2", "padded vocabulary", "--make-vocab-size-divisible-by", "50257"],
    ),
    (f"{TP} 4 {GQA} 1 --kv-channels 3 --attention-variant K=V", 4, [f"{TP} 4", "projected rows", "27"]),
    ("--sequence-parallel", 1, ["--sequence-parallel", f"needs {TP} of at least 2"]),
    ("--transformer-impl torch", 1, ["--transformer-impl torch", "choose local or transformer_engine"]),
    ("--distributed-backend mpi", 1, ["--distributed-backend mpi", "choose nccl or gloo"]),
    ("--overlap-param-gather", 1, ["--overlap-param-gather", "needs --use-distributed-optimizer"]),
    # layout.py
    (f"{PP} 3", 3, [f"{PP} 3", "must divide --num-layers 2", "use one of [1, 2]"]),
    (f"{PP} 0", 2, [f"{PP} 0", "use one of [1, 2]"]),
    (f"{PP} 2", 3, [f"{PP} 2 x {TP} 1 x {CP} 1: is 2", "processes, 3", "multiple of 2"]),
    (f"{PP} 2 {TP} 2", 6, [f"{PP} 2 x {TP} 2 x {CP} 1: is 4", "processes, 6", "multiple of 4"]),
    (f"{CP} 2 {TP} 2", 6, [f"{PP} 1 x {TP} 2 x {CP} 2: is 4", "processes, 6"]),
    (f"{CP} 0", 1, [f"{CP} 0", "must be at least 1"]),
    (
        f"{CP} 2 --seq-length 30",
        2,
        ["--seq-length 30", f"divisible by 4, two chunks for each rank of {CP} 2"],
    ),
    (
        f"{CP} 2 {TP} 4 --sequence-parallel --seq-length 36",
        8,
        ["--seq-length 36", f"divisible by 4 x 2 ({CP} 2) with --sequence-parallel"],
    ),
    (f"{CP} 2 --reset-attention-mask", 2, [f"{CP} 2", "not with --reset-attention-mask", "use 1, or drop"]),
    (f"{CHUNKS} 2", 1, [f"{CHUNKS} 2", f"needs {PP} of at least 2"]),
    (f"{CHUNKS} 2 {PP} 2", 2, [f"{CHUNKS} 2", "must divide the 1 layers of a pipeline stage", "[1]"]),
    (f"{CHUNKS} 0 {PP} 2", 2, [f"{CHUNKS} 0", "must divide the 1 layers"]),
    (f"{DEEP} {PER_CHUNK} 3", 2, [f"{PER_CHUNK} 3", "the 4 layers of a pipeline stage", "[1, 2, 4]"]),
    (f"{DEEP} {PER_CHUNK} 0", 2, [f"{PER_CHUNK} 0", "the 4 layers of a pipeline stage"]),
    (f"{DEEP} {PER_CHUNK} 1 {CHUNKS} 4", 2, [f"{PER_CHUNK} 1", f"{CHUNKS} is given too", "give one"]),
    (
        f"{DEEP} {CHUNKS} 2 --global-batch-size 12",
        2,
        [f"{CHUNKS} 2", f"multiple of {PP} 2 micro batches per step, not 3", "change --global-batch-size"],
    ),
    (f"{RECOMPUTE}granularity some", 1, [f"{RECOMPUTE}granularity some", "choose selective or full"]),
    (
        f"--recompute-activations {RECOMPUTE}granularity full",
        1,
        ["--recompute-activations", f"{RECOMPUTE}granularity selective", "full is given too"],
    ),
    (f"{RECOMPUTE}method block", 1, [f"{RECOMPUTE}method block", f"needs {RECOMPUTE}granularity full"]),
    (
        f"--recompute-activations {RECOMPUTE}num-layers 1",
        1,
        [f"{RECOMPUTE}num-layers 1", f"needs {RECOMPUTE}granularity full"],
    ),
    (
        f"{RECOMPUTE}granularity full {RECOMPUTE}method all",
        1,
        [f"{RECOMPUTE}method all", "choose uniform or block"],
    ),
    (
        f"{DEEP} {CHUNKS} 2 {RECOMPUTE}granularity full {RECOMPUTE}num-layers 3 --global-batch-size 8",
        2,
        [f"{RECOMPUTE}num-layers 3", "from 1 to the 2 layers of a model chunk"],
    ),
    (
        f"{DEEP} {RECOMPUTE}granularity full {RECOMPUTE}num-layers 3",
        2,
        [f"{RECOMPUTE}num-layers 3", "must divide the 4 layers of a model chunk", "[1, 2, 4], or block"],
    ),
    # validation.check_train
    ("--seq-length -1", 1, ["--seq-length -1", "must be given and positive"]),
    ("--micro-batch-size 0", 1, ["--micro-batch-size 0", "at least 1"]),
    ("--train-iters 0", 1, ["--train-iters 0", "must be given and positive"]),
    ("--lr -0.5", 1, ["--lr -0.5", "must be given and positive"]),
    ("--log-interval 0", 1, ["--log-interval 0", "at least 1"]),
    ("--save-interval 0", 1, ["--save-interval 0", "at least 1"]),
    ("--eval-interval 0", 1, ["--eval-interval 0", "at least 1", "--eval-iters 0"]),
    (
        "--global-batch-size 13",
        2,
        ["--global-batch-size 13", "--micro-batch-size 4 x 2 data-parallel", "try 16"],
    ),
    ("--global-batch-size 2", 1, ["--global-batch-size 2", "--micro-batch-size 4 x 1", "try 4"]),
    ("--seq-length 256", 1, ["--seq-length 256", "--max-position-embeddings 128"]),
    (f"--sequence-parallel {TP} 2 --seq-length 31", 2, ["--seq-length 31", "divisible by 2"]),
    ("--min-lr 0.01", 1, ["--min-lr 0.01", "above --lr 0.001"]),
    ("--lr-warmup-iters 100", 1, ["--lr-warmup-iters 100", "below the 100 decay steps", "--train-iters"]),
    ("--lr-warmup-iters 30 --lr-decay-iters 20", 1, ["--lr-warmup-iters 30", "below the 20 decay steps"]),
    ("--lr-decay-style step", 1, ["--lr-decay-style step", "constant, linear, cosine, inverse-square-root"]),
    ("--bf16 --fp16", 1, ["--bf16", "--fp16", "give one"]),
]


@pytest.mark.parametrize("flags, world_size, expected", REFUSALS, ids=[flags for flags, *_ in REFUSALS])
def test_refusals(flags: str, world_size: int, expected: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        config_of(flags, world_size=world_size)
    message = str(error.value)
    assert message.startswith(expected[0])
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "flags, world_size",
    [
        (f"{TP} 4 {GQA} 2", 4),  # more ranks than groups, but a multiple
        (f"{TP} 2 {GQA} 1 --attention-variant K=V", 2),
        (f"{TP} 2 --sequence-parallel", 4),
        ("--use-distributed-optimizer --overlap-param-gather", 1),
        ("--global-batch-size 24", 2),
        ("--lr-warmup-iters 99 --min-lr 1e-3", 1),
    ],
)
def test_neighbours_of_the_refusals_are_accepted(flags: str, world_size: int) -> None:
    config_of(flags, world_size=world_size)


@pytest.mark.parametrize(
    "flag",
    [
        "--fp16",
        "--cross-entropy-loss-fusion",
        "--transformer-impl transformer_engine",
        "--distributed-backend nccl",
    ],
)
def test_cpu_refuses_what_needs_a_gpu(flag: str) -> None:
    with pytest.raises(ValueError) as error:
        check_device(config_of(flag), CpuDevice(), 1)
    message = str(error.value)
    assert message.startswith(f"{flag}: needs a GPU")
    assert ("use --bf16" if flag == "--fp16" else "drop it to use the CPU") in message


@pytest.mark.parametrize("flags", ["--bf16 --grad-reduce-in-bf16", "--use-distributed-optimizer"])
def test_cpu_takes_bf16_and_the_distributed_optimizer(flags: str) -> None:
    check_device(config_of(flags), CpuDevice(), 1)


def test_memory_line_and_refusal() -> None:
    line = check_device(config_of(), CpuDevice(), 1)
    assert line.startswith("memory per process: about 0.") and line.endswith(" GiB there")
    with pytest.raises(ValueError) as error:
        check_device(config_of("--micro-batch-size 100000000"), CpuDevice(), 1)
    message = str(error.value)
    assert message.startswith("--micro-batch-size 100000000: memory per process: about ")
    assert "lower it, or --seq-length, --num-layers or --hidden-size, or raise --tensor-model" in message


def test_sample_counts_set_the_iterations() -> None:
    config = config_of(
        "--global-batch-size 8 --train-samples 803 --lr-decay-samples 400 --lr-warmup-samples 81",
        without="--train-iters",
    )
    train = config.train
    assert (train.train_iters, train.lr_decay_iters, train.lr_warmup_iters) == (100, 50, 10)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--train-samples 100", "--train-samples 100: --train-iters is given too"),
        (
            "--lr-warmup-iters 2 --lr-warmup-samples 8",
            "--lr-warmup-samples 8: --lr-warmup-iters is given too",
        ),
        (
            "--global-batch-size 8 --lr-decay-samples 4",
            "--lr-decay-samples 4: less than one --global-batch-size",
        ),
    ],
)
def test_sample_counts_are_checked(flags: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        config_of(flags)


def test_flags_of_megatron_examples_are_known() -> None:
    """Names of Megatron-LM's gpt3 and llama examples that this trainer has or always does."""
    words = """
    --use-mcore-models --no-create-attention-mask-in-dataloader --calculate-per-token-loss
    --ckpt-format torch_dist --transformer-impl local --distributed-timeout-minutes 5 --no-mmap-bin-files
    --log-throughput --overlap-grad-reduce --distributed-backend gloo --exit-signal-handler
    --override-opt_param-scheduler
    """
    config_of(" ".join(words.split()))


def test_both_spellings_of_interleaving_and_of_recompute_agree() -> None:
    batch = "--global-batch-size 8"
    chunks = config_of(f"{DEEP} {CHUNKS} 2 {batch}", world_size=2)
    assert chunks == config_of(f"{DEEP} {PER_CHUNK} 2 {batch}", world_size=2)
    assert chunks.parallel.num_virtual_stages_per_pipeline_rank == 2
    # One chunk per stage is the plain schedule.
    assert config_of(f"{DEEP} {PER_CHUNK} 4", world_size=2) == config_of(DEEP, world_size=2)
    selective = config_of("--recompute-activations")
    assert selective == config_of(f"{RECOMPUTE}granularity selective")
    full = config_of(f"{RECOMPUTE}granularity full").parallel
    assert (full.recompute_method, full.recompute_num_layers) == ("uniform", 1)
    assert config_of(f"{RECOMPUTE}granularity full {RECOMPUTE}method uniform").parallel == full
