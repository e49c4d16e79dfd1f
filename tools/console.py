"""What the tools of one process have in common on the command line: exit codes, one-line errors, a progress bar."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlora_tools.failure import one_line_errors


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None, *, failure: int = 1) -> int:
    """The exit code of ``main(argv)``; ``failure``, and one line on stderr, for what is wrong with its input.

    SIGTERM ends it like Ctrl-C, so that what is half written is removed.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with one_line_errors(0) as outcome:
            return main(argv)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return failure if outcome.code == 1 else outcome.code


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[int], Any]]:
    """A function to tell of bytes that are done; a bar appears after two seconds, or a line says that there is no tqdm for it."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if sys.stderr.isatty():
            print(f"{title}: no progress bar, because tqdm is not installed", file=sys.stderr)
        yield lambda size: None
        return
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=2, dynamic_ncols=True, leave=False) as bar:
        yield bar.update


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
