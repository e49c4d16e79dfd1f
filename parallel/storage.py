"""A sharded state dict in a folder of files: each rank writes its pieces, ranks of any other layout read theirs.

The files are those of Megatron's ``torch_dist`` (torch's distributed checkpoint). Megatron's own entry points are not used: where
one rank fails to write, its others would wait for ever; and reading unpickles whatever a file holds. Here an error on one rank is
every rank's error, and nothing in a file can run code: its directory is read by an unpickler that knows only torch's records of
tensors, its contents by ``torch.load(weights_only=True)``.
"""

import contextlib
import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save

from parallel.archive import Loader
from parallel.together import on_rank_zero, raise_for, together

# Where Megatron keeps what is no sharded tensor or object: the same on every rank, written by rank 0.
PLAIN = ShardedObject("common_state", None, (1,), (0,))
DIRECTORY = ".metadata"
FORMAT_FILE = "metadata.json"  # The last that is written.
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


class DamagedError(ValueError):
    """A file is missing, shorter than it was or holds other bytes than were written; it is named."""


def write(state: Mapping[str, Any], folder: Path) -> None:
    """Write a state dict into an existing, empty folder that all ranks share. A collective of the world.

    Args:
        state: of ``ShardedTensor``, ``ShardedObject`` and plain values; rank 0's plain values are written.

    Raises:
        OSError: a rank could not write; every rank raises it.
        ValueError: the ranks' pieces of a tensor overlap or leave holes; an object could not be read back, because it is more than
            tensors and plain values.
    """
    sharded, plain = extract_sharded_base(dict(state))
    pieces: dict[str, Any] = {}
    for piece in nested_values(sharded):
        if not is_main_replica(piece.replica_id):
            continue
        if isinstance(piece, ShardedObject):
            pieces[piece.unique_key] = [piece.data]
        else:
            piece.data = piece.data.detach()
            pieces[piece.key] = CheckpointableShardedTensor.from_sh_ten(piece)
    if dist.get_rank() == 0:
        pieces[PLAIN.unique_key] = [plain]
    together(lambda: _check_readable(pieces))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(pieces, storage_writer=_Writer(folder), planner=planner)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise_for(rank, cause)
    on_rank_zero(lambda: write_format(folder))


def write_format(folder: Path) -> None:
    """Write the small file by which Megatron knows what the others are."""
    with naming(folder):
        save_config(CheckpointingConfig("torch_dist"), str(folder))


class _Writer(FileSystemWriter):
    """torch's writer, with errors that say where and why."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        with naming(self.path):
            return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        with naming(self.path):
            super().finish(metadata, results)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the operating system name ``path``, if it names no file, as a full disk's does not.

    torch's writer in C++ has only a position to report; the cause is in the context of its error.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _check_readable(pieces: Mapping[str, Any]) -> None:
    for key, value in pieces.items():
        if isinstance(value, CheckpointableShardedTensor):
            continue
        written = io.BytesIO()
        try:
            torch.save(value, written)
            written.seek(0)
            torch.load(written, weights_only=True)
        except Exception as error:
            raise ValueError(f"{key} cannot be saved: it must be tensors and plain values only: {error}") from error


def read(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the files hold for ``state``: no collective, and nothing outside the result changes.

    Args:
        state: each ``ShardedTensor`` says which piece of which tensor is wanted, each ``ShardedObject`` which object.

    Returns:
        ``state`` with CPU tensors and objects in their place, and with the plain values of the files.

    Raises:
        DamagedError: a file is missing, truncated or changed; it is named.
        ValueError: a tensor or an object is missing or of another shape; it is named.
    """
    loaded = read_pieces(state, folder)
    with Reader(folder) as reader:
        return merge(reader.object(PLAIN.unique_key), loaded)  # type: ignore[no-any-return]


def read_pieces(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """:func:`read` without the plain values, which other writers pickle in ways of their own."""
    with Reader(folder) as reader:
        return dict_list_map_inplace(reader.load, extract_sharded_base(dict(state))[0])  # type: ignore[no-any-return]


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
        self._passing = bytearray()  # Memory that is in use is faster than new memory.
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
            return self._stored(key, entry.chunks[0]).contiguous()
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._fill(key, whole, (0,) * whole.ndim, tuple(entry.size))
        return whole

    def object(self, key: str) -> Any:
        """One object.

        Raises:
            ValueError: there is none, it cannot be read, or it is more than tensors and plain values.
        """
        return self._load(MetadataIndex(key))[0]

    def load(self, piece: ShardedTensor | ShardedObject) -> Any:
        """This rank's piece of a tensor, or one of its objects."""
        if isinstance(piece, ShardedObject):
            return self.object(piece.unique_key)
        out = torch.empty(piece.local_shape, dtype=piece.dtype)
        self._fill(piece.key, out, piece.global_offset, piece.global_shape)
        return out

    def _fill(self, key: str, out: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Copy elements [offset, offset + out.shape) of the tensor ``key`` [shape] into ``out``."""
        entry = self._entry(key)
        if tuple(entry.size) != tuple(shape):
            raise ValueError(f"{self.folder}: {key} has shape {list(entry.size)}, expected {list(shape)}")
        missing = out.numel()
        for chunk in entry.chunks:
            both = _intersection(offset, out.shape, chunk.offsets, chunk.sizes)
            if both is None:
                continue
            target, source = both
            out[target].copy_(self._stored(key, chunk, passing=True)[source])
            missing -= math.prod(span.stop - span.start for span in target)
        if missing:
            raise ValueError(f"{self.folder}: {missing} elements of {key} are in no file")

    def _stored(self, key: str, chunk: ChunkStorageMetadata, passing: bool = False) -> torch.Tensor:
        """One of the pieces of the files; a passing one lasts until the next, whose memory it may share."""
        stored: torch.Tensor = self._load(MetadataIndex(key, chunk.offsets), passing)
        if stored.shape != chunk.sizes:
            raise ValueError(f"{self.folder}: a piece of {key} has shape {list(stored.shape)}, not {list(chunk.sizes)}")
        return stored

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{self.folder}: there is no tensor {key}")
        return entry

    def _load(self, index: MetadataIndex, passing: bool = False) -> Any:
        place = self.metadata.storage_data.get(index)
        if place is None:
            raise ValueError(f"{self.folder}: there is no {index.fqn}")
        if place.relative_path not in self._files:
            self._files[place.relative_path] = (self.folder / place.relative_path).open("rb")
        file = self._files[place.relative_path]
        file.seek(place.offset)
        try:
            if passing and len(self._passing) < place.length:
                self._passing = bytearray(place.length)
            content = memoryview(self._passing if passing else bytearray(place.length))[: place.length]
            file.readinto(content)
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


def _intersection(
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
