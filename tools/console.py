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
    _interruption.asked = False
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # A shell's background jobs ignore it.
        signals.append(signal.SIGINT)
    previous = {number: signal.signal(number, _interruption.ask) for number in signals}
    try:
        with one_line_errors(0) as outcome:
            return main(argv)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failure if outcome.code == 1 else outcome.code


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[int], Any]]:
    """A function to tell of bytes that are done; a bar appears after two seconds, or a line says that there is no tqdm for it.

    It raises KeyboardInterrupt if a signal has asked for that before, and been overheard.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if sys.stderr.isatty():
            print(f"{title}: no progress bar, because tqdm is not installed", file=sys.stderr)
        yield lambda size: _interruption.check()
        return
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=2, dynamic_ncols=True, leave=False) as bar:

        def advance(size: int) -> None:
            _interruption.check()
            bar.update(size)

        yield advance


class _Interruption:
    """Whether a signal has asked the tool to end. Python drops what a signal's handler raises while a finaliser runs."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self.asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if one has."""
        if self.asked:
            raise KeyboardInterrupt


_interruption = _Interruption()
