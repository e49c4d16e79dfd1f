"""A file that is written, and brought to disk, while its next bytes are computed."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch

_DEPTH = 3  # buffers: one being filled, the others waiting or being written
_SYNC_EVERY = 1 << 28  # bytes after which the disk is set to work, so that little is left to wait for at the end


class WriteBehind:
    """A new file to fill from start to end, and a context that ends with all of it on disk.

    Args:
        path: of the file, which must not exist.

    Raises:
        FileExistsError: it exists.
        OSError: a write failed; raised by a later call, or when the context ends.
    """

    def __init__(self, path: Path) -> None:
        self._file = FileIO(path, "x")
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_DEPTH)]
        self._writes: list[Future[None] | None] = [None] * _DEPTH
        self._syncs: list[Future[None]] = []
        self._turn = 0
        self._written = 0

    def __enter__(self) -> "WriteBehind":
        return self

    def buffer(self, size: int) -> torch.Tensor:
        """Memory of ``size`` bytes to fill and hand to :meth:`write`; waits until the disk has taken what was in it."""
        if (write := self._writes[self._turn]) is not None:
            write.result()
        if self._buffers[self._turn].numel() < size:
            # Memory that is used again and again is faster than new memory, which the kernel has to clear.
            self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[self._turn][:size]

    def write(self, data: torch.Tensor) -> None:
        """Append the bytes of the last :meth:`buffer`, which belong to this file from now on."""
        self._writes[self._turn] = self._writer.submit(self._append, memoryview(data.numpy().data))
        self._turn = (self._turn + 1) % _DEPTH

    def write_bytes(self, data: bytes) -> None:
        """Append bytes."""
        buffer = self.buffer(len(data))
        memoryview(buffer.numpy().data)[:] = data
        self.write(buffer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for write in self._writes:
                    if write is not None:
                        write.result()
                for sync in self._syncs:
                    sync.result()
                os.fsync(self._file.fileno())
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._syncer.shutdown(cancel_futures=True)
            self._file.close()

    def _append(self, data: memoryview) -> None:
        before = self._written // _SYNC_EVERY
        while len(data):
            count = self._file.write(data)
            data, self._written = data[count:], self._written + count
        if self._written // _SYNC_EVERY > before:
            self._syncs.append(self._syncer.submit(os.fsync, self._file.fileno()))
