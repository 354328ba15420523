"""Errors of variants.py, which names command-line flags, in the words of a Python call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# The longest first: one flag is the beginning of another's sentence.
_ARGUMENTS = {
    "--position-embedding-type rope": "rope=True",
    "or use learned_absolute": "or use learned positions",
    "--group-query-attention": "num_groups",
    "--num-attention-heads": "num_heads",
    "--num-query-groups": "num_groups",
    "--attention-variant": "variant",
    "--kv-cache-policy": "policy",
    "--rotary-percent": "rotary_percent",
    "--kv-rotary": "kv_rotary",
}


@contextlib.contextmanager
def argument_names() -> Iterator[None]:
    """Raise a ValueError of the block again, with arguments named where it names flags."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for flag, argument in _ARGUMENTS.items():
            message = message.replace(flag, argument)
        raise ValueError(message) from None
