"""Threads that each take a piece of work from reading to writing, with memory of their own that they use again and again."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_MOST = 8  # more of them only wait for memory and disk


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch uses one thread: for work that memory limits.

    torch's own threads all meet at the end of every operation, and on a busy machine spend their time waiting for the last one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """A context of threads in each of which torch uses one thread, for the reason that :func:`one_thread` has.

    Here nobody waits for anybody: pieces are independent, and reading, arithmetic and writing of different pieces overlap.
    """

    def __init__(self) -> None:
        self._before = torch.get_num_threads()
        self._memory = threading.local()
        self._pool = ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1), initializer=lambda: torch.set_num_threads(1))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)  # What a worker sets is also the start value of threads made later.

    def each(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
        """The results of ``function`` in the order of the pieces; what it raises is raised here, and ends the rest."""
        return self._pool.map(function, pieces)

    def buffer(self, name: str, count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Memory of the calling thread for ``count`` elements: the same at every call with this name.

        Memory in use is several times faster than new memory, which the kernel has to clear first.
        """
        size = count * dtype.itemsize
        held: torch.Tensor | None = getattr(self._memory, name, None)
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.uint8, device=device)
            setattr(self._memory, name, held)
        return held[:size].view(dtype)
