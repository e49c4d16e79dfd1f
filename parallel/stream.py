"""The files of :mod:`parallel.storage` written by one process, tensor after tensor: no ranks, and memory holds one tensor.

torch's own writer keeps every tensor until the last is written.
"""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from parallel.errors import naming
from parallel.reader import DIRECTORY, FORMAT_FILE, PLAIN
from parallel.writeback import WriteBack

_FILE = "__0_0.distcp"  # torch's name for the first file of rank 0


def write_stream(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write whole tensors, each with its key, into an existing, empty folder; each is taken when the one before is written.

    What :func:`parallel.storage.write` writes on a single rank, with the tensors in one file and no plain values.

    Raises:
        OSError: the folder cannot be written.
        ValueError: a key comes twice.
    """
    directory = Metadata({}, storage_data={})
    with naming(folder), WriteBack(folder / _FILE) as file:
        directory.state_dict_metadata[PLAIN] = BytesStorageMetadata()
        directory.storage_data[MetadataIndex(PLAIN)] = _append(file, [{}])
        for key, tensor in tensors:
            if key in directory.state_dict_metadata:
                raise ValueError(f"{folder}: {key} is written twice")
            tensor = _alone(tensor)
            start = torch.Size([0] * tensor.ndim)
            directory.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [ChunkStorageMetadata(start, tensor.shape)]
            )
            directory.storage_data[MetadataIndex(key, start, 0)] = _append(file, tensor)
            del tensor  # Else it would live until the next one, which is made first.
    with naming(folder), (folder / DIRECTORY).open("xb") as file:
        pickle.dump(directory, file)
    write_format(folder)


def write_format(folder: Path) -> None:
    """Write the small file by which Megatron knows what the others are."""
    with naming(folder):
        (folder / FORMAT_FILE).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def _append(file: BinaryIO, value: Any) -> _StorageInfo:
    start = file.tell()
    torch.save(value, file)
    return _StorageInfo(_FILE, start, file.tell() - start)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the memory that it may share with others, which would be written too."""
    tensor = tensor.detach().cpu()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
