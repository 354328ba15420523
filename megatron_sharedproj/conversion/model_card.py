"""The README.md of an exported model: what it is, how it was made and checked, what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sharedproj import formulas
from megatron_sharedproj.config import ModelConfig, RunConfig
from megatron_sharedproj.variants import CACHE_POLICIES

_USE = {
    "sharedproj": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
inputs = tokenizer("The state of the Union", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))""",
    "stock": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")""",
    "gguf": """from llama_cpp import Llama

model = Llama("{folder}/model.gguf", n_ctx=0)
print(model("The state of the Union", max_tokens=64)["choices"][0]["text"])""",
    "gguf ids": """from llama_cpp import Llama

model = Llama("{folder}/model.gguf", n_ctx=0)  # no tokenizer: model.eval and generate take ids""",
    "ids": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})""",
}


def _use(folder: str, format: str, takes_text: bool) -> str:
    kind = format if format in ("sharedproj", "gguf") else "stock"
    if not takes_text:
        kind = "gguf ids" if kind == "gguf" else "ids"
    quoted = folder.replace("\\", "\\\\").replace('"', '\\"')
    trust = ", trust_remote_code=True" if format == "sharedproj" else ""
    return _USE[kind].replace("{folder}", quoted).replace("{trust}", trust)


def tokens_seen(run: RunConfig, state: dict[str, Any]) -> tuple[int, float | None]:
    """Positions trained on, and the share of them that is real text (None: not recorded)."""
    share = state.get("real_token_share", 1.0 if run.data.data_protocol == "packed" else None)
    return int(state.get("consumed_samples", 0)) * run.train.seq_length, share


def _training(run: RunConfig, state: dict[str, Any]) -> list[str]:
    if origin := state.get("imported_from"):
        return [f"Imported: {origin}."]
    positions, share = tokens_seen(run, state)
    prefixes = [*run.data.train_data_path, *run.data.data_path]
    names = [Path(part).name for part in prefixes if not part.replace(".", "", 1).isdigit()]
    rows = [f"Data: {', '.join(names) or 'none recorded'}; rows are {run.data.data_protocol}."]
    if origin := state.get("started_from"):
        rows.append(f"Started from: {origin}.")
    seen = f"{positions:,} positions in {state.get('iteration', 0):,} steps"
    if share is None:
        rows.append(f"Seen: {seen}; how many of them are real tokens was not recorded.")
    elif share < 1:
        rows.append(
            f"Seen: {seen}, of which {round(positions * share):,} ({share:.1%}) are real tokens; the others "
            "fill rows up and were scored, as in the paper."
        )
    else:
        rows.append(f"Seen: {seen}, all of them real tokens.")
    return rows


def _rotary(config: ModelConfig) -> list[str]:
    """What rotary positions do: nothing to say of a model without them."""
    if not config.rope_size:
        return []
    part = f"{config.rope_size} of the {config.kv_channels} elements of a head"
    return [f"Rotary positions, `{config.kv_rotary}`, on {part}: {config.rotary_scheme.function}."]


def cache_line(config: ModelConfig, policy: str = CACHE_POLICIES[0]) -> str:
    """What the key/value cache costs in this package's own format.

    Args:
        policy: one of variants.CACHE_POLICIES.
    """
    own = formulas.kv_cache_bytes_per_token(config, policy=policy)
    full = formulas.kv_cache_bytes_per_token(
        config.replace(attention_variant="qkv", num_query_groups=config.num_attention_heads)
    )
    return (
        f"{own:,} bytes per token in 16 bits, {own / full:.3%} of the {full:,} of a model of this shape that "
        "caches key and value of every head."
    )


def model_card(
    run: RunConfig,
    state: dict[str, Any],
    *,
    name: str,
    format: str,
    vocab_size: int,
    cache: str,
    policy: str = CACHE_POLICIES[0],
    checks: list[str],
    notes: list[str],
    takes_text: bool = True,
) -> str:
    """The card as Markdown with the Hub's YAML header.

    Args:
        state: the checkpoint's train_state.json; format: value of ``--format``.
        cache: what the format's cache costs; policy: how it is cached, of variants.CACHE_POLICIES.
        checks: how it was verified; notes: further limits.
        takes_text: there is a tokenizer beside the weights.
    """
    config = run.model
    variant = config.variant
    counts = formulas.parameters(config)["total"]
    shape = (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads "
        f"of {config.kv_channels}, {config.num_query_groups} key/value heads, "
        f"{config.max_position_embeddings:,} positions ({config.position_embedding_type}), "
        f"{config.normalization}, {config.activation}"
    )
    padding = config.padded_vocab_size - vocab_size
    use = _use(name, format, takes_text)
    trained = _training(run, state)
    sections = {
        "Model": [
            f"A language model whose attention is {variant.formula}, the paper's {variant.paper_name} "
            f"(`{variant.name}`): projected are {', '.join(variant.projections)}, cached "
            f"{' and '.join(tensor.describe() for tensor in config.cached_tensors(policy))}.",
            *_rotary(config),
            f"{counts:,} parameters with Megatron's padded vocabulary: {shape}.",
            f"Vocabulary: {vocab_size:,} rows"
            + (
                f"; {padding} rows of padding were cut off ({config.padded_vocab_size:,})."
                if padding
                else "."
            ),
        ],
        "Training": trained,
        "Cache": [cache],
        "Verification": checks,
        "Limits": [*notes, "A base model: no instruction tuning, no safety tuning."],
    }
    library = "gguf" if format == "gguf" else "transformers"
    header = (
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- megatron_sharedproj\n---\n"
    )
    body = "\n".join(
        f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
        for title, lines in sections.items()
    )
    return f"{header}\n# {name}\n\n```python\n{use}\n```\n\n{body}"
