"""Which checkpoint to load: the named one if it is whole, or with --load-fallback the newest that is.

Damage is found in two ways: here by one process (sizes, and the JSON files; before a process group exists),
and by all ranks together (:func:`agree`), each of which reads its share of the files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sharedproj.checkpointing import files, manifest

FALLBACK = "--load-fallback"
NO_VERIFY = "--no-verify-integrity"


@dataclass
class Choice:
    """A checkpoint to load.

    Attributes:
        path: what the user gave; folder: the iteration folder; flag: the flag that led to it.
        skipped: damaged ones that came first, with what is wrong with them.
    """

    path: Path
    folder: Path
    flag: str = "--load"
    skipped: dict[Path, list[str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """A line for each thing that the user should know of this choice."""
        lines = [
            f"{describe(folder, found)}; going on from {self.folder.name} ({FALLBACK})"
            for folder, found in self.skipped.items()
        ]
        if not (self.folder / manifest.MANIFEST).is_file():
            lines.append(f"note: {self.folder} has no {manifest.MANIFEST}: of an older version, not verified")
        number = files.iteration_of(self.folder) or 0
        newer = [f for f in files.iteration_dirs(self.path) if (files.iteration_of(f) or 0) > number]
        if newer and newer[0] not in self.skipped:
            lines.append(
                f"note: {self.path / files.TRACKER} names iteration {number}; {newer[0].name} is newer"
            )
        return lines


def describe(folder: Path, damage: list[str]) -> str:
    """One line of words: every damaged file of a checkpoint."""
    if damage == [f"{folder.name} (missing)"]:
        return f"{folder} is missing"
    return f"{folder} is damaged: {', '.join(damage)}"


def find_damage(
    folder: Path, *, contents: bool, verify: bool = True, rank: int = 0, ranks: int = 1
) -> list[str]:
    """What is wrong with a checkpoint (see :func:`manifest.damage`); of an older one what is missing.

    Args:
        verify: False: only look for what every checkpoint has.
    """
    if not verify:
        return files.missing_files(folder, promised=False)
    lacking = files.missing_files(folder)
    found = manifest.damage(folder, contents=contents, rank=rank, ranks=ranks) if folder.is_dir() else None
    known = {line.split(" (")[0] for line in found or []}
    return (found or []) + [line for line in lacking if line.split(" (")[0] not in known]


def _first(path: Path, flag: str) -> tuple[Path, list[str]]:
    """The iteration folder that a path means; the path itself and why, where its tracker names none."""
    is_folder = (path / files.RUN_CONFIG).is_file() and (path / "metadata.json").is_file()
    if is_folder or files.iteration_of(path) is not None:
        return path, []
    try:
        iteration = files.latest_iteration(path)
    except ValueError as error:
        reason = str(error).removeprefix("checkpoint ").split("; ")[0]
    else:
        if iteration is not None:
            return files.iteration_dir(path, iteration), []
        reason = f"{files.TRACKER} (missing)"
    if not files.iteration_dirs(path):
        raise ValueError(
            f"{flag} {path}: no checkpoint there ({reason}); give a --save folder of a training run, or one "
            "of its iter_NNNNNNN folders"
        )
    return path, [reason]


def _first_whole(
    choice: Choice,
    damage: list[str],
    candidates: list[Path],
    *,
    fallback: bool | None,
    damage_of: Callable[[Path], list[str]],
) -> Choice:
    """The chosen checkpoint if it has no damage, else the newest candidate that has none."""
    first = choice.folder
    if not damage:
        return choice
    skipped = {**choice.skipped, first: damage}
    for candidate in candidates:
        if candidate not in skipped:
            found = damage_of(candidate)
            if not found:
                break
            skipped[candidate] = found
    else:
        others = "so is every other checkpoint" if len(skipped) > 1 else "there is no other checkpoint"
        raise ValueError(
            f"{choice.flag} {choice.path}: {describe(first, damage)}; {others} there: "
            "restore the file(s), or train anew into another folder"
        )
    if not fallback:
        remedy = f"load {candidate}" if fallback is None else f"add {FALLBACK} to go on from {candidate.name}"
        raise ValueError(
            f"{choice.flag} {choice.path}: {describe(first, damage)}; {remedy}, the newest checkpoint there "
            "that is whole"
        )
    return Choice(choice.path, candidate, choice.flag, skipped)


def choose(
    path: str | Path, flag: str = "--load", *, fallback: bool | None = None, verify: bool = True
) -> Choice:
    """The checkpoint that a path names: a --save folder (its latest) or an iteration folder itself.

    Of the one that is named, sizes and JSON files are looked at here, and the rest by :func:`agree`; one that
    would replace it is read as a whole.

    Args:
        fallback: where it is damaged, take the newest of the same --save folder that is whole; None: the
            command has no such flag.
        verify: False: compare nothing with the manifest; the files only have to be there.
    Raises:
        ValueError: if there is none, or it is damaged and `fallback` is not given; names every damaged file
            and the checkpoint that `fallback` would take.
    """
    path = Path(path)

    def damage_of(folder: Path, contents: bool = True) -> list[str]:
        return find_damage(folder, contents=contents, verify=verify)

    folder, reason = _first(path, flag)
    candidates = files.iteration_dirs(path if reason else folder.parent)
    damage = reason or damage_of(folder, False)
    first = Choice(path, folder, flag)
    return _first_whole(first, damage, candidates, fallback=fallback, damage_of=damage_of)


def resolve_checkpoint(path: str | Path, flag: str = "--load", *, verify: bool = True) -> Path:
    """The iteration folder that a path names, as :func:`choose` without a replacement for a damaged one."""
    return choose(path, flag, verify=verify).folder


def agree(choice: Choice, *, fallback: bool | None = None, verify: bool = True) -> Choice:
    """Compare all of a chosen checkpoint with its manifest. Collective; each rank reads its share.

    All ranks take what rank 0 chose, hear of all damage, and return or raise alike.

    Args:
        fallback, verify: as for :func:`choose`.
    Raises:
        ValueError: as :func:`choose`.
    """
    import torch.distributed as dist

    grouped = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    # Rank 0's view, so that no rank waits in a collective that the others do not enter.
    agreed: list[Any] = [choice, files.iteration_dirs(choice.folder.parent)]
    if ranks > 1:
        dist.broadcast_object_list(agreed, src=0)
    first, candidates = agreed

    def damage_of(folder: Path) -> list[str]:
        everyone = [find_damage(folder, contents=True, verify=verify, rank=rank, ranks=ranks)]
        if ranks > 1:
            mine, everyone = everyone[0], [[] for _ in range(ranks)]
            dist.all_gather_object(everyone, mine)
        return list(dict.fromkeys(line for lines in everyone for line in lines))

    return _first_whole(first, damage_of(first.folder), candidates, fallback=fallback, damage_of=damage_of)
