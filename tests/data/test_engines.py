"""Engines: each gives the ids of Hugging Face `tokenizers` or is not used; what is wrong is noticed."""

import json
import os
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from megatron_sharedproj.data import engines
from megatron_sharedproj.data.engines import ENGINES, Engine, FastokensEngine, Verifier, choose_engine, probe
from megatron_sharedproj.data.tokenizers import (
    END_OF_TEXT,
    BPETokenizer,
    NullTokenizer,
    Tokenizer,
    build_tokenizer,
    train_bpe,
)

FAST = ("fastokens", "gigatoken")
MODULES = {"fastokens": "fastokens", "gigatoken": "gigatoken.gigatoken_rs"}
FORGED = f"one{END_OF_TEXT}two {END_OF_TEXT} {END_OF_TEXT[:-1]}\n{END_OF_TEXT}"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def real_texts() -> list[str]:
    """Prose, documentation and code that every machine has: about 0.5 MB."""
    root, library = Path(__file__).parents[2], Path(json.__file__).parents[1]
    files = [root / "README.md", root / "LICENSE", *sorted(library.glob("[a-d]*.py"))]
    return [file.read_text(encoding="utf-8") for file in files][:40]


def random_texts(count: int, seed: int) -> list[str]:
    """Pieces that tokenizers treat specially, in random order, with characters of all of Unicode."""
    numbers = random.Random(seed)
    pieces = (
        [
            "a",
            "The",
            " the",
            "123",
            "4",
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "\x00",
            "'s",
            "'LL",
            "n't",
            "_",
            "--",
            "//",
        ]
        + [END_OF_TEXT, "<|", "|>", "endoftext", "!", "...", "\x85", "\u00a0", "\u180e", "\u3000", "\u200d"]
        + [
            "\ufeff",
            "\u0301",
            "e\u0301",
            "\u00e9",
            "\u6f22",
            "\uac00",
            "\U0001f600",
            "\u2167",
            "\u0663",
            "\u017f",
        ]
    )
    planes = ((0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    texts = []
    for _ in range(count):
        drawn = [
            numbers.choice(pieces) * numbers.choice((1, 1, 1, 1, 2, 30)) for _ in range(numbers.randrange(9))
        ]
        drawn += [chr(numbers.randrange(*numbers.choice(planes))) for _ in range(numbers.randrange(4))]
        numbers.shuffle(drawn)
        texts.append("".join(drawn))
    return texts


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(real_texts(), 3000, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return build_tokenizer("HuggingFaceTokenizer", str(directory))


@pytest.fixture(scope="module")
def gpt2(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The trained vocabulary as OpenAI's two files, which no library loads as a tokenizer.json."""
    path = tmp_path_factory.mktemp("gpt2")
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (path / "encoder.json").write_text(json.dumps(model["vocab"]))
    (path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return build_tokenizer("GPT2BPETokenizer", str(path))


def variant(directory: Path, **changes: Any) -> Tokenizer:
    """The trained tokenizer with another pre-tokenizer or normalizer, or with more added tokens."""
    rust = RustTokenizer.from_file(str(directory / "tokenizer.json"))
    rust.add_tokens(changes.pop("added", []))
    for name, value in changes.items():
        setattr(rust, name, value)
    return BPETokenizer("variant", rust, END_OF_TEXT, None, "0")


def metaspace() -> Tokenizer:
    """What SentencePiece's BPE models become: no byte alphabet, and spaces as U+2581."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyz"
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "th", "\u2581th"]
    merges = [("t", "h"), ("\u2581", "th")]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    rust = RustTokenizer(model)
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return BPETokenizer("metaspace", rust, "</s>", None, "0")


def forced(tokenizer: Tokenizer, name: str, parse_special_tokens: bool = False) -> Engine:
    if name in MODULES:
        pytest.importorskip(MODULES[name], reason=f"{name} is not installed; the dev extra has it")
    return choose_engine(tokenizer, name, parse_special_tokens)


def rows(engine: Engine, texts: Sequence[str]) -> list[list[int]]:
    ids, lengths = engine.encode(texts)
    assert ids.dtype == np.uint32 and ids.ndim == 1 and lengths.dtype == np.int64
    assert lengths.shape == (len(texts),) and lengths.sum() == ids.size
    return [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []


@pytest.mark.parametrize("parse", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_ids_are_those_of_tokenizers(name: str, parse: bool, tokenizer: Tokenizer, gpt2: Tokenizer) -> None:
    texts = [*real_texts(), FORGED, "", *random_texts(3000, seed=5)]
    for each in (tokenizer, gpt2):
        description = each.to_json()
        assert description is not None
        reference = RustTokenizer.from_str(description)  # not through anything of ours
        reference.encode_special_tokens = not parse
        expected = [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]
        assert rows(forced(each, name, parse), texts) == expected


@pytest.mark.parametrize("name", ENGINES)
def test_text_spells_a_special_token_only_when_asked(name: str, tokenizer: Tokenizer) -> None:
    (plain,) = rows(forced(tokenizer, name), [FORGED])
    assert tokenizer.eod not in plain and tokenizer.decode(plain) == FORGED
    (parsed,) = rows(forced(tokenizer, name, True), [FORGED])
    assert parsed.count(tokenizer.eod) == 3 and tokenizer.decode(parsed) == FORGED
    # The reference is left as it was.
    assert tokenizer.eod not in tokenizer.encode(FORGED)


@pytest.mark.parametrize("parse", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_added_tokens_that_are_not_special_match(name: str, parse: bool, directory: Path) -> None:
    spaces = [AddedToken(" " * count, normalized=False) for count in range(2, 25)]  # GPT-NeoX has these
    tokenizer = variant(directory, added=[*spaces, AddedToken("<mark>", lstrip=True)])
    texts = ["if x:\n        return\n" + " " * 60 + "y", f"a  <mark>b {END_OF_TEXT}   c", "\t   \n   "]
    expected = engines.reference_encoder(tokenizer, parse)(texts)
    assert rows(forced(tokenizer, name, parse), texts) == expected
    added = {token for token in tokenizer.added_tokens() if token not in tokenizer.special_tokens()}
    assert len(added) == 24
    assert {len(tokenizer.decode([index])) for index in expected[0]} >= {8, 24}


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(CL100K), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        },
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Lowercase(), "added": [AddedToken("FooBar"), AddedToken("<M>")]},
        {"added": [AddedToken("foo", single_word=True), AddedToken("aa"), AddedToken("aab", rstrip=True)]},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\w+|\s+|[^\w\s]+"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        },
    ],
    ids=["prefix-space", "cl100k", "nfc", "nfkc", "lowercase", "added", "own-regex"],
)
def test_auto_is_exact_for_any_tokenizer(changes: dict[str, Any], directory: Path) -> None:
    """Whichever engine loads it and passes the probe: fastokens fails it for the last one (U+180E)."""
    tokenizer = variant(directory, **changes)
    texts = [*real_texts()[:5], FORGED, "a foo aab  foofoo FooBar <M>", *random_texts(1500, seed=6)]
    for parse in (False, True):
        engine = choose_engine(tokenizer, parse_special_tokens=parse)
        assert rows(engine, texts) == engines.reference_encoder(tokenizer, parse)(texts)
        assert [reason.split(":")[0] for reason in engine.reasons] == list(
            ENGINES[: ENGINES.index(engine.name)]
        )


@pytest.mark.parametrize("name", ENGINES)
def test_empty_texts_and_batches(name: str, tokenizer: Tokenizer) -> None:
    engine = forced(tokenizer, name)
    assert rows(engine, []) == []
    assert rows(engine, ["", "", "a", ""])[::3] == [[], []]
    assert rows(engine, [""]) == [[]]


@pytest.mark.parametrize("name", ENGINES)
def test_a_lone_surrogate_is_named(name: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="text 1 of the batch is not valid Unicode: .*surrogates"):
        forced(tokenizer, name).encode(["good", "bad \ud800", "good"])


def test_a_batch_of_tokenizers_goes_in_pieces(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", *real_texts(), "", "last"]
    whole = rows(choose_engine(tokenizer, "tokenizers"), texts)
    monkeypatch.setattr(engines, "_REFERENCE_CHARACTERS", 5000)
    assert rows(choose_engine(tokenizer, "tokenizers"), texts) == whole


def test_auto_takes_the_fastest_installed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAST:
        pytest.importorskip(MODULES[name], reason=f"{name} is not installed; the dev extra has it")
    assert choose_engine(tokenizer).name == "fastokens"
    monkeypatch.setitem(sys.modules, "fastokens", None)
    engine = choose_engine(tokenizer)
    assert engine.name == "gigatoken"
    assert engine.reasons == ["fastokens: not installed (pip install fastokens)"]
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    engine = choose_engine(tokenizer)
    assert engine.name == "tokenizers" and len(engine.reasons) == 2


@pytest.mark.parametrize("name", FAST)
def test_forced_but_not_installed(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(ValueError) as caught:
        choose_engine(tokenizer, name)
    assert str(caught.value) == (
        f"--engine {name}: not installed (pip install {name}); use --engine auto or tokenizers"
    )


def test_an_unknown_engine(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="--engine tiktoken: no such engine; use auto, fastokens, gigatoken"):
        choose_engine(tokenizer, "tiktoken")


def test_fastokens_cannot_load_sentencepiece() -> None:
    pytest.importorskip("fastokens", reason="fastokens is not installed; the dev extra has it")
    tokenizer = metaspace()
    with pytest.raises(
        ValueError, match=r"--engine fastokens: cannot load metaspace \(.*\); use --engine auto"
    ) as caught:
        choose_engine(tokenizer, "fastokens")
    assert "\n" not in str(caught.value)
    engine = choose_engine(tokenizer)
    assert engine.name != "fastokens" and engine.reasons[0].startswith("fastokens: cannot load")
    texts = ["the thin path </s> th", "na\u00efve \U0001f600", *random_texts(500, seed=7)]
    assert rows(engine, texts) == tokenizer.encode_batch(texts)


def test_null_tokenizer_has_one_engine() -> None:
    tokenizer = NullTokenizer(100)
    engine = choose_engine(tokenizer)
    assert engine.name == "tokenizers" and rows(engine, ["1 2", "", "98"]) == [[1, 2], [], [98]]
    with pytest.raises(ValueError, match="id 99 is outside"):
        engine.encode(["99"])
    with pytest.raises(ValueError, match="--engine gigatoken: NullTokenizer has no tokenizer.json"):
        choose_engine(tokenizer, "gigatoken")


def test_a_tokenizer_that_cannot_help_it_is_refused() -> None:
    """In a Unigram model `</s>` is a piece like any other, whatever encode_special_tokens says."""
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *((letter, -3.0) for letter in "abcs</>")]
    rust = RustTokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = BPETokenizer("unigram", rust, "</s>", None, "0")
    assert tokenizer.eod in tokenizer.encode("a</s>b")
    with pytest.raises(
        ValueError, match="reads the text '</s>' as its special token 1; .*--parse-special-tokens"
    ):
        choose_engine(tokenizer)
    assert tokenizer.eod in rows(choose_engine(tokenizer, parse_special_tokens=True), ["a</s>b"])[0]


class Careless(FastokensEngine):
    """Right on plain text, wrong where an end-of-text marker is spelled."""

    def _encode(self, texts: list[str]) -> tuple[engines.Ids, engines.Lengths]:
        return super()._encode([text.replace("<|", "< |") for text in texts])


class Broken(FastokensEngine):
    def _encode(self, texts: list[str]) -> tuple[engines.Ids, engines.Lengths]:
        raise OverflowError("too much\nof it")


@pytest.mark.parametrize("wrong", [Careless, Broken])
def test_the_probe_finds_a_wrong_engine(
    wrong: type[FastokensEngine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastokens", reason="fastokens is not installed; the dev extra has it")
    description = tokenizer.to_json()
    assert description is not None
    assert probe(choose_engine(tokenizer, "fastokens"), tokenizer) is None
    difference = probe(wrong(description, False), tokenizer)
    assert difference is not None
    assert END_OF_TEXT in difference if wrong is Careless else "OverflowError: too much" in difference
    monkeypatch.setitem(engines._FAST, "fastokens", wrong)
    engine = choose_engine(tokenizer)
    assert engine.name != "fastokens" and engine.reasons[0] == f"fastokens: {difference}"
    with pytest.raises(
        ValueError, match="--engine fastokens: (gives other ids|fails on awkward text)"
    ) as caught:
        choose_engine(tokenizer, "fastokens")
    assert "\n" not in str(caught.value)


def test_the_verifier_finds_a_wrong_engine(tokenizer: Tokenizer) -> None:
    pytest.importorskip("fastokens", reason="fastokens is not installed; the dev extra has it")
    description = tokenizer.to_json()
    assert description is not None
    careless, verifier = Careless(description, False), Verifier(tokenizer, "fastokens")
    for text in ("", "Plain prose.", *real_texts()[:3]):
        verifier.check(text, careless.encode([text])[0])
    text = f"some words before {END_OF_TEXT} and after"
    with pytest.raises(ValueError) as caught:
        verifier.check(text, careless.encode([text])[0])
    before = len(os.path.commonprefix([rows(careless, [text])[0], tokenizer.encode(text)]))
    message = str(caught.value)
    assert message.startswith(f"--engine fastokens: token {before} of a document is ")
    assert "endoftext" in message and message.endswith("; use --engine tokenizers") and "\n" not in message


def test_the_verifier_compares_lengths_and_modes(tokenizer: Tokenizer) -> None:
    verifier, ids = Verifier(tokenizer, "gigatoken"), tokenizer.encode(FORGED)
    verifier.check(FORGED, np.array(ids, np.uint16))
    with pytest.raises(ValueError, match=f"token {len(ids) - 1} of a document is missing, but {ids[-1]} by"):
        verifier.check(FORGED, ids[:-1])
    with pytest.raises(
        ValueError, match=f"token {len(ids)} of a document is {tokenizer.eod}, but missing by"
    ):
        verifier.check(FORGED, [*ids, tokenizer.eod])
    parsed = rows(choose_engine(tokenizer, "tokenizers", True), [FORGED])[0]
    Verifier(tokenizer, "gigatoken", True).check(FORGED, parsed)
    with pytest.raises(ValueError, match="--engine gigatoken: token"):
        verifier.check(FORGED, parsed)


class Held:
    """A gigatoken tokenizer that can be watched: Rust objects take no weak reference."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def encode(self, text: str) -> Any:
        return self._fast.encode(text)


def test_gigatoken_forgets(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache has no bound: the tokenizer is built anew as it grows, and the old one is freed before."""
    engine = forced(tokenizer, "gigatoken")
    assert isinstance(engine, engines.GigatokenEngine)
    numbers, load, freed = random.Random(8), engine._load, []
    texts = [" ".join("".join(numbers.choices("abcdefghijklmnop", k=9)) for _ in range(40_000))] * 3
    expected = [tokenizer.encode(texts[0])] * 3
    engine._fast = Held(engine._fast)
    old = weakref.ref(engine._fast)

    def watched(description: str) -> Any:
        freed.append(old() is None)
        return load(description)

    engine._load = watched
    assert rows(engine, texts) == expected and not freed  # a little growth is fine
    # As if it had grown: in a process that did much before, growth may go unseen into memory that it has.
    grown = engine._resident + engines.GIGATOKEN_CACHE_BYTES + 1
    monkeypatch.setattr(engines, "_resident_bytes", lambda: grown)
    assert rows(engine, texts) == expected and freed == [True]
    assert rows(engine, texts) == expected


def test_the_probe_is_cheap(tokenizer: Tokenizer) -> None:
    engine, seconds = choose_engine(tokenizer), []
    for _ in range(3):
        start = time.process_time()
        assert probe(engine, tokenizer) is None
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


CHILD = """
import os, sys
import psutil
from megatron_sharedproj.data.engines import choose_engine
from megatron_sharedproj.data.tokenizers import build_tokenizer

tokenizer = build_tokenizer("HuggingFaceTokenizer", sys.argv[1])
threads = psutil.Process().num_threads()
engine = choose_engine(tokenizer, sys.argv[2])
texts = [f"{number} words of the parent and the child, " * 50 for number in range(300)]
expected = [array.tolist() for array in engine.encode(texts)]
assert psutil.Process().num_threads() == threads, "the engine started threads"
assert "torch" not in sys.modules and "transformers" not in sys.modules and "awkward" not in sys.modules
child = os.fork()
if child == 0:
    os._exit(0 if [array.tolist() for array in engine.encode(texts)] == expected else 1)
assert os.waitpid(child, 0)[1] == 0, "the engine does not work after a fork"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", ENGINES)
def test_one_thread_and_a_fork(name: str, directory: Path, tokenizer: Tokenizer) -> None:
    forced(tokenizer, name)  # skips
    environment = {key: value for key, value in os.environ.items() if key not in engines.ONE_THREAD}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", CHILD, str(directory), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
