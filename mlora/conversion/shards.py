"""The merged shards of a model, written row block by row block in the layout of the base's shards."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mlora.conversion.base import BaseModel
from mlora.conversion.delta import Delta
from mlora.conversion.plan import Change, Plan
from mlora.conversion.safetensors_file import DTYPE_NAMES, DTYPES, FLOATS, Entry, SafetensorsFile, Span, header_bytes
from mlora.conversion.state import is_finite
from mlora.conversion.workers import Workers
from parallel.writeback import PIECE

# In work at a time, for each thread. What fits a processor's caches goes through the steps of a merge, and through the kernel,
# about twice as fast.
BLOCK = 1 << 19  # elements
COPIED = 1 << 20  # bytes
SYNC_EVERY = 1 << 28  # bytes after which the disk is set to work, so that little is left to wait for at the end
Progress = Callable[[int], None]  # told of bytes of the base that are done


@dataclass
class _Target:
    """A shard that is being written.

    Attributes:
        descriptor: of the file; any thread writes at any place.
        at: where the next tensor begins.
    """

    descriptor: int
    at: int = 0
    _syncer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _syncs: list[Future[None]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def create(cls, path: Path) -> Iterator["_Target"]:
        """A new file; it is on disk when the context has ended without an error."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        target = cls(descriptor)
        try:
            yield target
            for sync in target._syncs:
                sync.result()
            os.fsync(descriptor)
        finally:
            target._syncer.shutdown(cancel_futures=True)
            os.close(descriptor)

    def write(self, data: torch.Tensor, offset: int) -> None:
        """Write a tensor's bytes at ``offset`` of the next tensor."""
        view, place = memoryview(data.reshape(-1).view(torch.uint8).numpy().data), self.at + offset
        while len(view):
            count = os.pwrite(self.descriptor, view[:PIECE], place)
            view, place = view[count:], place + count

    def advance(self, size: int) -> None:
        """Go on to the next tensor, ``size`` bytes on."""
        before, self.at = self.at, self.at + size
        if self.at // SYNC_EVERY > before // SYNC_EVERY:
            self._syncs.append(self._syncer.submit(os.fsync, self.descriptor))


class ShardWriter:
    """Writes shards.

    Args:
        base: to start from.
        todo: what changes.
        dtype: of the result's floating-point tensors; None for each tensor's own.
        device: of the arithmetic.
        workers: to divide the rows between.
        progress: told the bytes of the base as they are done.

    Attributes:
        layouts: by shard, what it holds in the result, in order.
        changed: modules whose weight has come out different from the base's.
        unchanged: modules whose adapter was zero.
    """

    def __init__(
        self,
        base: BaseModel,
        todo: Plan,
        dtype: torch.dtype | None,
        device: torch.device,
        workers: Workers,
        progress: Progress,
    ) -> None:
        self._base, self._todo, self._dtype, self._device = base, todo, dtype, device
        self._workers, self._progress = workers, progress
        self.layouts = {name: self._layout(name) for name in base.files}
        self.changed: list[str] = []
        self.unchanged: list[str] = []

    def write(self, name: str, path: Path) -> None:
        """The shard ``name``, merged, as the new file ``path``, on disk.

        Raises:
            ValueError: a value is not finite, or a module's delta is lost in rounding; the parameter is named.
        """
        source, layout = self._base.files[name], self.layouts[name]
        # An unchanged layout keeps the header byte for byte, whatever wrote it.
        header = source.header if layout == source.entries else header_bytes(layout, source.metadata)
        with _Target.create(path) as target:
            target.write(torch.frombuffer(bytearray(header), dtype=torch.uint8), 0)
            target.advance(len(header))
            for parameter, entry in layout.items():
                change = self._todo.changes.get(parameter)
                if change is not None:
                    self._merge(target, parameter, change, DTYPES[entry.dtype])
                elif entry == source.entries[parameter]:
                    self._copy(target, source, parameter)
                else:
                    self._convert(target, source, parameter, DTYPES[entry.dtype])
                target.advance(entry.nbytes)

    def _layout(self, name: str) -> dict[str, Entry]:
        entries = {key: self._entry(entry) for key, entry in self._base.files[name].entries.items()}
        for parameter, change in self._todo.changes.items():
            if parameter not in self._base.where and self._base.where[change.source] == name:
                entries[parameter] = entries[change.source]
        return entries

    def _entry(self, entry: Entry) -> Entry:
        old, new = DTYPES.get(entry.dtype), self._dtype
        if new is None or old is None or old not in FLOATS or old == new:
            return entry
        size = entry.nbytes // old.itemsize * new.itemsize
        return replace(entry, dtype=DTYPE_NAMES[new], end=entry.begin + size)

    def _copy(self, target: _Target, source: SafetensorsFile, parameter: str) -> None:
        def copy(at: int) -> int:
            buffer = self._workers.buffer("source", min(COPIED, size - at), torch.uint8)
            source.read_bytes(parameter, at, buffer)
            target.write(buffer, at)
            return len(buffer)

        size = source.entries[parameter].nbytes
        for done in self._workers.each(copy, range(0, size, COPIED)):
            self._progress(done)

    def _convert(self, target: _Target, source: SafetensorsFile, parameter: str, dtype: torch.dtype) -> None:
        def convert(span: Span) -> int:
            rows = self._read(source, parameter, span)
            self._finish(target, source, parameter, span, rows, rows, dtype)
            return rows.nbytes

        for done in self._workers.each(convert, source.spans(parameter, BLOCK)):
            self._progress(done)

    def _merge(self, target: _Target, parameter: str, change: Change, dtype: torch.dtype) -> None:
        source = self._base.file(change.source)
        wide = torch.promote_types(source.dtype(change.source), torch.float32)
        delta = Delta(change.terms, wide, self._device) if change.terms else None
        norms = None if delta is None else delta.column_norms(change.blocks(self._base, BLOCK))
        start = None if change.start is None else change.start.load()
        differs = threading.Event()

        def merge(span: Span) -> int:
            rows = self._read(source, change.source, span)
            result = rows if start is None else span.of(start)
            if delta is not None:
                result = delta.normalise(delta.add_to(self._widen(result, delta), span.first), span.first, norms)
            out = self._finish(target, source, parameter, span, result, rows, dtype)
            if not differs.is_set() and not torch.equal(out, rows if rows.dtype == dtype else rows.to(dtype)):
                differs.set()
            return rows.nbytes

        for done in self._workers.each(merge, source.spans(change.source, BLOCK)):
            self._progress(done)
        if differs.is_set():
            self.changed.append(change.module)
        elif delta is None or delta.is_zero:
            self.unchanged.append(change.module)
        else:
            raise ValueError(
                f"{parameter}: its delta is lost in rounding to {_name(dtype)} everywhere; a result in float32 would keep it"
            )

    def _widen(self, rows: torch.Tensor, delta: Delta) -> torch.Tensor:
        return self._workers.buffer("wide", rows.numel(), delta.right.dtype, self._device).view(rows.shape).copy_(rows)

    def _read(self, source: SafetensorsFile, parameter: str, span: Span) -> torch.Tensor:
        return source.read(parameter, span, self._workers.buffer("source", span.nbytes, torch.uint8))

    def _finish(
        self,
        target: _Target,
        source: SafetensorsFile,
        parameter: str,
        span: Span,
        rows: torch.Tensor,
        base: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Round and write ``rows``, made of the ``base``'s; the rows as written."""
        out = self._workers.buffer("result", rows.numel(), dtype).view(rows.shape).copy_(rows)
        if not is_finite(out):
            if not is_finite(base):
                raise ValueError(f"{source.path}: {parameter} has values that are not finite")
            raise ValueError(f"{source.path}: {parameter} would have values that are not finite in {_name(dtype)}")
        target.write(out, span.first * out.nbytes // max(span.count, 1))
        return out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
