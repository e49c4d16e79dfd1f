"""Text files that are there whole, or as they were before."""

import os
from pathlib import Path

from parallel.errors import naming


def partial_of(path: Path) -> Path:
    """The name under which a file is written."""
    return path.with_name(path.name + ".partial")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole, in place of the one that may be there.

    Raises:
        OSError: it cannot be written; it is named.
    """
    partial = partial_of(path)
    with naming(partial), partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
