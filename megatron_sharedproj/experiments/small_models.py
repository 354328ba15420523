"""Small transformers over the package's attention in plain PyTorch, for tasks that are made or images.

Pre-norm blocks (LayerNorm, attention, LayerNorm, MLP with exact GELU) and a last norm, as in the paper's
synthetic and vision tasks (arXiv 2606.04032). Embedding and head belong to the task.

Shape legend: b batch, s sequence, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megatron_sharedproj.torch_layers import SharedProjectionAttention

# Names on plots and in tables -> variant, and whether all heads share one key/value head (MQA).
FORMS: dict[str, tuple[str, bool]] = {
    "qkv": ("qkv", False),
    "q_eq_k": ("q_eq_k", False),
    "q_eq_k+": ("(Q=K)+", False),
    "qk_eq_v": ("qk_eq_v", False),
    "q_eq_k_eq_v": ("q_eq_k_eq_v", False),
    "q_eq_k_eq_v+": ("(Q=K=V)+", False),
    "mqa": ("qkv", True),
    "q_mqa": ("qk_eq_v", True),
}
# How a reader of the paper knows them.
PAPER_NAMES = {
    "qkv": "QKV",
    "q_eq_k": "Q=K",
    "q_eq_k+": "(Q=K)+",
    "qk_eq_v": "K=V",
    "q_eq_k_eq_v": "Q=K=V",
    "q_eq_k_eq_v+": "(Q=K=V)+",
    "mqa": "MQA",
    "q_mqa": "Q-MQA",
}


@dataclass(frozen=True)
class SmallConfig:
    """Shape of a small transformer.

    Attributes:
        form: a key of FORMS; causal: a token sees itself and those before it (the + forms see all).
        mlp_size: width of the MLP; 0: 4 * hidden_size.
        dropout: after attention and MLP, in training.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    form: str = "qkv"
    causal: bool = False
    mlp_size: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form {self.form}: unknown; choose from {', '.join(FORMS)}")
        for name in ("hidden_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}: not divisible by num_heads {self.num_heads}; change one"
            )


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). [b, s, d] -> [b, s, d]."""

    def __init__(self, config: SmallConfig):
        super().__init__()
        d, width = config.hidden_size, config.mlp_size or 4 * config.hidden_size
        variant, shared = FORMS[config.form]
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = SharedProjectionAttention(
            d, config.num_heads, variant=variant, num_groups=1 if shared else None, causal=config.causal
        )
        self.mlp = nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class SmallTransformer(nn.Module):
    """Blocks and a last LayerNorm. [b, s, d] -> [b, s, d]."""

    def __init__(self, config: SmallConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
