"""Is the exported model the trained one: logits, perplexity and the cache, on the same tokens in fp32.

Shape legend: n windows, s window length, V vocabulary of the tokenizer, W padded vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sharedproj.inference.loading import LoadedModel

# fp32 rounding differs with the order of sums; relative to the largest logit.
TOLERANCE = 1e-5
_SAMPLE = Path(__file__).with_name("verification_text.txt")


@dataclass(frozen=True)
class Verification:
    """What was compared and what came out.

    Attributes:
        data: where the tokens came from; tokens: how many were scored; window: tokens in a window.
        max_difference: largest absolute difference of two logits; max_logit: largest absolute logit.
        bound: what max_difference had to stay within, tolerance x max(1, max_logit).
        perplexity: over the tokenizer's vocabulary, of the trained model; exported_perplexity: of the export.
        full_softmax_perplexity: Megatron's own, with the rows that pad the vocabulary in the softmax.
        cache_difference: largest difference between the export's logits with its cache and without.
        seconds: wall time.
    """

    data: str
    tokens: int
    window: int
    max_difference: float
    max_logit: float
    bound: float
    perplexity: float
    exported_perplexity: float
    full_softmax_perplexity: float
    cache_difference: float | None
    seconds: float

    def lines(self) -> list[str]:
        """For the terminal and the model card."""
        rows = [
            f"fp32 logits on {self.tokens} tokens ({self.data}): largest difference "
            f"{self.max_difference:.2e}, bound {self.bound:.2e} (largest logit {self.max_logit:.2f})",
            f"perplexity over the tokenizer's vocabulary: {self.perplexity:.6f} trained, "
            f"{self.exported_perplexity:.6f} exported; {self.full_softmax_perplexity:.6f} by Megatron's full "
            "softmax, vocabulary padding included",
        ]
        if self.cache_difference is not None:
            rows.append(f"logits with the cache and without: largest difference {self.cache_difference:.2e}")
        return rows


def verification_windows(
    loaded: LoadedModel, source: str, tokens: int, max_window: int = 1024
) -> tuple[Tensor, str]:
    """Token windows [n, s] to compare on, and where they come from.

    Args:
        source: prefix of an indexed data set, a text file, or empty: the run's validation or training data
            if it is on this machine, else a text that comes with this package (random ids where the
            tokenizer takes no text).
        tokens: how many, about.
    Raises:
        ValueError: if ``source`` cannot be used.
    """
    limit = loaded.config.model.max_position_embeddings
    if limit < 2:
        raise ValueError("the model has 1 position, so no token to predict; export it with --no-verify")
    stream, name = _stream(loaded, source, tokens)
    stream = stream[: max(tokens, 2)]
    window = min(limit, max_window, len(stream))
    count = max(1, len(stream) // window)
    rows = torch.from_numpy(np.ascontiguousarray(stream[: count * window])).long().view(count, window)
    return rows, name


def _stream(loaded: LoadedModel, source: str, tokens: int) -> tuple[Any, str]:
    vocabulary = loaded.tokenizer.vocab_size
    if not source:
        data = loaded.config.data
        # A blend is "weight prefix weight prefix"; any prefix of it will do.
        for prefix in [*data.valid_data_path, *data.data_path, *data.train_data_path]:
            if _is_indexed(prefix):
                try:
                    return _indexed(prefix, tokens, vocabulary), f"data set {Path(prefix).name}"
                except (OSError, ValueError):
                    continue  # moved or made by another tokenizer: not what the user asked about
    elif _is_indexed(source):
        try:
            return _indexed(source, tokens, vocabulary), f"data set {Path(source).name}"
        except (OSError, ValueError) as error:
            raise ValueError(f"--verify-data {source}: cannot be used ({error})") from None
    elif not Path(source).is_file():
        raise ValueError(
            f"--verify-data {source}: neither a text file nor an indexed data set (PREFIX.bin and PREFIX.idx)"
        )
    path = Path(source) if source else _SAMPLE
    try:
        # A character in UTF-8 is at least a byte and a token seldom more than 16 of them.
        with open(path, "rb") as stream:
            content = stream.read(16 * tokens)
        if b"\0" in content:
            raise ValueError("it is no text; of indexed data give PREFIX, without .bin")
        text = content.decode(errors="ignore" if source else "strict")
        ids = loaded.tokenizer.encode(text)
    except (OSError, ValueError) as error:
        if source:
            raise ValueError(f"--verify-data {source}: cannot be used ({error})") from None
        generator = np.random.default_rng(0)
        return generator.integers(0, vocabulary, size=tokens), "random ids: its tokenizer takes no text"
    if len(ids) < 2:
        raise ValueError(f"--verify-data {source}: holds {len(ids)} token(s); give more text")
    return np.array(ids), f"text {path.name}"


def _is_indexed(prefix: str) -> bool:
    return all(Path(prefix + suffix).is_file() for suffix in (".bin", ".idx"))


def _indexed(prefix: str, tokens: int, vocabulary: int) -> Any:
    from megatron_sharedproj.data.inspection import validate_indexed
    from megatron_sharedproj.evaluation.perplexity import read_tokens

    validate_indexed(prefix, vocabulary, max_tokens=tokens)  # a training set is too large to be read whole
    stream, _ = read_tokens(prefix, tokens)
    if len(stream) < 2:
        raise ValueError(f"{prefix}: holds {len(stream)} token(s); give more")
    return stream


@torch.no_grad()
def verify(
    loaded: LoadedModel,
    exported: Any,
    windows: Tensor,
    data: str,
    *,
    tolerance: float = TOLERANCE,
    check_cache: bool = True,
) -> Verification:
    """Run both models over the windows and compare.

    Args:
        loaded: the trained model in fp32 on the CPU, logits gathered (``parallel_output=False``).
        exported: a transformers causal language model in fp32, its V columns the tokenizer's ids.
        windows: int64 [n, s].
        tolerance: bound on the logits' difference, relative to max(1, largest logit).
        check_cache: also run one window through the exported model's cache.
    Raises:
        ValueError: if logits or perplexities differ by more than the bound.
    """
    started = time.perf_counter()
    vocabulary = loaded.tokenizer.vocab_size
    positions = torch.arange(windows.shape[1]).expand(1, -1)
    largest = difference = 0.0
    sums = [0.0, 0.0, 0.0]  # nats: trained, exported, full softmax
    scored = 0
    for row in windows.split(1):
        ours = loaded.model(row, positions, None).float()
        theirs = exported(input_ids=row, use_cache=False).logits.float()
        if theirs.shape[-1] != vocabulary:
            raise ValueError(
                f"the export gives {theirs.shape[-1]} logits, the tokenizer has {vocabulary} ids"
            )
        real = ours[..., :vocabulary]
        gap = (real - theirs).abs().max().item()
        difference = max(difference, gap if math.isfinite(gap) else math.inf)  # max() passes over a NaN
        largest = max(largest, real.abs().max().item())
        for index, logits in enumerate((real, theirs, ours)):
            sums[index] += torch.nn.functional.cross_entropy(
                logits[0, :-1].double(), row[0, 1:], reduction="sum"
            ).item()
        scored += row.shape[1] - 1
    bound = tolerance * max(1.0, largest)
    losses = [total / scored for total in sums]
    trained, other, full = (math.exp(min(loss, 700.0)) for loss in losses)
    cache = _cache_difference(exported, windows[:1]) if check_cache else None
    result = Verification(
        data, scored, windows.shape[1], difference, largest, bound, trained, other, full, cache,
        time.perf_counter() - started,
    )  # fmt: skip
    # A NaN compares as false: it has to fail, too, and infinite logits have no bound.
    if not difference <= bound < math.inf:
        raise ValueError(f"verification failed: logits differ by {difference:.3e}, bound {bound:.3e}")
    if not abs(losses[0] - losses[1]) <= bound:
        raise ValueError(
            f"verification failed: perplexity {trained} trained, {other} exported: their logarithms differ "
            f"by more than {bound:.3e}"
        )
    if cache is not None and not cache <= bound:
        raise ValueError(
            f"verification failed: with its cache logits differ by {cache:.3e}, bound {bound:.3e}"
        )
    return result


def _cache_difference(exported: Any, window: Tensor, steps: int = 8) -> float:
    """Prefill and then single steps, against the whole window at once."""
    window = window[:, :256]
    steps = min(steps, window.shape[1] - 1)
    whole = exported(input_ids=window, use_cache=False).logits
    start = window.shape[1] - steps
    out = exported(input_ids=window[:, :start], use_cache=True)
    pieces = [out.logits]
    # transformers 5.24 names it cache, those before it past_key_values.
    name = "cache" if "cache" in out else "past_key_values"
    for index in range(start, window.shape[1]):
        out = exported(input_ids=window[:, index : index + 1], **{name: out[name]}, use_cache=True)
        pieces.append(out.logits)
    return float((torch.cat(pieces, dim=1) - whole).abs().max())
