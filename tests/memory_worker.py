"""What the ranks of a layout keep and send in a real training step, as JSON: FOLDER LAYOUT [LAYOUT ...].

Started by torchrun with two processes (test_formulas_memory.py).
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# Before Megatron is imported: it binds some of these names then.
SENT = {"bytes": 0}
_LEAST = 64  # smaller tensors are the loss's and the norm's scalars


def _counting(name: str, passes: int, which: int) -> None:
    original: Callable[..., Any] = getattr(torch.distributed, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        ranks = torch.distributed.get_world_size(group)
        tensor = args[which] if len(args) > which else next(v for v in kwargs.values() if torch.is_tensor(v))
        if tensor.numel() >= _LEAST:
            SENT["bytes"] += passes * (ranks - 1) * tensor.numel() * tensor.element_size() // ranks
        return original(*args, **kwargs)

    setattr(torch.distributed, name, counted)


def count_collectives() -> None:
    """Count what ring collectives send; the index is that of the argument that is the whole tensor."""
    _counting("all_reduce", 2, 0)
    _counting("all_gather_into_tensor", 1, 0)
    _counting("reduce_scatter_tensor", 1, 1)


def saved_bytes(forward: Callable[[], Any], weights: set[int]) -> int:
    """Bytes that autograd keeps alive after `forward`: each storage once, those at `weights` left out."""
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    alive = [tensor for reference in kept if (tensor := reference()) is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    del result
    return sum(size for place, size in storages.items() if place not in weights)


def model_saved_bytes(model: Any, batch: int, length: int) -> int:
    """:func:`saved_bytes` of a GPTModel's forward pass and loss."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    tokens = torch.randint(0, 64, (batch, length))
    positions = torch.arange(length).expand(batch, length).contiguous()
    model.train()
    return saved_bytes(lambda: model(tokens, positions, None, labels=tokens).sum(), weights)


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2+SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "DP2": {},
    "CP2": {"context_parallel_size": 2},
}
_LLAMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
          "no_bias_gelu_fusion": None, "disable_bias_linear": True,
          "untie_embeddings_and_output_weights": True}  # fmt: skip
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qkv": ("qkv", 0, {"hidden_dropout": 0.1}),
    "K=V": ("qk_eq_v", 0, {}),
    "Q-MQA": ("qk_eq_v", 1, {}),
    "llama GQA-2": ("qkv", 2, {**_LLAMA, "qk_layernorm": True}),
    "rotate_values": ("qk_eq_v", 0, {**_LLAMA, "kv_rotary": "rotate_values"}),
    "separate_rope_head": (
        "qk_eq_v",
        2,
        {
            "position_embedding_type": "rope",
            "kv_rotary": "separate_rope_head",
            "rotary_percent": 0.5,
            "qk_layernorm": True,
        },
    ),
}
BATCH, MICRO = 8, 2


def main() -> None:
    count_collectives()
    import tiny
    from megatron_sharedproj import distributed
    from megatron_sharedproj.config import to_dict
    from megatron_sharedproj.device import get_device
    from megatron_sharedproj.quiet import quiet_libraries

    quiet_libraries()
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    get_device().install()
    found: dict[str, Any] = {}
    for index, layout in enumerate(sys.argv[2:]):
        further = LAYOUTS[layout]
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store{index}", rank=rank, world_size=2
        )
        sizes = {name: size for name, size in further.items() if name.endswith("parallel_size")}
        distributed.initialize(get_device(), **sizes)
        for name, (variant, groups, shape) in MODELS.items():
            flags = {"hidden_dropout": 0.0, "micro_batch_size": MICRO, "global_batch_size": BATCH}
            line = tiny.flags(folder / "tiny_text_document", variant, groups, **{**flags, **shape, **further})
            trainer = tiny.trainer(line)
            trainer.log.enabled = False
            own = tiny.SEQ // further.get("context_parallel_size", 1)
            kept = model_saved_bytes(trainer.model.module, MICRO, own)
            SENT["bytes"] = 0
            trainer.step(trainer._iterator(trainer.train_data, 0))
            parameters = sum(p.numel() for p in trainer.model.parameters())
            found[f"{layout} {name}"] = {
                "config": to_dict(trainer.config),
                "saved": kept,
                "sent": SENT["bytes"],
                "parameters": parameters,
            }
        distributed.finalize()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
