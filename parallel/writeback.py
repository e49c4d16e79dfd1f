"""A file whose bytes go to disk while more are written, so that little is left to wait for when it has to last."""

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

EVERY = 1 << 27  # bytes after which the disk is set to work
# Bytes that the kernel is given at once. It puts them into pages as large as the write, and pages of 2 MB are dear where it has to
# find new ones: on a virtual machine that had given its free memory back, ten times as dear as these.
PIECE = 1 << 18


class WriteBack(io.BufferedWriter):
    """A new file that is synced by a thread of its own, every :data:`EVERY` bytes. The last ones are left to whoever comes after.

    At the end of its context all syncs have ended, and an error of one of them is raised.

    Args:
        path: of the file; there must be none.

    Raises:
        FileExistsError: there is one.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("xb", buffering=0))
        self._unsynced = 0
        self._worker = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []

    def write(self, data: Any) -> int:
        """Write bytes, or whatever lends its memory; returns how many they are."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), PIECE):
            super().write(view[at : at + PIECE])
        self._unsynced += len(view)
        if self._unsynced >= EVERY:
            self.flush()
            self._unsynced = 0
            self._syncs.append(self._worker.submit(os.fsync, self.fileno()))
        return len(view)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(cancel_futures=error is not None)
        super().__exit__(kind, error, trace)
        if error is None:
            for sync in self._syncs:
                sync.result()
