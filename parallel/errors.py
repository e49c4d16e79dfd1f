"""Errors of files: what is wrong, and with which."""

import contextlib
import os
from collections.abc import Iterator


class DamagedError(ValueError):
    """A file is missing, shorter than it was or holds other bytes than were written; it is named."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the operating system name ``path``, if it names no file, as a full disk's does not.

    torch's writer in C++ has only a position to report; the cause is in the context of its error.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
