"""lm-eval's model interface over a Megatron checkpoint: ``--model megatron_sharedproj``.

    lm_eval --model megatron_sharedproj --model_args load=runs/k_eq_v --tasks piqa

works where lm-eval reads entry points (group ``lm_eval.models``); 0.4.13 does not yet, so there
``python -m megatron_sharedproj.evaluation.lm_eval_model`` takes the same arguments, and
``tools/evaluate.py lm-eval`` needs neither. Importing this module imports lm-eval.

Numbers agree with lm-eval's own ``hf`` model on an export of the same checkpoint: same ids, same prefix token
(end of document), same windows and truncation, log-softmax in float32 over the tokenizer's vocabulary.

Shape legend: s sequence, b batch, V padded vocabulary, v the tokenizer's, c tokens of a continuation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from megatron_sharedproj import distributed
from megatron_sharedproj.config import to_dict
from megatron_sharedproj.evaluation.lm_eval_tasks import check_answer, prompt_room
from megatron_sharedproj.inference.engine import Engine, EngineOptions, Request
from megatron_sharedproj.inference.loading import LoadedModel, load_model
from megatron_sharedproj.inference.sampling import Sampling

NAME = "megatron_sharedproj"
DEFAULT_BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 256  # lm-eval's, where a task names no number
TOP_K = 50  # transformers' generate, where a task that samples names none

# (strings or None, ids of the context, ids of the continuation), as lm-eval's Collator expects them.
TokenRequest = tuple[Any, list[int], list[int]]


class MegatronSharedProjLM(TemplateLM):
    """A checkpoint as lm-eval sees it.

    Data-parallel ranks are lm-eval's ranks: each takes its share of the documents. Tensor-parallel ranks of
    a replica do the same work on gathered logits.

    Args:
        load: a ``--save`` folder or one iter_NNNNNNN of it, loaded here; or a model that is loaded already,
            built with ``parallel_output=False``.
        batch_size: rows of a forward pass.
        max_length: tokens that the model sees at once; default: its positions.
        device: ignored, the ranks' devices are torchrun's; lm-eval passes it.
        max_batch_size: ignored likewise (there is no batch size ``auto``).
        Others: as the flags of inference.loading.add_loading_args.
    Raises:
        ValueError: naming the flag, its value and the remedy.
    """

    def __init__(
        self,
        load: str | LoadedModel,
        *,
        tokenizer_type: str | None = None,
        tokenizer_model: str | None = None,
        vocab_file: str | None = None,
        merge_file: str | None = None,
        tensor_model_parallel_size: int = 1,
        bf16: bool = False,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _positive("--batch-size", DEFAULT_BATCH_SIZE if batch_size is None else batch_size)
        if isinstance(load, LoadedModel):
            self.loaded = load
        else:
            flags = argparse.Namespace(
                load=load,
                tokenizer_type=tokenizer_type,
                tokenizer_model=tokenizer_model,
                vocab_file=vocab_file,
                merge_file=merge_file,
                tensor_model_parallel_size=int(tensor_model_parallel_size),
                bf16=bf16,
            )
            self.loaded = load_model(flags, parallel_output=False)
        from megatron.core import parallel_state

        self._group = parallel_state.get_data_parallel_group()
        self._rank = parallel_state.get_data_parallel_rank()
        self._world_size = parallel_state.get_data_parallel_world_size()
        self._device = self.loaded.device
        positions = self.loaded.config.model.max_position_embeddings
        self.max_length = int(max_length or positions)
        if not 1 <= self.max_length <= positions:
            raise ValueError(
                f"--max-length {max_length}: must be from 1 to the model's {positions} positions"
            )
        self.truncated = 0  # requests whose context lost tokens on the left

    def _hidden(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or not distributed.is_rank_0() or not sys.stderr.isatty()

    @property
    def eot_token_id(self) -> int:
        return int(self.loaded.tokenizer.eod)

    @property
    def tokenizer_name(self) -> str:
        return f"{self.loaded.tokenizer.name}-{self.loaded.tokenizer.sha256[:16]}".replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model."""
        return {
            "model_folder": str(self.loaded.folder),
            "model_config": to_dict(self.loaded.config.model),
            "model_dtype": str(self.loaded.model.config.params_dtype),
            "tokenizer": self.loaded.tokenizer.describe(),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, nothing added in front: no token stood there in training either.

        A spelled special token becomes its id, as it does in lm-eval's ``hf`` model. Our token files never
        contain that: only the end of a document has the end-of-document id.
        """
        ids: list[int] = self.loaded.tokenizer.encode_batch_parsing_special_tokens([string])[0]
        return ids

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all data-parallel ranks, one row each (scalars: one element each)."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor, group=self._group)
        return torch.stack(parts) if tensor.dim() == 0 else torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world_size == 1:
            return [obj]
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, obj, group=self._group)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier(group=self._group)

    @torch.no_grad()
    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [b, s, V] of token rows, filled up on the right: causal attention never looks there."""
        width = max(map(len, rows))
        eod = self.eot_token_id
        tokens = torch.tensor([[*row, *[eod] * (width - len(row))] for row in rows], device=self.device)
        positions = torch.arange(width, device=self.device).expand_as(tokens)
        logits: Tensor = self.loaded.model(tokens, positions, None)
        return logits

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = super().loglikelihood(requests, disable_tqdm=self._hidden(disable_tqdm))
        return list(answers)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding gives it."""
        # Continuations that differ in their last token only (answers A to D) share one forward pass.
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        for _, context, continuation in requests:
            check_answer(continuation, self.max_length)
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        vocab_size = self.loaded.tokenizer.vocab_size
        answers: list[tuple[float, bool]] = []
        progress = tqdm(total=len(requests), disable=self._hidden(disable_tqdm), desc="log-likelihoods")
        for chunk in order.get_batched(n=self.batch_size):
            logits = self._logits([self._input(context, continuation) for _, context, continuation in chunk])
            for (text, context, continuation), row in zip(chunk, logits, strict=True):
                end = min(len(context) + len(continuation) - 1, self.max_length)
                scored = row[end - len(continuation) : end, :vocab_size].float()  # [c, v]
                log_probs, greedy = scored.log_softmax(-1), scored.argmax(-1)
                # The requests that share this pass; each has its own strings and continuation.
                for key, ids, shared in order.get_cache(
                    req_str=text, cxt_toks=context, cont_toks=continuation, logits=log_probs[None]
                ):
                    wanted = torch.tensor(ids, device=self.device)
                    chosen = shared[0, -len(ids) :].gather(1, wanted[:, None])
                    answer = (float(chosen.sum()), bool((greedy[-len(ids) :] == wanted).all()))
                    answers.append(answer)
                    if key is not None:  # rolling requests are cached whole, by their caller
                        self.cache_hook.add_partial("loglikelihood", key, answer)
                    progress.update()
        progress.close()
        return list(order.get_original(answers))

    def _input(self, context: list[int], continuation: list[int]) -> list[int]:
        """The tokens that go in: all but the last, cut on the left to the model's length."""
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of each whole text after an end-of-document token, in disjoint windows.

        Windows are lm-eval's: the first holds max_length tokens, later ones follow one token of context, the
        last is filled up with context on its left.
        """
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for index, (text,) in enumerate(request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each prompt up to a stop string or the end of the document, neither included."""
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda request: (-len(request[0]), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        texts: list[str] = []
        progress = tqdm(total=len(requests), disable=self._hidden(disable_tqdm), desc="generations")
        for group in order.get_batched(n=0):  # all that want the same: the engine makes the batches
            found = self._generate([context for context, _ in group], group[0][1], progress)
            for (context, kwargs), text in zip(group, found, strict=True):
                self.cache_hook.add_partial("generate_until", (context, kwargs), text)
            texts += found
        progress.close()
        return list(order.get_original(texts))

    def _generate(self, contexts: list[str], gen_kwargs: dict[str, Any], progress: Any) -> list[str]:
        tokenizer = self.loaded.tokenizer
        settings = _generation_settings(gen_kwargs, tokenizer.decode([self.eot_token_id]))
        room = prompt_room(settings.max_new_tokens, self.max_length)
        requests = []
        for index, context in enumerate(contexts):
            ids = self.tok_encode(context) or [self.eot_token_id]
            self.truncated += len(ids) > room
            # A random stream of its own on every rank.
            stream = index * self.world_size + self.rank
            requests.append(
                Request(tuple(ids[-room:]), settings.max_new_tokens, tuple(settings.stop), prompt=stream)
            )
        engine = Engine(self.loaded, EngineOptions(max_batch_size=self.batch_size))
        completions = engine.run(requests, settings.sampling, on_done=lambda _: progress.update())
        hidden = {tokenizer.eod, *tokenizer.special_tokens().values()}
        texts = (
            tokenizer.decode([token for token in completion.tokens if token not in hidden])
            for completion in completions
        )
        return [postprocess_generated_text(text, settings.stop, None) for text in texts]


@dataclass(frozen=True)
class _GenerationSettings:
    max_new_tokens: int
    stop: list[str]
    sampling: Sampling


def _generation_settings(gen_kwargs: dict[str, Any], eod: str) -> _GenerationSettings:
    """A task's generation_kwargs. Raises ValueError for one that is not known here."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, DEFAULT_NEW_TOKENS))
    stop = handle_stop_sequences(settings.pop("until", None), eos=eod)
    length = int(settings.pop("max_gen_toks"))
    sampled = bool(settings.pop("do_sample", False))
    temperature = float(settings.pop("temperature", 1.0))
    sampling = Sampling(
        temperature=temperature if sampled else 0.0,
        top_k=int(settings.pop("top_k", TOP_K) or 0),
        top_p=float(settings.pop("top_p", 1.0) or 1.0),
        seed=torch.initial_seed() % 2**63,  # what lm-eval was given
    )
    if settings:
        raise ValueError(f"--tasks: generation_kwargs {', '.join(settings)} of a task: not supported here")
    return _GenerationSettings(length, stop, sampling)


def _positive(flag: str, value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"{flag} {value}: must be a whole number of at least 1")
    return int(value)


def register() -> None:
    """Make ``megatron_sharedproj`` a model name of lm-eval, unless an entry point did."""
    if NAME not in model_registry:
        model_registry.register(NAME)(MegatronSharedProjLM)


register()


def main() -> None:
    """lm-eval's own command line, with our model's name known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
