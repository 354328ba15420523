"""lm-eval's ``hf`` model as our sub-command runs it on an exported directory.

Imports lm-eval and transformers.
"""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from megatron_sharedproj.evaluation.lm_eval_tasks import check_answer, prompt_room


class ExportedLM(HFLM):  # type: ignore[misc]
    """The numbers are lm-eval's own; added are one-line errors, the count of what was cut, and quiet.

    Attributes:
        truncated: requests whose context lost tokens on the left.
    """

    truncated = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=_hidden(disable_tqdm)))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            check_answer(continuation, self.max_length)
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        return list(super()._loglikelihood_tokens(requests, disable_tqdm=_hidden(disable_tqdm), **options))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return list(super().loglikelihood_rolling(requests, disable_tqdm=_hidden(disable_tqdm)))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for context, kwargs in (request.args for request in requests):
            settings = normalize_gen_kwargs(kwargs, self.max_gen_toks)
            room = prompt_room(settings["max_gen_toks"], self.max_length)
            self.truncated += len(self.tok_encode(context)) > room
        return list(super().generate_until(requests, disable_tqdm=_hidden(disable_tqdm)))


def _hidden(disable_tqdm: bool) -> bool:
    return disable_tqdm or not sys.stderr.isatty()
