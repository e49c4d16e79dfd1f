"""Safetensors files from strangers: the header is checked whole before a byte of tensor data is believed.

Tensors are read with plain reads, by rows where wanted. Pages of a mapped file count as the process's memory, so mapping a
5 GB shard to go through it once would cost 5 GB.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlora.conversion.state import LazyTensor

HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own limit

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that adapters and bases are read in


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        dtype: the file's word for it, such as "BF16".
        shape: of the tensor.
        begin, end: bytes from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True)
class Span:
    """Rows of a tensor.

    Attributes:
        first: number of the first one.
        count: how many.
        nbytes: that they take.
    """

    first: int
    count: int
    nbytes: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor; a number is a row of its own."""
        return tensor[self.first : self.first + self.count] if tensor.ndim else tensor


class SafetensorsFile:
    """The header of a safetensors file, and its tensors on demand.

    Attributes:
        path: of the file.
        header: the bytes before the tensors, length included.
        metadata: the strings under ``__metadata__``.
        entries: in the order in which the tensors lie in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, its header is not JSON, too long, or contradicts the file; the file is named.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or 8 + length > size:
                raise ValueError(
                    f"{self.path} is truncated or no safetensors file: {size} bytes, less than its header says"
                )
            if length > HEADER_LIMIT:
                raise ValueError(f"{self.path}: header of {length} bytes; at most {HEADER_LIMIT} are read")
            self.header = start + file.read(length)
        content = _parse(self.path, self.header[8:])
        self.metadata = _metadata(self.path, content.pop("__metadata__", {}))
        found = [(key, _entry(self.path, key, value, len(self.header))) for key, value in content.items()]
        self.entries = dict(sorted(found, key=lambda item: (item[1].begin, item[1].end)))
        _check_layout(self.path, self.entries, len(self.header), size)

    def dtype(self, key: str) -> torch.dtype:
        """A tensor's dtype.

        Raises:
            ValueError: torch has no such dtype.
        """
        name = self.entries[key].dtype
        if name not in DTYPES:
            raise ValueError(f"{self.path}: {key} is stored as {name}, which cannot be read")
        return DTYPES[name]

    def read(self, key: str, span: Span | None = None, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, or some of its rows (slices of dim 0).

        Args:
            buffer: bytes, as many as are read, to read into and return a view of.

        Raises:
            ValueError: the file ends early, or torch has no such dtype.
        """
        entry, dtype = self.entries[key], self.dtype(key)
        shape, at, size = entry.shape, 0, entry.nbytes
        if span is not None and shape:
            shape, at, size = (span.count, *shape[1:]), span.first * (size // max(shape[0], 1)), span.nbytes
        buffer = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer
        self.read_bytes(key, at, buffer)
        return buffer.view(dtype).view(shape)

    def read_bytes(self, key: str, at: int, buffer: torch.Tensor) -> None:
        """Fill ``buffer`` with bytes of a tensor, whatever its dtype, from its byte ``at`` on."""
        view, done = memoryview(buffer.numpy().data), 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.entries[key].begin + at)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(f"{self.path} ends inside {key}")
                done += got

    def spans(self, key: str, elements: int) -> Iterator[Span]:
        """The rows of a tensor in pieces of about ``elements`` elements, at least one row; a number counts as one row."""
        entry = self.entries[key]
        rows = entry.shape[0] if entry.shape else 1
        count = max(1, elements // max(1, math.prod(entry.shape[1:])))
        for first in range(0, rows, count):
            here = min(count, rows - first)
            yield Span(first, here, here * (entry.nbytes // rows))

    def blocks(self, key: str, elements: int) -> Iterator[tuple[Span, torch.Tensor]]:
        """(place, rows) of a tensor, in pieces as :meth:`spans` cuts them."""
        for span in self.spans(key, elements):
            yield span, self.read(key, span)

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        """The bytes of a tensor, whatever its dtype, in pieces of 1 MiB that share their memory."""
        size, buffer = self.entries[key].nbytes, torch.empty(1 << 20, dtype=torch.uint8)
        for at in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - at)]
            self.read_bytes(key, at, piece)
            yield piece

    def lazy(self, key: str) -> LazyTensor:
        """A tensor for later."""
        return LazyTensor(key, self.path, self.entries[key].shape, self.dtype(key), partial(self.read, key))


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The bytes in front of the tensors of a file that holds ``entries`` in this order; their offsets give only the sizes.

    Padded to a multiple of 8, as the safetensors library does.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, entry in entries.items():
        content[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        at += entry.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the header is not a JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return result


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, key: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        sound = isinstance(dtype, str) and all(map(_is_whole, [*shape, begin, end])) and begin <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: the header's entry for {key} is malformed")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{path}: {key} is {dtype} {shape}, which does not fill its {end - begin} bytes")
    return Entry(dtype, tuple(shape), start + begin, start + end)


def _check_layout(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    at = start
    for key, entry in entries.items():
        if entry.begin != at:
            raise ValueError(
                f"{path}: {key} starts at byte {entry.begin}, where {at} was due: tensors overlap or leave a gap"
            )
        at = entry.end
    if at != size:
        kind = "is truncated" if size < at else "has bytes behind its last tensor"
        raise ValueError(f"{path} {kind}: {size} bytes, {at} by its header")
