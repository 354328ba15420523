"""Small random models with a tokenizer, as checkpoints and exported; lm-eval tasks of a few documents."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from megatron_sharedproj.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from megatron_sharedproj.data.tokenizers import build_tokenizer, train_bpe

POSITIONS = 96
TEXTS = [
    "The sea is calm tonight. The tide is full, the moon lies fair upon the straits.",
    "A man is sitting on a roof. He starts pulling up roofing, and throws it down.",
    "Which of these is a planet? Mars is one; the sun and the moon are none.",
    "Caf\u00e9s close early in winter: 7 o'clock, or half past six on Sundays.",
    "def add(first, second):\n    return first + second",
]
MODELS: dict[str, dict[str, Any]] = {
    "qkv": {"attention_variant": "qkv", "position_embedding_type": "rope", "num_query_groups": 2},
    "qk_eq_v": {"attention_variant": "qk_eq_v"},
    "q_eq_k_eq_v": {"attention_variant": "q_eq_k_eq_v", "untie_embeddings_and_output_weights": True},
}


def make_tokenizer(folder: Path) -> Path:
    train_bpe(TEXTS * 20, 300, folder)
    return folder


def make_model(name: str, tokenizer: Path, positions: int = POSITIONS, **shape: Any) -> Any:
    """A random model with logits spread wide; rows of its vocabulary that only pad it are the most likely."""
    from megatron_sharedproj.inference.loading import LoadedModel
    from megatron_sharedproj.model import build_model

    built = build_tokenizer("HuggingFaceTokenizer", str(tokenizer))
    config = ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "padded_vocab_size": -(-built.vocab_size // 64) * 64,
            "max_position_embeddings": positions,
            **MODELS[name],
            **shape,
        }
    )
    assert config.padded_vocab_size > built.vocab_size
    model = build_model(config, parallel_output=False).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if "layernorm.weight" in key else 0.3 * noise)
            if "word_embeddings" in key or "output_layer" in key:
                parameter[built.vocab_size :] *= 10.0
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer))
    run = RunConfig(model=config, train=TrainConfig(seq_length=positions), data=data)
    return LoadedModel(model, run, built, Path("."), torch.device("cpu"), {})


def save(loaded: Any, folder: Path) -> Path:
    """Write the model as a checkpoint of the trainer."""
    from megatron_sharedproj.conversion.megatron_checkpoint import model_state, write_checkpoint
    from megatron_sharedproj.conversion.weights import to_hugging_face

    tensors = to_hugging_face(loaded.config.model, model_state(loaded.model), loaded.tokenizer.vocab_size)
    write_checkpoint(folder, loaded.config, tensors, iteration=7)
    return folder


def export(loaded: Any, folder: Path) -> Path:
    """Export the model."""
    from megatron_sharedproj.conversion.export import ExportOptions
    from megatron_sharedproj.conversion.export import export as write

    source = loaded.config.data.tokenizer_model
    write(loaded, ExportOptions(output=folder, verify=False, tokenizer_source=source))
    return folder


def quiet() -> None:
    """No counting of downloads at the Hub (seconds without a network), and no warnings of lm-eval."""
    import datasets.config

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


QUESTIONS = [
    {
        "question": f"{TEXTS[index % 5][: 20 + 5 * index]} What comes {index}?",
        "choices": ["the sea", "a man on a roof", "Mars", "half past six on Sundays"][: 3 + index % 2],
        "label": index % 3,
    }
    for index in range(12)
]
CHOICE = """output_type: multiple_choice
validation_split: train
fewshot_split: train
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TASKS = {
    "tiny_choice": ("questions", CHOICE + "doc_to_choice: choices\n"),
    # One token each after the same context: lm-eval asks the model once for all of them.
    "tiny_letters": ("questions", CHOICE + 'doc_to_choice: ["A", "B", "C", "D"]\n'),
    "tiny_rolling": (
        "texts",
        'output_type: loglikelihood_rolling\nvalidation_split: train\ndoc_to_text: ""\n'
        'doc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n'
        "  - metric: byte_perplexity\n  - metric: bits_per_byte\n",
    ),
    "tiny_generate": (
        "questions",
        'output_type: generate_until\nvalidation_split: train\ndoc_to_text: "{{question}}"\n'
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["e"]\n  max_gen_toks: 12\n'
        "metric_list:\n  - metric: exact_match\n",
    ),
    # Two right answers of three or four.
    "tiny_several": (
        "questions",
        CHOICE.replace("doc_to_target: label", 'doc_to_target: "{{[0, label]}}"')
        + "doc_to_choice: choices\n",
    ),
    "tiny_unasked": ("questions", CHOICE + "doc_to_choice: choices\nnum_fewshot: 0\n"),
    "tiny_shuffled": (
        "questions",
        CHOICE + "doc_to_choice: choices\nprocess_docs: !function shuffle.shuffle\n",
    ),
}
SHUFFLE = """import random


def shuffle(documents):
    # As GPQA's: the choices in the order of Python's own generator.
    def change(row):
        return {"choices": random.sample(row["choices"], 3)}

    return documents.map(change, load_from_cache_file=False)
"""
GROUP = """group: tiny
task: [tiny_choice, tiny_letters]
aggregate_metric_list:
  - metric: acc
    weight_by_size: false
"""


def write_tasks(folder: Path, texts: list[str] | None = None) -> Path:
    """lm-eval task files with their documents."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(TEXTS[index:] * 2) for index in range(4)] + ["Hi"] if texts is None else texts
    documents: dict[str, list[dict[str, Any]]] = {
        "questions": QUESTIONS,
        "texts": [{"text": text} for text in texts],
    }
    for name, rows in documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (source, rest) in TASKS.items():
        data = f"{{data_files: {folder / source}.jsonl, cache_dir: {folder / 'cache'}}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\n"
        (folder / f"{name}.yaml").write_text(head + rest)
    (folder / "tiny.yaml").write_text(GROUP)
    (folder / "shuffle.py").write_text(SHUFFLE)
    return folder
