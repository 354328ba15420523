"""How the next token is chosen, and the random stream of each text.

Shape legend: b batch, V padded vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 and top_p 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def check(self) -> None:
        """Raise ValueError for values out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: must be at least 0 (0: greedy)")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: must be at least 0 (0: all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: must be in (0, 1]")


def random_stream(seed: int, prompt: int, sample: int) -> torch.Generator:
    """The generator of one text, on the CPU: it depends on these three numbers and on nothing else."""
    digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def uniforms(streams: list[torch.Generator]) -> Tensor:
    """The next number of each stream: float64 [b] in [0, 1)."""
    drawn = [torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams]
    return torch.cat(drawn)


def sample(logits: Tensor, sampling: Sampling, drawn: Tensor) -> Tensor:
    """Choose tokens by the inverse of each row's cumulative distribution.

    One number per row, instead of torch.multinomial's one generator for all: a row's token does not depend on
    its neighbours.

    Args:
        logits: float32 [b, V], -inf where forbidden.
        drawn: float64 [b] in [0, 1); greedy does not look at it.
    Returns:
        int64 [b].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The largest is 0 before the division: a temperature near 0 makes the others -inf, and no NaN. Beyond
    # these limits float32 would read the temperature itself as 0 or as infinite.
    temperature = min(max(sampling.temperature, 1e-30), 1e30)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if sampling.top_k:
        kept = torch.topk(logits, min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        # A token stays while the mass before it is below top_p, so one always stays.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    mass = logits.double().softmax(-1).cumsum(-1)
    total = mass[:, -1:]
    # Below the total whatever the rounding, so that the token found has a mass of its own.
    wanted = torch.minimum(drawn.to(mass.device)[:, None] * total, total * (1 - 2**-52))
    return torch.searchsorted(mass, wanted, right=True).squeeze(-1)
