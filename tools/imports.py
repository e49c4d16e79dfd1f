"""Imports that take seconds."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collections: all that the modules make stays, and looking through it again and again is a fifth of
    the time. Later collections pass it over too."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
