"""The quickstart's text for an experiment: State of the Union speeches, 2,048 token ids, indexed."""

from __future__ import annotations

from pathlib import Path

from megatron_sharedproj.experiments.jobs import Job, script

VOCABULARY = 2048


def data_jobs(folder: Path, documents: str = "speeches") -> list[Job]:
    """The commands that make text, tokenizer and data sets below ``folder`` (a source tree is needed).

    Args:
        documents: speeches, or paragraphs (short ones).
    """

    def job(name: str, path: str, *words: str, after: tuple[str, ...] = ()) -> Job:
        return Job(name, script(path, *words), cost=5.0, after=after)

    text, tokenizer = str(folder / "text"), str(folder / "tokenizer")
    choice = () if documents == "speeches" else ("--documents", documents)
    return [
        job("text", "examples/sotu_corpus.py", "--output", text, *choice),
        job(
            "tokenizer", "tools/train_tokenizer.py", "--input", text, "--vocab-size", str(VOCABULARY),
            "--output", tokenizer, after=("text",),
        ),
        job(
            "data", "tools/preprocess_slimpajama.py", "--input", text, "--output-prefix",
            str(folder / "data" / "sotu"), "--tokenizer-model", tokenizer, "--workers", "2", "--overwrite",
            after=("tokenizer",),
        ),
    ]  # fmt: skip


def data_flags(folder: Path) -> list[str]:
    """The trainer's flags for the data of :func:`data_jobs`."""
    return [
        "--train-data-path", train_data(folder),
        "--valid-data-path", validation_data(folder),
        "--tokenizer-model", str(folder / "tokenizer"),
    ]  # fmt: skip


def train_data(folder: Path) -> str:
    """Prefix of the training set."""
    return str(folder / "data" / "sotu_train_text_document")


def validation_data(folder: Path) -> str:
    """Prefix of the validation set."""
    return str(folder / "data" / "sotu_validation_text_document")
