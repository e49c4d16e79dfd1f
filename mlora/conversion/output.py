"""Output directories that appear under their name only when they are complete and on disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(
    path: str | Path, *, replace: bool = False, marker: str, keep: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """A directory to fill, which gets the name ``path`` when the block has ended without an error.

    Until then it is ``.NAME.PID.partial`` beside ``path``. It is removed when the block raises; a killed process leaves it.

    Args:
        path: to make; its parents are made too.
        replace: replace a directory of this name, in one step for readers but for an instant between two renames.
        marker: the name of a file by which a directory is known to be of the kind that may be replaced. Others are left alone.
        keep: inputs; ``path`` must not be one of them, lie in one, or hold one.

    Raises:
        FileExistsError: ``path`` exists, and ``replace`` is false or its content is of another kind.
        ValueError: ``path`` and an input are in each other's way.
    """
    path = Path(os.path.realpath(path))
    _check_free(path, replace, marker, keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for inside in (*partial.rglob("*"), partial):
            sync(inside)
        _put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free(path: Path, replace: bool, marker: str, keep: tuple[Path, ...]) -> None:
    for other in (Path(os.path.realpath(other)) for other in keep):
        if path == other or path in other.parents or other in path.parents:
            raise ValueError(f"the output {path} and the input {other} are in each other's way")
    if not path.exists():
        return
    if not replace:
        raise FileExistsError(f"{path} exists already")
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
        raise FileExistsError(f"{path} exists and holds no {marker}, so it is something else: it is not replaced")


def _put_in_place(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if replaced := path.exists():
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if replaced:
            os.rename(old, path)
        raise
    sync(path.parent)
    if replaced:
        shutil.rmtree(old)
