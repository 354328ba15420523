"""Text as it comes: whole characters only, stop strings wherever tokens are cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_sharedproj.data.tokenizers import BPETokenizer, NullTokenizer, train_bpe
from megatron_sharedproj.inference.text import TextStream

# Characters of 1 to 4 bytes, joined ones, and a replacement character of the text's own.
SAMPLE = (
    "na\u00efve \u65e5\u672c\u8a9e caf\u00e9 \U0001f600\U0001f468\u200d\U0001f469 e\u0301 \ufffd end \u20ac\n"
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE with next to no merges: every character beyond ASCII takes several tokens."""
    pytest.importorskip("tokenizers")
    return train_bpe(["plain words only"] * 5, 270, tmp_path_factory.mktemp("bpe"))


def stream(tokenizer: Any, ids: list[int], prompt: list[int] | None = None, stop: Any = ()) -> list[str]:
    out = TextStream(tokenizer, prompt or [], stop)
    pieces = []
    for token in ids:
        pieces.append(out.push(token))
        if out.stopped:
            break
    pieces.append(out.finish())
    assert out.text == "".join(pieces)
    return pieces


def test_pieces_hold_whole_characters(byte_level: Any) -> None:
    ids = byte_level.encode(SAMPLE * 4)
    assert len(ids) > 1.5 * len(SAMPLE * 4)
    pieces = stream(byte_level, ids, byte_level.encode("before "))
    assert "".join(pieces) == SAMPLE * 4
    # Every piece is a run of the text's own characters; the text's one replacement character is its own.
    assert sum("\ufffd" in piece for piece in pieces) == 4
    # Nothing is held back longer than a character needs.
    shown = 0
    for count, piece in enumerate(pieces[:-1], start=1):
        shown += len(piece)
        certain = byte_level.decode(ids[:count])
        assert shown >= len(certain) - 1


def test_bytes_that_are_no_character(byte_level: Any) -> None:
    """A model may write anything: the text is that of decoding all at once, in pieces that add up."""
    generator = random.Random(3)
    for _ in range(50):
        ids = [generator.randrange(byte_level.vocab_size - 1) for _ in range(60)]
        prompt = byte_level.encode("prompt \u65e5 ")
        whole = byte_level.decode(prompt + ids)[len("prompt \u65e5 ") :]
        assert "".join(stream(byte_level, ids, prompt)) == whole


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """As SentencePiece models have it: a token per byte, whose run decodes as a whole or not at all."""
    tokenizers = pytest.importorskip("tokenizers")
    decoders = tokenizers.decoders
    pieces = ["<unk>", "</s>", *(f"<0x{index:02X}>" for index in range(256)), "\u2581a", "b"]
    model = tokenizers.models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    rust = tokenizers.Tokenizer(model)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return BPETokenizer("fallback", rust, "</s>", None, "")


FALLBACK_TEXT = (" a", "b", "\u65e5\u672c\u8a9e", "\U0001f600", "\u00e9")


def fallback_ids(text: str) -> list[int]:
    if text in (" a", "b"):
        return [258 + (text == "b")]
    return [2 + byte for byte in text.encode()]


def test_a_byte_per_token_with_byte_fallback(byte_fallback: Any) -> None:
    assert byte_fallback.decode([258, *fallback_ids("\u65e5")[:2]]) == "a\ufffd\ufffd"
    ids = [258, *fallback_ids("\u65e5\u672c"), 259]
    for prompt in ([], [258, 259]):
        first = " a" if prompt else "a"
        assert stream(byte_fallback, ids, prompt) == [first, "", "", "\u65e5", "", "", "\u672c", "b", ""]
    generator = random.Random(4)
    for _ in range(50):
        parts = [generator.choice(FALLBACK_TEXT) for _ in range(40)]
        ids = [index for part in parts for index in fallback_ids(part)]
        assert "".join(stream(byte_fallback, ids, [259])) == "".join(parts)


def test_bytes_that_are_no_character_with_byte_fallback(byte_fallback: Any) -> None:
    """What is out cannot be taken back; the rest is what the tokens after it say."""
    ids = [258, *fallback_ids("\u65e5"), 2 + 0xE6, 259, 258]
    assert "".join(stream(byte_fallback, ids)) == "a\u65e5\ufffdb a"
    assert "".join(stream(byte_fallback, [2 + 0xE6] * 9 + [258])) == "\ufffd" * 9 + " a"


def test_an_unfinished_character_comes_at_the_end(byte_level: Any) -> None:
    ids = byte_level.encode("a\U0001f600")[:-1]
    pieces = stream(byte_level, ids)
    assert pieces[:-1] == ["a", *[""] * (len(ids) - 1)]
    assert pieces[-1] == "\ufffd"


def test_separators_between_tokens_belong_to_the_text() -> None:
    tokenizer = NullTokenizer(300)
    assert stream(tokenizer, [7, 8], [5, 6]) == [" 7", " 8", ""]
    assert stream(tokenizer, [7, 8]) == ["7", " 8", ""]
    long = list(range(200))
    assert "".join(stream(tokenizer, long, [5])) == "".join(f" {index}" for index in long)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["lo wo"], "hel"),
        (["world", "lo"], "hel"),
        (["o", "hello world!"], "hell"),
        (["hello"], ""),
        (["!"], "hello world"),
        (["d!x", "ld! "], "hello world!"),
        (["\u65e5"], "hello world!"),
        ([""], "hello world!"),
    ],
)
def test_stop_strings(byte_level: Any, stop: list[str], expected: str) -> None:
    ids = byte_level.encode("hello world!")
    for cut in range(1, len(ids)):  # what is held back comes when the tokens end before the stop string does
        whole = byte_level.decode(ids[:cut])
        places = [whole.find(text) for text in stop if text and text in whole]
        assert "".join(stream(byte_level, ids[:cut], None, stop)) == whole[: min(places, default=None)]
    assert "".join(stream(byte_level, ids, None, stop)) == expected


def test_a_stop_string_of_many_bytes(byte_level: Any) -> None:
    ids = byte_level.encode("\u65e5\u672c\u8a9e\u65e5\u672c\U0001f600 rest")
    assert "".join(stream(byte_level, ids, None, ["\u672c\U0001f600"])) == "\u65e5\u672c\u8a9e\u65e5"


def test_what_may_begin_a_stop_string_is_held_back_and_no_more(byte_level: Any) -> None:
    out = TextStream(byte_level, [], ["aab"])
    ids = byte_level.encode("xaaac")
    assert [out.push(token) for token in ids] == ["x", "", "", "a", "aac"]
    assert out.finish() == "" and not out.stopped
    out = TextStream(byte_level, [], ["aab"])
    assert [out.push(token) for token in byte_level.encode("aaab")] == ["", "", "a", ""]
    assert out.stopped and out.text == "a" and out.finish() == ""


def test_slow_decoding_is_not_repeated_for_the_whole_text() -> None:
    """The work per token does not grow with the text."""

    class Counting(NullTokenizer):
        longest = 0

        def decode(self, ids: Any) -> str:
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting(50)
    stream(tokenizer, [1] * 500, [2] * 500)
    assert tokenizer.longest < 20


def test_sample_is_what_it_says() -> None:
    assert {len(character.encode()) for character in SAMPLE} == {1, 2, 3, 4}
    assert Path(__file__).read_bytes().isascii()
