"""A file whose bytes go to disk while more are written, so that little is left to wait for when it has to last."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

EVERY = 1 << 27  # bytes


class WriteBack:
    """Syncs a file in a thread of its own, every :data:`EVERY` bytes. The last ones are left to whoever closes the file.

    A context manager: at its end all syncs have ended, and an error of one of them is raised.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._synced = file.tell()
        self._worker = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []

    def wrote(self) -> None:
        """To be called when something has been written."""
        if self._file.tell() - self._synced >= EVERY:
            self._file.flush()
            self._synced = self._file.tell()
            self._syncs.append(self._worker.submit(os.fsync, self._file.fileno()))

    def __enter__(self) -> "WriteBack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(cancel_futures=error is not None)
        if error is None:
            for sync in self._syncs:
                sync.result()
