"""Replace the attention of a Hugging Face model, in place, by one that shares projections.

Shape legend: b batch, s new tokens, t tokens seen, d hidden size, h heads, g groups (key/value heads),
e head size, r rotated elements of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_sharedproj.ops.attention import attention, select_path
from megatron_sharedproj.torch_layers.attention import parse_variant
from megatron_sharedproj.torch_layers.cache import storage_bytes
from megatron_sharedproj.torch_layers.errors import argument_names
from megatron_sharedproj.torch_layers.patch_weights import (
    check_merge,
    give_parameters,
    make_projections,
    read_projections,
)
from megatron_sharedproj.torch_layers.projections import SharedProjections, one_or_two, rotated_elements
from megatron_sharedproj.torch_layers.rotary import Angles
from megatron_sharedproj.variants import CACHE_POLICIES, AttentionVariant, RotaryScheme, resolve_kv_rotary

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

# Attention classes that are understood, and whether their models rotate.
SUPPORTED = {
    "GPT2Attention": False,
    "LlamaAttention": True,
    "MistralAttention": True,
    "Qwen2Attention": True,
    "Qwen3Attention": True,
}
# Where config.save_pretrained writes how a model was patched.
CONFIG_FIELD = "sharedproj_patch"


class PatchedAttention(SharedProjections):
    """Takes the place of an attention of transformers: same arguments, same results, fewer projections.

    Args:
        original: the attention that it replaces; its norms are taken over.
        rotary: the model's own rotary embedding, so that any rope_scaling stays what it was; None without.
        policy: of variants.CACHE_POLICIES.
        The others are those of SharedProjections.
    """

    def __init__(
        self,
        original: Any,
        *,
        rotary: nn.Module | None,
        policy: str,
        variant: AttentionVariant,
        **options: Any,
    ):
        super().__init__(original.config.hidden_size, variant=variant, device="meta", **options)
        self.config, self.layer_idx, self.policy = original.config, original.layer_idx, policy
        # What transformers' attention functions read from a module.
        self.head_dim = self.head_size
        self.num_key_value_groups = self.num_heads // self.num_groups
        self.scaling, self.is_causal = original.scaling, True
        self.dropout = original.attn_dropout.p if rotary is None else original.attention_dropout
        self.output_dropout: nn.Module | None = getattr(original, "resid_dropout", None)
        self.rotary = rotary
        self.k_norm = getattr(original, "k_norm", None)
        self.q_norm = None if variant.tied_qk else getattr(original, "q_norm", None)
        self.train(original.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, d] -> [b, s, d], and the weights where the implementation gives them.

        Args:
            position_embeddings: the model's cosine and sine [b or 1, s, n] of the new tokens.
            attention_mask: as the chosen attention implementation takes it.
            kwargs: the cache as ``cache`` (transformers 5.24) or ``past_key_values``, position_ids, and what
                an attention implementation takes.
        """
        cache = kwargs.pop("past_key_values", None)
        cache = kwargs.pop("cache", cache)
        angles = None if self.rotary is None else self._angles(position_embeddings)
        query, stored = self.arrange(hidden_states, angles, "store_both" if cache is None else self.policy)
        seen, policy = angles, "store_both" if cache is None else self.policy
        if cache is not None:
            stored, positions = self._update(cache, stored, kwargs.get("position_ids"))
            if positions is not None and self.rotary is not None:
                seen = self._angles(self.rotary(hidden_states, position_ids=positions))
        key, value = self.key_and_value(stored, seen, policy)
        out, weights = self._attend(query, key, value, attention_mask, kwargs)
        out = self.finish(out, angles)
        return out if self.output_dropout is None else self.output_dropout(out), weights

    def _angles(self, embeddings: tuple[Tensor, Tensor] | None) -> Angles:
        """The model's cosine and sine, one per pair, where r / 2 pairs turn and the others stand still."""
        assert embeddings is not None and self.rotary is not None
        gain = float(getattr(self.rotary, "attention_scaling", 1.0))
        cos, sin = (part[..., : part.shape[-1] // 2] for part in embeddings)
        turned = self.rope_size // 2
        if turned < cos.shape[-1]:
            still = torch.arange(cos.shape[-1], device=cos.device) >= turned
            cos, sin = cos.masked_fill(still, gain), sin.masked_fill(still, 0.0)
        return Angles(cos, sin, gain)

    def _update(
        self, cache: Cache, new: tuple[Tensor, ...], position_ids: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Store new tokens; returns all that are stored, and their positions [b, t] where they are needed."""
        from megatron_sharedproj.torch_layers.patch_cache import share_layer

        share_layer(cache, self.layer_idx, tied=len(new) == 1 and not self.rotates_at_read(self.policy))
        first = new[0].transpose(1, 2)
        if not self.rotates_at_read(self.policy):
            last = first if len(new) == 1 else new[1].transpose(1, 2)
            keys, values = cache.update(first, last, self.layer_idx)
            return one_or_two((keys, values), 1, 2)[: len(new)], None
        if position_ids is None:
            raise ValueError(f"position_ids: the model gives none to layer {self.layer_idx}; use store_both")
        # Kept with the keys, so that padding, packed rows and cropping need no thought: 4 bytes per token.
        positions = position_ids.to(torch.int32).expand(first.shape[0], -1)[:, None, :, None]
        keys, held = cache.update(first, positions, self.layer_idx)
        return (keys.transpose(1, 2),), held[:, 0, :, 0].long()

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, h, e], [b, t, g, e] twice -> [b, s, h, e], and the weights."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        from megatron_sharedproj.layers.hf.modeling_sharedproj import eager_attention_forward

        dropout = self.dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if implementation == "sdpa" and mask is None and kwargs.get("is_causal") is None and not tracing:
            # No mask: plain causal attention, over the first tokens of a static cache.
            s = query.shape[1]
            visible = one_or_two((key, value), 0, 1)
            if s > 1:
                k = visible[0][:s]
                visible = k, k if value is key else visible[1][:s]
            q = query.transpose(0, 1)
            if select_path(q, *visible, causal=True, dropout_p=dropout).name == "extension":
                out = attention(q, *visible, causal=True, scale=self.scaling)
                return out.transpose(0, 1), None
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        keys, values = one_or_two((key, value), 1, 2)
        out, weights = interface(
            self,
            query.transpose(1, 2),
            keys,
            values,
            mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return out, weights


class _RecordWeights:
    """Makes output_attentions find a module's weights: transformers' own hook, which alone has no pickle."""

    def __init__(self) -> None:
        from transformers.utils import output_capturing

        # There is no public way to name another class for one model; both spellings are transformers'.
        spellings = ("install_output_capuring_hook", "install_output_capturing_hook")
        install = next((x for name in spellings if (x := getattr(output_capturing, name, None))), None)
        self.hook: Any = None
        if install is not None:
            holder = nn.Module()
            install(holder, "attentions", 1)
            self.hook = next(iter(holder._forward_hooks.values()))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self.hook is None else self.hook(module, args, output)


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache of transformers has allocated, spare room included, each storage counted once."""
    return storage_bytes(
        x for layer in cache.layers for x in (layer.keys, layer.values) if isinstance(x, Tensor) and x.numel()
    )


def patch_model(
    model: nn.Module,
    variant: str = "qk_eq_v",
    *,
    kv_rotary: str = "",
    num_groups: int | None = None,
    merge: str = "mean",
    rotary_percent: float = 1.0,
    cache_policy: str = CACHE_POLICIES[0],
) -> nn.Module:
    """Give every layer of a Hugging Face model an attention that shares projections, with its weights.

    Args:
        model: any model of GPT-2, Llama, Mistral, Qwen2 or Qwen3 (GPT2LMHeadModel, LlamaModel, ...). Changed
            in place, also ``model.config``: ``sharedproj_patch`` says how, num_key_value_heads is the new g.
        variant: qkv (computes what the model did), q_eq_k, qk_eq_v or q_eq_k_eq_v, or the paper's spelling.
        kv_rotary: what rotary positions do to a tied key/value, one of variants.KV_ROTARY; needed where the
            model rotates and the variant ties them. ``partial`` and ``separate_rope_head`` turn the first
            pairs of each head, the fastest, and keep the model's pairing of element i with i + e / 2.
            ``separate_rope_head`` adds k_rope_proj, which starts as the mean over groups of those rows of the
            trained key.
        num_groups: g; by default the model's. Fewer: each is the mean of those that it replaces.
        merge: of merging.MERGES, how a tensor that plays several roles is made of the trained ones. Where
            query and key are tied the result is a start for training, no more.
        rotary_percent: part of the pairs that turn.
        cache_policy: of variants.CACHE_POLICIES, for ``rotate_keys``: half the bytes, rotated when read, or
            both tensors.
    Returns:
        The model.
    Raises:
        ValueError: naming the argument, or what in the model is not supported, before anything is changed.

    generate() and forward work as before; the DynamicCache or StaticCache that they make or are given stores
    one tensor per layer where key and value are one (:func:`cache_nbytes` measures it). Other
    caches are refused. Save with ``save_pretrained``; to load, patch a fresh model alike and load the state
    dict into it (docs/own_model.md).
    """
    shape, plus = parse_variant(variant)
    if plus:
        raise ValueError(f"variant {variant}: the + forms are not causal, and these models are; drop the +")
    check_merge(shape, merge)
    found = _attentions(model)
    rope = SUPPORTED[type(found[0][1]).__name__]
    with argument_names():
        scheme = resolve_kv_rotary(shape, kv_rotary, rope=rope)
        if rope and shape.tied_kv:
            scheme.check_part(rotary_percent)
    if not rope and rotary_percent != 1.0:
        raise ValueError(f"rotary_percent {rotary_percent}: {type(model).__name__} has no rotary positions")
    if cache_policy not in CACHE_POLICIES:
        raise ValueError(f"cache_policy {cache_policy}: choose one of {', '.join(CACHE_POLICIES)}")
    rotary = _rotary(model, scheme) if rope else None
    made = [
        _build(name, original, shape, scheme, rotary, num_groups, merge, rotary_percent, cache_policy)
        for name, original in found
    ]
    for (name, _), new in zip(found, made, strict=True):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    config: Any = made[0].config
    if rope:
        config.num_key_value_heads = made[0].num_groups
    patched = {
        "variant": shape.name,
        "kv_rotary": scheme.name if rope and shape.tied_kv else "",
        "num_groups": made[0].num_groups,
        "merge": merge,
        "rotary_percent": rotary_percent,
        "cache_policy": cache_policy,
    }
    setattr(config, CONFIG_FIELD, patched)
    for new in made:
        # transformers looks for outputs of the class that was replaced.
        new.register_forward_hook(_RecordWeights())
    return model


def _attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the attentions to replace."""
    modules = list(model.named_modules())
    if any(isinstance(module, PatchedAttention) for _, module in modules):
        raise ValueError(f"model {type(model).__name__}: is patched already; patch a fresh one")
    found = [
        (name, module)
        for name, module in modules
        if type(module).__name__ in SUPPORTED and type(module).__module__.startswith("transformers.")
    ]
    if not found or len({type(module) for _, module in found}) > 1:
        raise ValueError(
            f"model {type(model).__name__}: has none of, or several of {', '.join(SUPPORTED)}; models of "
            "GPT-2, Llama, Mistral, Qwen2 and Qwen3 are supported"
        )
    for name, module in found:
        _check_supported(name, module)
    return found


def _check_supported(name: str, attention: Any) -> None:
    """Raise ValueError for an option that would change what is computed."""
    config = attention.config
    if getattr(attention, "is_cross_attention", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name}: add_cross_attention is not supported; patch a decoder without an encoder")
    if getattr(attention, "reorder_and_upcast_attn", False):
        raise ValueError(f"{name}: reorder_and_upcast_attn is not supported; set it to False in the config")
    mistral = type(attention).__name__ == "MistralAttention"
    window = config.sliding_window if mistral else getattr(attention, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"{name}: sliding_window={window} is not supported; where texts are no longer than that, load "
            "the model with sliding_window=None (and layer_types of full_attention)"
        )
    if getattr(config, "pretraining_tp", 1) != 1:
        raise ValueError(f"{name}: pretraining_tp={config.pretraining_tp} is not supported; set it to 1")


def _rotary(model: nn.Module, scheme: RotaryScheme) -> nn.Module:
    """The one rotary embedding of a model."""
    found: list[Any] = [x for x in model.modules() if type(x).__name__.endswith("RotaryEmbedding")]
    if len(found) != 1:
        raise ValueError(f"model {type(model).__name__}: has {len(found)} rotary embeddings; expected one")
    gain = float(getattr(found[0], "attention_scaling", 1.0))
    if scheme.rope_head and gain != 1.0:
        raise ValueError(
            f"kv_rotary {scheme.name}: the model scales its rotary embedding by {gain} (rope_scaling), which "
            "a part of the key would miss; use another scheme"
        )
    return found[0]


def _build(
    name: str,
    original: Any,
    variant: AttentionVariant,
    scheme: RotaryScheme,
    rotary: nn.Module | None,
    num_groups: int | None,
    merge: str,
    rotary_percent: float,
    policy: str,
) -> PatchedAttention:
    source = read_projections(name, original)
    size = original.head_dim
    heads, have = source["q"].weight.shape[0] // size, source["k"].weight.shape[0] // size
    groups = have if num_groups is None else num_groups
    with argument_names():
        variant.check_groups(heads, groups)
    if have % groups:
        raise ValueError(
            f"num_groups {groups}: must divide the model's {have} key/value heads, since a group is the mean "
            "of those that it replaces"
        )
    whole = 0
    if rotary is not None:
        inverse_frequencies: Any = rotary.inv_freq
        whole = 2 * inverse_frequencies.shape[-1]
        if whole > size:
            raise ValueError(f"{name}: its rotary embedding turns {whole} of {size} elements; not supported")
    r = rotated_elements(whole, rotary_percent) if rotary is not None else 0
    new = PatchedAttention(
        original,
        rotary=rotary,
        policy=policy,
        variant=variant,
        scheme=scheme,
        num_heads=heads,
        num_groups=groups,
        head_size=size,
        rope_size=r,
        rotary_size=whole,
        bias=source["k"].bias is not None,
        output_bias=source["o"].bias is not None,
    )
    first = list(range(r // 2))
    elements = first + [whole // 2 + i for i in first] if scheme.rope_head else None
    with torch.no_grad():
        made = make_projections(
            source, variant, num_groups=groups, head_size=size, merge=merge, rope_elements=elements
        )
    trained = any(parameter.requires_grad for parameter in original.parameters())
    for part, projection in made.items():
        give_parameters(getattr(new, f"{part}_proj"), projection, trained)
    return new
