"""Directories that are there whole or not at all, through errors, kills and crashes of the machine."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel.errors import naming
from parallel.reader import Reader

_UNFINISHED = re.compile(r"iter_\d{7,}\.(partial|old)")  # Being written, being removed.


def make_empty(partial: Path, final: Path) -> None:
    """Make ``partial``, in which ``final`` will be written, and remove what killed saves have left beside it.

    Raises:
        FileExistsError: ``final`` exists.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    if partial.parent.is_dir():
        for left in [path for path in partial.parent.iterdir() if _UNFINISHED.fullmatch(path.name)]:
            shutil.rmtree(left)
    partial.mkdir(parents=True)


def complete(partial: Path, final: Path, texts: Mapping[str, str]) -> None:
    """Add small files to the sharded files in ``partial``, check that all are there, and let it appear as ``final``.

    Raises:
        ValueError: a file is missing or short.
    """
    try:
        Reader(partial)
    except ValueError as error:
        raise ValueError(f"not saved: {error}; all ranks must write to the same storage") from error
    for name, text in texts.items():
        with naming(partial / name):
            (partial / name).write_text(text, encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        sync(path)
    os.rename(partial, final)
    sync(final.parent)


def remove(checkpoints: Sequence[Path]) -> None:
    """Remove checkpoints so that none is ever seen with half of its files."""
    for path in checkpoints:
        old = path.with_name(path.name + ".old")
        os.rename(path, old)
        shutil.rmtree(old)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
