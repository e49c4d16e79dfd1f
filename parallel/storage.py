"""A sharded state dict in a folder of files: each rank writes its pieces, ranks of any other layout read theirs.

The files are those of Megatron's ``torch_dist`` (torch's distributed checkpoint). Megatron's own entry points are not used: where
one rank fails to write, its others would wait for ever; and reading can run what a file holds (:mod:`parallel.reader`). Here an
error on one rank is every rank's error.

A rank's piece may reach beyond the whole tensor: what lies there is padding (of the vocabulary), which is not written, and zero
when it is read.
"""

import io
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from parallel.errors import naming
from parallel.reader import PLAIN, Reader, intersection
from parallel.stream import write_format
from parallel.together import on_rank_zero, raise_for, together


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
            if (inside := _inside(piece)) is not None:
                pieces[piece.key] = CheckpointableShardedTensor.from_sh_ten(inside)
    if dist.get_rank() == 0:
        pieces[PLAIN] = [plain]
    together(lambda: _check_readable(pieces))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(pieces, storage_writer=_Writer(folder), planner=planner)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise_for(rank, cause)
    on_rank_zero(lambda: write_format(folder))


def _inside(piece: ShardedTensor) -> ShardedTensor | None:
    """The part of a rank's piece that lies in the whole tensor; None if none of it does."""
    both = intersection(piece.global_offset, piece.local_shape, (0,) * len(piece.global_shape), piece.global_shape)
    if both is None:
        return piece if 0 in piece.local_shape else None
    data = piece.data[both[0]]
    return piece if data.shape == piece.data.shape else replace(piece, data=data, local_shape=tuple(data.shape))


class _Writer(FileSystemWriter):
    """torch's writer, with errors that say where and why."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        with naming(self.path):
            return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        with naming(self.path):
            super().finish(metadata, results)


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
        return merge(reader.object(PLAIN), loaded)  # type: ignore[no-any-return]


def read_pieces(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """:func:`read` without the plain values, which other writers pickle in ways of their own."""
    with Reader(folder) as reader:
        wanted, _ = extract_sharded_base(dict(state))
        return dict_list_map_inplace(partial(_load, reader), wanted)  # type: ignore[no-any-return]


def _load(reader: Reader, piece: ShardedTensor | ShardedObject) -> Any:
    """This rank's piece of a tensor, or one of its objects."""
    if isinstance(piece, ShardedObject):
        return reader.object(piece.unique_key)
    out = torch.zeros(piece.local_shape, dtype=piece.dtype)
    reader.fill(piece.key, out, piece.global_offset, piece.global_shape)
    return out
