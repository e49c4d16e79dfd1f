"""The merged shards of a model, written row block by row block in the layout of the base's shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mlora.conversion.base import BaseModel
from mlora.conversion.delta import Delta
from mlora.conversion.plan import Change, Plan
from mlora.conversion.safetensors_file import DTYPE_NAMES, DTYPES, FLOATS, Entry, SafetensorsFile, header_bytes
from mlora.conversion.state import is_finite
from mlora.conversion.write_behind import WriteBehind

# In work at a time. What fits a processor's caches goes through the steps of a merge, and through the kernel, about twice as fast.
BLOCK = 1 << 19  # elements
COPIED = 1 << 20  # bytes
Progress = Callable[[int], None]  # told of bytes of the base that are done


class ShardWriter:
    """Writes shards; its buffers are made once, because new memory costs more than the arithmetic.

    Args:
        base: to start from.
        todo: what changes.
        dtype: of the result's floating-point tensors; None for each tensor's own.
        device: of the arithmetic.
        progress: told the bytes of the base as they are done.

    Attributes:
        layouts: by shard, what it holds in the result, in order.
        changed: modules whose weight has come out different from the base's.
        unchanged: modules whose adapter was zero.
    """

    def __init__(
        self, base: BaseModel, todo: Plan, dtype: torch.dtype | None, device: torch.device, progress: Progress
    ) -> None:
        self._base, self._todo, self._dtype, self._device, self._progress = base, todo, dtype, device, progress
        self._buffers: dict[str, torch.Tensor] = {}
        self.layouts = {name: self._layout(name) for name in base.files}
        self.changed: list[str] = []
        self.unchanged: list[str] = []

    def write(self, name: str, path: Path) -> None:
        """The shard ``name``, merged, as the new file ``path``, on disk.

        Raises:
            ValueError: a value is not finite, or a module's delta is lost in rounding; the parameter is named.
        """
        source, layout = self._base.files[name], self.layouts[name]
        with WriteBehind(path) as file:
            # An unchanged layout keeps the header byte for byte, whatever wrote it.
            file.write_bytes(source.header if layout == source.entries else header_bytes(layout, source.metadata))
            for parameter, entry in layout.items():
                change = self._todo.changes.get(parameter)
                if change is not None:
                    self._merge(file, parameter, change, DTYPES[entry.dtype])
                elif entry == source.entries[parameter]:
                    self._copy(file, source, parameter)
                else:
                    self._convert(file, source, parameter, DTYPES[entry.dtype])

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

    def _copy(self, file: WriteBehind, source: SafetensorsFile, parameter: str) -> None:
        left = source.entries[parameter].nbytes
        with source.bytes_of(parameter) as fill:
            while left:
                buffer = file.buffer(min(left, COPIED))
                fill(buffer)
                file.write(buffer)
                self._progress(len(buffer))
                left -= len(buffer)

    def _convert(self, file: WriteBehind, source: SafetensorsFile, parameter: str, dtype: torch.dtype) -> None:
        for _, rows in source.blocks(parameter, BLOCK, self._block_buffer(source, parameter)):
            self._finish(file, parameter, rows, dtype)
            self._progress(rows.nbytes)

    def _merge(self, file: WriteBehind, parameter: str, change: Change, dtype: torch.dtype) -> None:
        stored = self._base.file(change.source).dtype(change.source)
        delta = Delta(change.terms, torch.promote_types(stored, torch.float32), self._device) if change.terms else None
        norms = None if delta is None else delta.column_norms(change.blocks(self._base, BLOCK))
        differs = False
        buffer = self._block_buffer(self._base.file(change.source), change.source)
        for first, rows, start in change.blocks(self._base, BLOCK, buffer):
            if delta is not None:
                wide = (
                    self._buffer("wide", start.numel(), delta.right.dtype, self._device).view(start.shape).copy_(start)
                )
                start = delta.normalise(delta.add_to(wide, first), first, norms)
            out = self._finish(file, parameter, start, dtype)
            differs = differs or not torch.equal(out, rows.to(dtype))
            self._progress(rows.nbytes)
        if differs:
            self.changed.append(change.module)
        elif delta is None or delta.is_zero:
            self.unchanged.append(change.module)
        else:
            raise ValueError(
                f"{parameter}: its delta is lost in rounding to {_name(dtype)} everywhere; a result in float32 would keep it"
            )

    def _finish(self, file: WriteBehind, parameter: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Round and write; the rows as written."""
        buffer = file.buffer(rows.numel() * dtype.itemsize)
        out = buffer.view(dtype).view(rows.shape).copy_(rows)
        if not is_finite(out):
            raise ValueError(f"{parameter} would have values that are not finite in {_name(dtype)}")
        file.write(buffer)
        return out

    def _block_buffer(self, source: SafetensorsFile, parameter: str) -> torch.Tensor:
        return self._buffer("source", source.block_bytes(parameter, BLOCK), torch.uint8)

    def _buffer(self, name: str, count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Memory for ``count`` elements; the same at every call with this name."""
        size = count * dtype.itemsize
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._buffers[name][:size].view(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
