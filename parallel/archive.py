"""Reading what ``torch.save`` wrote: with its checksums, at which ``torch.load`` does not look, and at the speed of memory."""

import io
import zipfile
import zlib
from typing import Any

import torch

_FIXED = 30  # bytes of a record's header in front of its name; the lengths of name and padding are its last four


class Loader:
    """Loads tensors and plain values; nothing that was saved can run code.

    Pickles of tensors of one shape and dtype are the same bytes. When such bytes have once been loaded by torch and were a plain
    tensor, the next tensor is the memory of its record: nothing is unpickled and nothing copied.
    """

    def __init__(self) -> None:
        self._plain: dict[bytes, tuple[torch.dtype, torch.Size]] = {}

    def load(self, content: bytearray | memoryview) -> Any:
        """What was saved as these bytes; a tensor may go on using their memory.

        Raises:
            ValueError: a record is compressed, or its bytes are not those that were written; it is named.
            Exception: torch cannot load it, or it is no archive at all.
        """
        records = check_records(content)
        pickle = next((bytes(record) for name, record in records.items() if name.endswith("/data.pkl")), b"")
        data = [record for name, record in records.items() if "/data/" in name]
        if pickle in self._plain and len(data) == 1:
            dtype, shape = self._plain[pickle]
            if len(data[0]) == shape.numel() * dtype.itemsize:
                return torch.frombuffer(data[0], dtype=dtype).view(shape)
        value = torch.load(io.BufferedReader(_Memory(content)), map_location="cpu", weights_only=True)
        if type(value) is torch.Tensor and len(data) == 1 and _is_plain(value):
            self._plain[pickle] = value.dtype, value.shape
        return value


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is its storage, element by element."""
    whole = tensor.numel() > 0 and tensor.untyped_storage().nbytes() == tensor.nbytes
    bare = not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
    return whole and bare and tensor.layout == torch.strided and tensor.is_contiguous()


class _Memory(io.RawIOBase):
    """Bytes as a file, without the copy that ``BytesIO`` makes of what can be changed."""

    def __init__(self, content: bytearray | memoryview) -> None:
        self._view, self._at = memoryview(content), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise OSError(f"there is no byte {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def check_records(content: bytearray | memoryview) -> dict[str, memoryview]:
    """The records of a saved object by name, each compared with its checksum in place.

    Raises:
        ValueError: a record is compressed, or its bytes are not those that were written; it is named.
        zipfile.BadZipFile: it is no archive at all.
    """
    view, records = memoryview(content), {}
    with zipfile.ZipFile(_Memory(content)) as archive:
        for record in archive.infolist():
            name, padding = (
                int.from_bytes(view[record.header_offset + at : record.header_offset + at + 2], "little")
                for at in (_FIXED - 4, _FIXED - 2)
            )
            start = record.header_offset + _FIXED + name + padding
            records[record.filename] = view[start : start + record.file_size]
            whole = record.compress_type == zipfile.ZIP_STORED
            if not whole or zlib.crc32(records[record.filename]) != record.CRC:
                raise ValueError(f"wrong checksum of {record.filename}")
    return records
