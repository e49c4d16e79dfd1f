"""Reading the files of Megatron's ``torch_dist`` (torch's distributed checkpoint) in one process, without Megatron.

Megatron's own reading unpickles whatever a file holds. Here nothing in a file can run code: its directory is read by an unpickler
that knows only torch's records of tensors, its contents by ``torch.load(weights_only=True)``.
"""

import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from parallel.archive import Loader
from parallel.errors import DamagedError
from parallel.scratch import Scratch

DIRECTORY = ".metadata"
FORMAT_FILE = "metadata.json"  # Megatron's, by which it knows what the others are; the last that is written.
# All that a directory of tensors names. A pickle that names anything else is refused before it is built. Megatron's own writer
# leaves the ranks' plans in it, which are not used here.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
        "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8"},
}  # fmt: skip


def object_key(name: str) -> str:
    """The key of an object that is one and the same for all ranks."""
    return f"{name}/shard_0_1"


# The object in which Megatron keeps what is no sharded tensor or object: the same on every rank, written by rank 0.
PLAIN = object_key("common_state")


class Reader:
    """Reads tensors, whole or in pieces, and objects from the files of one folder, in one process.

    Raises:
        DamagedError: the folder's directory of tensors is missing, or is no such directory; a file of it is missing or short.
        ValueError: it names a file elsewhere.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.metadata = read_directory(self.folder / DIRECTORY)
        self._files: dict[str, io.BufferedReader] = {}
        self._loader = Loader()
        self._scratch, self._passing = Scratch(), Scratch()
        self._check_files()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def tensors(self, prefix: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of every whole tensor whose key starts with ``prefix``."""
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
        }

    def tensor(self, key: str) -> torch.Tensor:
        """One whole tensor."""
        entry = self._entry(key)
        if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._stored(key, entry.chunks[0], self._scratch).contiguous()
        whole = self._empty(entry.size, entry.properties.dtype)
        self.fill(key, whole, (0,) * whole.ndim, tuple(entry.size))
        return whole

    def object(self, key: str) -> Any:
        """One object.

        Raises:
            ValueError: there is none, it cannot be read, or it is more than tensors and plain values.
        """
        return self._load(MetadataIndex(key), self._scratch)[0]

    def fill(self, key: str, out: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Copy elements [offset, offset + out.shape) of the tensor ``key`` [shape] into ``out``; what lies beyond its end is left.

        Raises:
            ValueError: there is no such tensor, it has another shape, or some of its elements are in no file.
        """
        entry = self._entry(key)
        if tuple(entry.size) != tuple(shape):
            raise ValueError(f"{self.folder}: {key} has shape {list(entry.size)}, expected {list(shape)}")
        missing = math.prod(
            max(min(first + count, size) - first, 0)
            for first, count, size in zip(offset, out.shape, shape, strict=True)
        )
        for chunk in entry.chunks:
            both = intersection(offset, out.shape, chunk.offsets, chunk.sizes)
            if both is None:
                continue
            target, source = both
            out[target].copy_(self._stored(key, chunk, self._passing)[source])
            missing -= math.prod(span.stop - span.start for span in target)
        if missing:
            raise ValueError(f"{self.folder}: {missing} elements of {key} are in no file")

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        size = shape.numel() * dtype.itemsize
        if not size:  # torch makes no tensor of a buffer of no bytes
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._scratch.lend(size), dtype=dtype).view(shape)

    def _stored(self, key: str, chunk: ChunkStorageMetadata, scratch: Scratch) -> torch.Tensor:
        """One of the pieces of the files."""
        stored: torch.Tensor = self._load(MetadataIndex(key, chunk.offsets), scratch)
        if stored.shape != chunk.sizes:
            raise ValueError(f"{self.folder}: a piece of {key} has shape {list(stored.shape)}, not {list(chunk.sizes)}")
        return stored

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{self.folder}: there is no tensor {key}")
        return entry

    def _load(self, index: MetadataIndex, scratch: Scratch) -> Any:
        place = self.metadata.storage_data.get(index)
        if place is None:
            raise ValueError(f"{self.folder}: there is no {index.fqn}")
        if place.relative_path not in self._files:
            self._files[place.relative_path] = (self.folder / place.relative_path).open("rb")
        file = self._files[place.relative_path]
        file.seek(place.offset)
        try:
            content = scratch.lend(place.length)
            if file.readinto(content) < place.length:
                raise EOFError(f"the file ends before byte {place.offset + place.length}")
            return self._loader.load(content)
        except Exception as error:
            raise DamagedError(f"{self.folder / place.relative_path}: {index.fqn} cannot be read: {error}") from error

    def _check_files(self) -> None:
        lengths: dict[str, int] = {}
        for place in self.metadata.storage_data.values():
            lengths[place.relative_path] = max(lengths.get(place.relative_path, 0), place.offset + place.length)
        for name, length in lengths.items():
            path = self.folder / name
            if name != path.name:
                raise ValueError(f"{self.folder / DIRECTORY} names the file {name!r}, which is not in this folder")
            if not path.is_file():
                raise DamagedError(f"{path} is missing")
            if path.stat().st_size < length:
                raise DamagedError(f"{path} is truncated: {path.stat().st_size} bytes, expected {length}")


# Megatron-Core before 0.16 added a field to two of torch's records and gave them these names.
_OF_MEGATRON = {"MCoreMetadata": Metadata, "MCoreSavePlan": SavePlan}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "megatron.core.dist_checkpointing.strategies.torch" and name in _OF_MEGATRON:
            return _OF_MEGATRON[name]
        if module in ("pathlib", "pathlib._local"):
            return PurePath  # The folder's path when it was written: Python versions and systems name its class differently.
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a directory of tensors")
        return super().find_class(module, name)


def read_directory(path: Path) -> Metadata:
    """The directory of tensors in a file; it runs no code."""
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it is no directory of tensors")
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except OSError:
        raise
    except Exception as error:  # A damaged pickle can raise almost anything.
        raise DamagedError(f"{path} cannot be read: {error}") from error
    return metadata


def intersection(
    start: tuple[int, ...], size: tuple[int, ...], other_start: tuple[int, ...], other_size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes overlap, as slices of the one and of the other; None if they do not."""
    spans = list(_overlaps(start, size, other_start, other_size))
    if any(first >= end for first, end in spans):
        return None
    return (
        tuple(slice(first - at, end - at) for (first, end), at in zip(spans, start, strict=True)),
        tuple(slice(first - at, end - at) for (first, end), at in zip(spans, other_start, strict=True)),
    )


def _overlaps(
    start: tuple[int, ...], size: tuple[int, ...], other_start: tuple[int, ...], other_size: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    for a, n, b, m in zip(start, size, other_start, other_size, strict=True):
        yield max(a, b), min(a + n, b + m)
