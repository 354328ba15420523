"""lm-eval on a Megatron checkpoint gives the numbers of lm-eval's own model on the export of it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_models import (
    MODELS,
    POSITIONS,
    QUESTIONS,
    TEXTS,
    export,
    make_model,
    make_tokenizer,
    quiet,
    save,
    write_tasks,
)

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("parallel_state")
TASKS = ("tiny", "tiny_rolling", "tiny_generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    folder = tmp_path_factory.mktemp("lm_eval")
    make_tokenizer(folder / "tokenizer")
    write_tasks(folder / "tasks")
    return folder


def direct(loaded: Any, **options: Any) -> Any:
    from megatron_sharedproj.evaluation.lm_eval_model import MegatronSharedProjLM

    return MegatronSharedProjLM(loaded, **options)


def exported(directory: Path) -> Any:
    """lm-eval's own model on an exported directory, as the sub-command makes it."""
    from megatron_sharedproj.evaluation.lm_eval_run import load_exported

    unset = dict.fromkeys(("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "bf16"))
    return load_exported(
        argparse.Namespace(hf=directory, device="cpu", dtype="float32", batch_size=5, **unset)
    )


def measure(lm: Any, folder: Path, tasks: tuple[str, ...] = TASKS, shots: tuple[int, ...] = (0,)) -> Any:
    from megatron_sharedproj.evaluation.lm_eval_record import Plan
    from megatron_sharedproj.evaluation.lm_eval_run import run
    from megatron_sharedproj.evaluation.lm_eval_tasks import find_tasks

    plan = Plan(tasks, shots, include_path=folder / "tasks", log_samples=True)
    plan.check()
    return run(lm, plan, find_tasks(plan.tasks, plan.include_path))


def answers(outcome: Any, task: str) -> list[Any]:
    """What the model said to each request of a task, documents in order."""
    samples = sorted(outcome.samples[task], key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["resps"]]


def values(outcome: Any) -> dict[Any, float]:
    return {(score.task, score.shots, score.metric): score.value for score in outcome.scores}


def score(lm: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance

    return lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])


def ask(lm: Any, method: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return getattr(lm, method)([Instance(method, {}, pair, 0) for pair in arguments])


@torch.no_grad()
def nats(loaded: Any, tokens: list[int], scored: int) -> float:
    """Log-probability of the last ``scored`` tokens of a window, one token at a time."""
    row = torch.tensor([tokens[:-1]])
    logits = loaded.model(row, torch.arange(row.shape[1])[None], None)[0, :, : loaded.tokenizer.vocab_size]
    log_probs = logits.double().log_softmax(-1)
    places = range(len(tokens) - 1 - scored, len(tokens) - 1)
    return sum(float(log_probs[place, tokens[place + 1]]) for place in places)


@pytest.mark.parametrize("name", MODELS)
def test_direct_and_exported_agree(folder: Path, name: str) -> None:
    loaded = make_model(name, folder / "tokenizer")
    lm = direct(loaded, batch_size=7)
    mine = measure(lm, folder, shots=(0, 2))
    theirs = measure(exported(export(loaded, folder / name)), folder, shots=(0, 2))
    assert mine.truncated == theirs.truncated > 0  # the examples do not fit: cut alike
    for task in ("tiny_choice", "tiny_letters"):
        for shots in ("_0shot", "_2shot"):
            ours, others = answers(mine, task + shots), answers(theirs, task + shots)
            assert len(ours) == (42 if task == "tiny_choice" else 48)
            assert len({round(value, 3) for value, _ in ours}) > len(ours) / 2  # no two answers are alike
            for (value, greedy), (other, other_greedy) in zip(ours, others, strict=True):
                assert value == pytest.approx(other, abs=1e-4)
                assert greedy == other_greedy
    for ours, other in zip(
        answers(mine, "tiny_rolling_0shot"), answers(theirs, "tiny_rolling_0shot"), strict=True
    ):
        assert ours == pytest.approx(other, rel=1e-6)
    texts = answers(mine, "tiny_generate_0shot")
    assert texts == answers(theirs, "tiny_generate_0shot")
    assert len(set(texts)) > 3 and not any("e" in text for text in texts)
    assert values(mine).keys() == values(theirs).keys()
    for key, value in values(mine).items():
        assert value == pytest.approx(values(theirs)[key], rel=1e-5, abs=1e-5)


def test_the_comparison_sees_a_difference(folder: Path) -> None:
    """One weight of the checkpoint changed after the export: the numbers part."""
    loaded = make_model("qk_eq_v", folder / "tokenizer")
    hf = exported(export(loaded, folder / "changed"))
    pair = ("Question: the sea", " is calm")
    assert score(direct(loaded), pair)[0][0] == pytest.approx(score(hf, pair)[0][0], abs=1e-4)
    with torch.no_grad():
        loaded.model.decoder.layers[0].self_attention.linear_proj.weight[0, 0] += 0.5
    assert abs(score(direct(loaded), pair)[0][0] - score(hf, pair)[0][0]) > 1e-3


def test_loglikelihood_by_hand(folder: Path) -> None:
    loaded = make_model("qk_eq_v", folder / "tokenizer")
    tokenizer = loaded.tokenizer
    pairs = [("The sea", " is calm"), ("", "The sea"), (TEXTS[0] * 4, " tonight"), ("The sea", " is")]
    found = score(direct(loaded, batch_size=3), *pairs)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        count = len(whole) - len(tokenizer.encode(context))
        window = [tokenizer.eod, *whole] if not context else whole
        assert value == pytest.approx(nats(loaded, window[-(POSITIONS + 1) :], count), abs=1e-4)
    assert len(tokenizer.encode(pairs[2][0])) > POSITIONS


@torch.no_grad()
def test_greedy_is_told(folder: Path) -> None:
    loaded = make_model("qkv", folder / "tokenizer")
    ids = loaded.tokenizer.encode("The sea")
    said: list[int] = []
    for _ in range(4):
        row = torch.tensor([[*ids, *said]])
        logits = loaded.model(row, torch.arange(row.shape[1])[None], None)[0, -1]
        assert logits.argmax() >= loaded.tokenizer.vocab_size  # padding, which must not be the judge
        said.append(int(logits[: loaded.tokenizer.vocab_size].argmax()))
    other = [*said[:-1], (said[-1] + 1) % 256]
    requests = [(None, ids, said), (None, ids, other), (None, [*ids, *other], other)]
    found = direct(loaded)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found][:2] == [True, False]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_does_not_matter(folder: Path, batch_size: int) -> None:
    loaded = make_model("q_eq_k_eq_v", folder / "tokenizer")
    base = measure(direct(loaded, batch_size=6), folder)
    other = measure(direct(loaded, batch_size=batch_size), folder)
    assert answers(other, "tiny_generate_0shot") == answers(base, "tiny_generate_0shot")
    for one, two in zip(answers(base, "tiny_choice_0shot"), answers(other, "tiny_choice_0shot"), strict=True):
        assert one[0] == pytest.approx(two[0], abs=1e-4)


def test_special_tokens_in_text_are_parsed_as_lm_eval_does(folder: Path) -> None:
    loaded = make_model("qk_eq_v", folder / "tokenizer")
    eod = loaded.tokenizer.decode([loaded.tokenizer.eod])
    hf = exported(export(loaded, folder / "special"))
    for text in (f"a{eod}b", eod, "plain caf\u00e9\n\n  text"):
        assert direct(loaded).tok_encode(text) == hf.tok_encode(text)
    assert loaded.tokenizer.eod in direct(loaded).tok_encode(f"a{eod}b")
    assert direct(loaded).prefix_token_id == hf.prefix_token_id == loaded.tokenizer.eod


@pytest.mark.parametrize("length", [1, POSITIONS - 1, POSITIONS, POSITIONS + 1, 2 * POSITIONS, 250])
def test_rolling_by_hand(folder: Path, length: int) -> None:
    """Whole windows follow one token; the last one is filled up on its left."""
    loaded = make_model("qk_eq_v", folder / "tokenizer")
    tokens = torch.randint(256, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    stream = [loaded.tokenizer.eod, *tokens]
    expected = 0.0
    for start in range(0, length, POSITIONS):
        end = min(start + POSITIONS, length)
        expected += nats(loaded, stream[max(end - POSITIONS, 0) : end + 1], end - start)
    lm = direct(loaded)
    lm.tok_encode = lambda _: tokens
    assert ask(lm, "loglikelihood_rolling", ("text",)) == [pytest.approx(expected, rel=1e-5)]


def test_generation_settings(folder: Path) -> None:
    lm = direct(make_model("qk_eq_v", folder / "tokenizer"))
    (plain,) = ask(lm, "generate_until", ("The sea", {"max_gen_toks": 20}))
    stop = plain[len(plain) // 2]
    (stopped,) = ask(lm, "generate_until", ("The sea", {"max_gen_toks": 20, "until": [stop]}))
    assert stopped == plain.split(stop)[0] != plain
    sampled = {"max_gen_toks": 20, "do_sample": True, "temperature": 5.0}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts += ask(lm, "generate_until", ("The sea", sampled))
    assert texts[0] == texts[1] != texts[2] and plain not in texts
    long = TEXTS[0] * 4
    assert len(ask(lm, "generate_until", (long, {"max_gen_toks": 20}), ("", {"max_gen_toks": 2}))) == 2
    assert lm.truncated == 1
    with pytest.raises(ValueError, match="--tasks: 96 new tokens leave no room for a prompt"):
        ask(lm, "generate_until", ("The sea", {"max_gen_toks": POSITIONS}))
    with pytest.raises(ValueError, match="--tasks: generation_kwargs num_beams of a task: not supported"):
        ask(lm, "generate_until", ("The sea", {"num_beams": 3}))


def test_sampling_is_that_of_transformers() -> None:
    """What its generate() does where a task names no top_k."""
    from transformers import GenerationConfig

    from megatron_sharedproj.evaluation.lm_eval_model import _generation_settings

    default = GenerationConfig._get_default_generation_params()
    settings = _generation_settings({"do_sample": True, "temperature": 0.7}, "</s>")
    assert (settings.sampling.top_k, settings.sampling.top_p) == (default["top_k"], default["top_p"])
    assert settings.sampling.temperature == 0.7 and settings.max_new_tokens == 256
    assert _generation_settings({"do_sample": True, "temperature": 1, "top_k": 0}, "").sampling.top_k == 0
    assert _generation_settings({"temperature": 0.7, "do_sample": False}, "").sampling.temperature == 0.0


@pytest.mark.parametrize("which", ["direct", "exported"])
def test_answers_that_do_not_fit_are_refused(folder: Path, which: str) -> None:
    loaded = make_model("qk_eq_v", folder / "tokenizer")
    lm = direct(loaded) if which == "direct" else exported(export(loaded, folder / "refusing"))
    with pytest.raises(ValueError, match="--tasks: 96 new tokens leave no room for a prompt"):
        ask(lm, "generate_until", ("The sea", {"max_gen_toks": POSITIONS}))
    with pytest.raises(
        ValueError, match=r"an answer of \d+ tokens does not fit into the model's 96 positions"
    ):
        score(lm, ("The sea", TEXTS[0] * 5))
    with pytest.raises(ValueError, match="an empty answer has no likelihood"):
        score(lm, ("The sea", ""))


def test_registered_and_made_from_arguments(folder: Path) -> None:
    from lm_eval.api.registry import get_model

    from megatron_sharedproj.evaluation.lm_eval_model import MegatronSharedProjLM

    loaded = make_model("qkv", folder / "tokenizer")
    checkpoint = save(loaded, folder / "checkpoint")
    assert get_model("megatron_sharedproj") is MegatronSharedProjLM
    arguments = f"load={checkpoint},tokenizer_model={folder / 'tokenizer'}"
    lm = MegatronSharedProjLM.create_from_arg_string(arguments, {"batch_size": "3", "device": "cpu"})
    assert lm.batch_size == 3 and lm.max_length == POSITIONS
    pair = ("The sea", " is calm")
    assert score(lm, pair)[0][0] == pytest.approx(score(direct(loaded), pair)[0][0], abs=1e-5)
    assert lm.get_model_info()["model_config"]["attention_variant"] == "qkv"
    for wrong in ("0", "many", "-1"):
        with pytest.raises(ValueError, match=f"--batch-size {wrong}: must be a whole number"):
            direct(loaded, batch_size=wrong)
    with pytest.raises(ValueError, match="--max-length 97: must be from 1 to the model's 96 positions"):
        direct(loaded, max_length=97)


def test_chance_is_counted_from_the_documents(folder: Path) -> None:
    outcome = measure(direct(make_model("qk_eq_v", folder / "tokenizer")), folder)
    chance = {(score.task, score.metric): score.chance for score in outcome.scores}
    counted = sum(1 / len(question["choices"]) for question in QUESTIONS) / len(QUESTIONS)
    assert chance["tiny_choice", "acc"] == chance["tiny_choice", "acc_norm"] == pytest.approx(counted)
    assert chance["tiny_letters", "acc"] == 0.25
    assert chance["tiny", "acc"] == pytest.approx((counted + 0.25) / 2)
    assert chance["tiny_rolling", "bits_per_byte"] is chance["tiny_generate", "exact_match"] is None
    assert {score.documents for score in outcome.scores if score.task == "tiny_choice"} == {12}


def test_chance_where_several_answers_are_right(folder: Path) -> None:
    from megatron_sharedproj.evaluation.lm_eval_tasks import chance_level, find_tasks, load_tasks

    (task,) = load_tasks(["tiny_several"], find_tasks(["tiny_several"], folder / "tasks"))["tasks"].values()
    shares = [len({0, question["label"]}) / len(question["choices"]) for question in QUESTIONS]
    assert chance_level(task, None) == pytest.approx(sum(shares) / len(shares))
    task.config.process_results = lambda doc, results: {"acc": 0.0}  # may score anything
    assert chance_level(task, None) is None


def test_tasks_that_are_asked_without_examples(folder: Path) -> None:
    """As in lm-eval, whose --num_fewshot they do not follow either."""
    from megatron_sharedproj.evaluation.lm_eval_tasks import check_shots, find_tasks, load_tasks

    names = ["tiny", "tiny_unasked"]
    loaded = load_tasks(names, find_tasks(names, folder / "tasks"))
    check_shots(loaded, (0,))
    with pytest.raises(ValueError, match="--num-fewshot 5: tiny_unasked is asked without examples"):
        check_shots(loaded, (0, 5))


def test_seeded_as_plain_lm_eval(folder: Path) -> None:
    """Shuffled choices and examples come in the order that lm-eval gives them by default."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm = direct(make_model("qk_eq_v", folder / "tokenizer"))
    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    plain = simple_evaluate(lm, tasks=["tiny_shuffled"], num_fewshot=1, task_manager=manager)
    ours = measure(lm, folder, ("tiny_shuffled",), (0, 1))
    found = [
        [sample["arguments"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for samples in (plain["samples"]["tiny_shuffled"], ours.samples["tiny_shuffled_1shot"])
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("model_type", ["sharedproj", "gpt2"])
def test_every_format_of_ours_starts_with_the_end_of_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The others, from elsewhere, as lm-eval has it."""
    import json

    from megatron_sharedproj.evaluation import lm_eval_exported

    monkeypatch.setattr(lm_eval_exported, "ExportedLM", lambda **options: options)
    config = {"model_type": model_type, "bos_token_id": 4, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if model_type != "sharedproj":
        assert "prefix_token_id" not in exported(tmp_path)
    (tmp_path / "conversion.json").write_text("{}")
    options = exported(tmp_path)
    assert (options["prefix_token_id"], options["add_bos_token"]) == (5, False)
    assert options["softmax_dtype"] == "float32"


def test_records_hold_no_addresses() -> None:
    import json

    from megatron_sharedproj.evaluation.lm_eval_record import as_json

    assert json.dumps([nats, torch.tensor(2)], default=as_json) == f'["{__name__}.nats", 2]'


def write_data(folder: Path, documents: list[list[int]], vocab_size: int) -> str:
    import numpy as np

    from megatron_sharedproj.data.indexed import IndexedWriter

    prefix = folder / "data_text_document"
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)], dtype=np.int32))
        writer.close()
        writer.publish()
    return str(prefix)


def test_bits_per_byte_agree_with_the_evaluator(tmp_path: Path) -> None:
    """Documents as the preprocessor writes them, an end-of-document token behind each."""
    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity

    loaded = make_model("qk_eq_v", make_tokenizer(tmp_path / "tokenizer"))
    texts = [" ".join(TEXTS[index:] * 3) for index in range(4)] + ["Hi", TEXTS[3]]
    write_tasks(tmp_path / "tasks", texts)
    documents = [[*loaded.tokenizer.encode(text), loaded.tokenizer.eod] for text in texts]
    assert {len(document) % POSITIONS for document in documents} != {1}
    prefix = write_data(tmp_path, documents, loaded.tokenizer.vocab_size)
    lm = measure(direct(loaded), tmp_path, ("tiny_rolling",))
    ours = evaluate_perplexity(loaded, prefix, protocol="rolling", micro_batch_size=3)
    assert ours["tokens"] == ours["real_tokens"] == sum(map(len, documents)) - len(documents)
    assert ours["bytes"] == sum(len(text.encode()) for text in texts)
    found = values(lm)["tiny_rolling", 0, "bits_per_byte"]
    assert ours["bits_per_byte"] == pytest.approx(found, rel=1e-5)
    packed = evaluate_perplexity(loaded, prefix)["bits_per_byte"]
    assert abs(packed - found) > 1e-3  # other contexts, and the padding's share of the softmax


def test_packed_bits_per_byte_agree_over_the_same_windows(tmp_path: Path) -> None:
    """One document behind an end-of-document token, a whole number of windows long: both score the same."""
    from megatron_sharedproj.evaluation.perplexity import evaluate_perplexity

    loaded = hide_padding(make_model("qkv", make_tokenizer(tmp_path / "tokenizer")))
    tokenizer = loaded.tokenizer
    text = " ".join(TEXTS * 4)
    while len(tokenizer.encode(text)) % POSITIONS:
        text = text[:-1]
    tokens = tokenizer.encode(text)
    assert len(tokens) >= 2 * POSITIONS
    write_tasks(tmp_path / "tasks", [text])
    prefix = write_data(tmp_path, [[tokenizer.eod], tokens], tokenizer.vocab_size)
    packed = evaluate_perplexity(loaded, prefix, seq_length=POSITIONS)
    lm = values(measure(direct(loaded), tmp_path, ("tiny_rolling",)))
    assert packed["tokens"] == len(tokens) and packed["bytes"] == len(text.encode())
    assert packed["bits_per_byte"] == pytest.approx(lm["tiny_rolling", 0, "bits_per_byte"], rel=1e-5)
    byte_perplexity = math.exp(packed["loss"] * packed["tokens"] / packed["bytes"])
    assert byte_perplexity == pytest.approx(lm["tiny_rolling", 0, "byte_perplexity"], rel=1e-5)


@torch.no_grad()
def hide_padding(loaded: Any) -> Any:
    """Put the rows that only pad the vocabulary out of reach: packed keeps them in its softmax.

    Through a channel that the final norm holds at one.
    """
    norm, weight = loaded.model.decoder.final_layernorm, loaded.model.embedding.word_embeddings.weight
    norm.weight[0], norm.bias[0] = 0.0, 1.0
    weight[:, 0] = 0.0
    weight[loaded.tokenizer.vocab_size :] = 0.0
    weight[loaded.tokenizer.vocab_size :, 0] = -100.0
    return loaded
