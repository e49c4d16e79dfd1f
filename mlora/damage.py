"""Checkpoints that are no longer whole: what is wrong with one, and how it is put out of the way."""

import json
import os
from pathlib import Path

from mlora.description import CONFIG_FILE, INFO_FILE, ITERATION, read_info
from mlora.folder import sync
from parallel.errors import DamagedError
from parallel.reader import PLAIN, Reader


def newest_first(folder: str | Path) -> list[Path]:
    """Every directory in ``folder`` that has a checkpoint's name, also one that has lost what makes it a checkpoint."""
    found = [path for path in Path(folder).glob("iter_*") if ITERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")), reverse=True)


def check_files(checkpoint: Path) -> None:
    """Look for what can be seen of a checkpoint without reading its tensors; those are compared with checksums when they are read.

    Raises:
        DamagedError: a file is missing or short, or its content cannot be read.
        ValueError: it was written in another format.
    """
    for name in (INFO_FILE, CONFIG_FILE):
        path = checkpoint / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedError(f"{path} cannot be read: {error}") from error
    read_info(checkpoint)
    with Reader(checkpoint) as reader:
        reader.object(PLAIN)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one and a later save of its iteration finds its place free.

    Returns:
        The new path, ``iter_0000010.damaged``, or with a number if there is one already.
    """
    aside, number = checkpoint.with_name(checkpoint.name + ".damaged"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged{number}")
    os.rename(checkpoint, aside)
    sync(checkpoint.parent)
    return aside
