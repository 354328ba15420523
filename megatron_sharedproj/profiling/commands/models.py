"""The models of a sub-command: a preset, a run or an export, its shape changed, in any variants."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sharedproj.command_line import list_of, positive_int
from megatron_sharedproj.config import PRESETS, ModelConfig
from megatron_sharedproj.variants import KV_ROTARY, VARIANTS, get_variant

ALL = "all"


@dataclass(frozen=True)
class PaperVariant:
    """A row of the paper's tables.

    Attributes:
        name: the paper's; variant: value of --attention-variant.
        sharing: query heads that share a key/value head; 0: all of them.
    """

    name: str
    variant: str
    sharing: int

    def groups(self, heads: int) -> int:
        """Key/value heads, or 0 where the heads do not divide so."""
        sharing = self.sharing or heads
        return 0 if heads % sharing else heads // sharing


# The paper's GQA has 4 groups at 16 heads and 8 at 32: four query heads to a key/value head.
PAPER_VARIANTS = (
    PaperVariant("QKV", "qkv", 1),
    PaperVariant("Q=K-V", "q_eq_k", 1),
    PaperVariant("Q-K=V", "qk_eq_v", 1),
    PaperVariant("Q=K=V", "q_eq_k_eq_v", 1),
    PaperVariant("GQA", "qkv", 4),
    PaperVariant("MQA", "qkv", 0),
    PaperVariant("Q-GQA", "qk_eq_v", 4),
    PaperVariant("Q-MQA", "qk_eq_v", 0),
)

_SIZES = (
    ("num_layers", "num_layers", "transformer layers"),
    ("hidden_size", "hidden_size", "hidden size d"),
    ("num_attention_heads", "num_attention_heads", "query heads"),
    ("kv_channels", "kv_channels", "head size (default: hidden size / heads)"),
    ("ffn_hidden_size", "ffn_hidden_size", "MLP width (default: 4 * hidden size)"),
    ("vocab_size", "padded_vocab_size", "rows of the embedding, padding included"),
    ("max_position_embeddings", "max_position_embeddings", "positions of the learned embedding"),
)
_CHOICES = (
    ("position_embedding_type", ("learned_absolute", "rope", "none")),
    ("normalization", ("LayerNorm", "RMSNorm")),
)
_SWITCHES = (
    ("swiglu", "activation", "swiglu", "gated SiLU MLP"),
    ("disable_bias_linear", "add_bias_linear", False, "no biases in linear layers"),
    ("qk_layernorm", "qk_layernorm", True, "norm on queries and keys"),
    (
        "untie_embeddings_and_output_weights",
        "untie_embeddings_and_output_weights",
        True,
        "a separate output matrix",
    ),
)


def add_model_arguments(parser: argparse.ArgumentParser, *, variants: str = ALL) -> None:
    """Add the flags that :func:`models_from` reads.

    Args:
        variants: --attention-variant's value where it is not given and a preset is chosen.
    """
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--model", choices=tuple(PRESETS), default="300m", help="the paper's shapes (default 300m)"
    )
    source.add_argument(
        "--load", type=Path, metavar="PATH", help="a --save folder, an iter_NNNNNNN of it, or an export"
    )
    group.add_argument(
        "--attention-variant",
        type=list_of(str),
        metavar="A,B",
        help=f"{', '.join(VARIANTS)}, or {ALL}: the four, GQA, MQA, Q-GQA and Q-MQA (default: the loaded "
        f"model's; {variants} for --model)",
    )
    group.add_argument(
        "--num-query-groups",
        type=list_of(positive_int),
        metavar="N,M",
        help="key/value heads, of those variants that can share them",
    )
    for flag, _, text in _SIZES:
        group.add_argument(_flag(flag), type=positive_int, metavar="N", help=text)
    for flag, choices in _CHOICES:
        group.add_argument(_flag(flag), choices=choices)
    group.add_argument(
        "--kv-rotary", choices=tuple(KV_ROTARY), help="with rope, of variants that tie key and value"
    )
    group.add_argument("--rotary-percent", type=float, metavar="X", help="with rope, rotated part of a head")
    for flag, _, _, text in _SWITCHES:
        group.add_argument(_flag(flag), action="store_true", help=text)
    parser.set_defaults(default_variants=variants)


def models_from(args: argparse.Namespace) -> list[tuple[str, ModelConfig]]:
    """The models that the flags ask for: the paper's name of each (Q-GQA-4), and its configuration.

    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    return models_and_notes(args)[0]


def models_and_notes(args: argparse.Namespace) -> tuple[list[tuple[str, ModelConfig]], list[str]]:
    """:func:`models_from`, and a line for each variant of ``all`` that the shape rules out."""
    base = base_model(args)
    heads = base.num_attention_heads
    asked = args.attention_variant or (() if args.load else (args.default_variants,))
    found: list[ModelConfig] = []
    notes = []
    if not asked:
        asked_groups = args.num_query_groups or (base.num_query_groups,)
        found = [_with(args, base, base.attention_variant, groups) for groups in asked_groups]
    elif ALL in asked and not args.num_query_groups:
        for row in PAPER_VARIANTS:
            if not row.groups(heads):
                notes.append(f"{row.name}: left out, {heads} heads are not divisible by {row.sharing}")
                continue
            try:
                found.append(_with(args, base, row.variant, row.groups(heads)))
            except ValueError as error:
                notes.append(f"{row.name}: left out: {error}")
    else:
        names = list(VARIANTS) if ALL in asked else [get_variant(name).name for name in asked]
        for groups in args.num_query_groups or (heads,):
            # Under `all` the variants that cannot share heads are not an error.
            sharing = [name for name in names if groups == heads or not get_variant(name).tied_qk]
            found += [_with(args, base, name, groups) for name in (sharing if ALL in asked else names)]
    models = {(config.attention_variant, config.num_query_groups): config for config in found}
    if not models:
        raise ValueError(f"--attention-variant {','.join(asked)}: none fits this shape; {'; '.join(notes)}")
    return [(paper_name(config), config) for config in models.values()], notes


def base_model(args: argparse.Namespace) -> ModelConfig:
    """The preset or the loaded model with the shape that the flags give, in its own variant.

    Raises:
        ValueError: naming the flag, its value and what would work.
    """
    config = PRESETS[args.model] if args.load is None else _loaded_config(args.load)
    changes: dict[str, Any] = {
        field: getattr(args, flag) for flag, field, _ in _SIZES if getattr(args, flag) is not None
    }
    changes |= {flag: getattr(args, flag) for flag, _ in _CHOICES if getattr(args, flag) is not None}
    changes |= {field: value for flag, field, value, _ in _SWITCHES if getattr(args, flag)}
    if args.rotary_percent is not None:
        changes["rotary_percent"] = args.rotary_percent
    if args.kv_rotary and config.variant.tied_kv:
        changes["kv_rotary"] = args.kv_rotary
    heads = changes.get("num_attention_heads", config.num_attention_heads)
    if "hidden_size" in changes or "num_attention_heads" in changes:
        changes.setdefault("kv_channels", 0)  # derived anew
        changes.setdefault("num_query_groups", min(heads, config.num_query_groups))
        if config.num_query_groups == config.num_attention_heads:
            changes["num_query_groups"] = heads
    if args.swiglu and config.activation != "swiglu":
        # The trainer's rule: as many parameters as an ungated MLP of width 4d.
        width = int(changes.get("hidden_size", config.hidden_size) * 8 / 3) // 64 * 64 or 64
        changes.setdefault("ffn_hidden_size", width)
    elif "hidden_size" in changes:
        changes.setdefault("ffn_hidden_size", 0)
    return config.replace(**changes) if changes else config


def model_name(args: argparse.Namespace) -> str:
    """The preset, or the loaded folder, as tables name it; "changed" where flags changed its shape."""
    if args.load is not None:
        name = args.load.resolve().name
        changed = base_model(args) != _loaded_config(args.load)
    else:
        name = args.model
        changed = base_model(args) != PRESETS[args.model]
    return f"{name}, changed" if changed else name


def paper_name(config: ModelConfig) -> str:
    """The paper's name of a variant with its groups: Q-K=V, GQA-4, Q-MQA."""
    groups = config.num_query_groups
    if groups == config.num_attention_heads:
        return config.variant.paper_name
    sharing = "MQA" if groups == 1 else f"GQA-{groups}"
    return f"Q-{sharing}" if config.variant.tied_kv else sharing


def _with(args: argparse.Namespace, base: ModelConfig, variant: str, groups: int) -> ModelConfig:
    # Of the models in a table only those that tie key and value have a choice.
    scheme = {"kv_rotary": args.kv_rotary} if args.kv_rotary and get_variant(variant).tied_kv else {}
    return base.replace(attention_variant=variant, num_query_groups=groups, **scheme)


def _loaded_config(path: Path) -> ModelConfig:
    """The configuration of a run, a checkpoint or an export; no weights are read."""
    from megatron_sharedproj.checkpointing import files, selection
    from megatron_sharedproj.conversion.config_map import model_config

    flag = f"--load {path}"
    if (path / files.RUN_CONFIG).is_file() and files.iteration_of(path) is None:
        return files.checkpoint_config(path).model
    if (path / "config.json").is_file():
        try:
            return model_config(json.loads((path / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{flag}: config.json is not one of this package's exports ({error})") from None
    if files.iteration_of(path) is None and not files.has_checkpoint(path):
        raise ValueError(
            f"{flag}: holds neither {files.RUN_CONFIG} nor config.json; give a --save folder of a training "
            "run, one of its iter_NNNNNNN folders, or an exported model"
        )
    return files.checkpoint_config(selection.resolve_checkpoint(path)).model


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
