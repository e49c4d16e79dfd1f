"""What the conversion tools have in common on the command line: a progress bar, one-line errors, an orderly end on SIGTERM."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

Main = Callable[[Sequence[str] | None], int]


def run(main: Main, argv: Sequence[str] | None, failure: int = 1) -> int:
    """The exit code of ``main(argv)``; what is wrong with the input is one line on stderr and ``failure``.

    SIGTERM ends it like Ctrl-C: what was half written is removed.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return main(argv)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return failure
    except KeyboardInterrupt:
        print("interrupted: nothing is left behind", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[int], Any]]:
    """A function to tell of bytes that are done; a bar appears after two seconds."""
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=2, dynamic_ncols=True, leave=False) as bar:
        yield bar.update


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
