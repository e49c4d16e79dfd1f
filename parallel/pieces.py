"""Whole tensors on every rank from the pieces that the ranks of a model hold, bucket by bucket, on the device.

A bucket holds tensors of one pipeline stage. Each tensor-parallel rank of that stage puts its pieces of them into a buffer, which
it broadcasts along the pipeline; then the ranks of every stage gather the buffers of their tensor-parallel group:

    for a bucket of n bytes over t ranks:  one broadcast of n/t bytes,  one all-gather of n bytes

Where several ranks hold the same piece, such as the whole of a replicated tensor, each sends its share of the rows, so that nothing
is sent twice. A buffer is as long as the longest of its group's. Data-parallel ranks do the same side by side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from parallel import collectives

BUCKET_BYTES = 2**28


@dataclass(frozen=True)
class Piece:
    """A part of a whole tensor that this rank holds, or can make.

    Attributes:
        name: of the whole tensor.
        shape: of the whole tensor.
        offset: of the piece in it.
        size: shape of the piece.
        dtype: of the tensor.
        make: gives the piece, in its dtype and on the device; called when its bucket is due.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Block:
    """What one tensor-parallel rank sends of a tensor: rows [first, first + rows) of its piece at ``offset``."""

    rank: int
    offset: tuple[int, ...]
    first: int
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.size).numel()

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """Its place in the whole tensor."""
        start = (self.offset[0] + self.first, *self.offset[1:])
        return whole[tuple(slice(at, at + count) for at, count in zip(start, self.size, strict=True))]


@dataclass
class _Whole:
    """A tensor: the stage that has it, and (offset, size) of its pieces with the tensor-parallel ranks that hold each."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    holders: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def blocks(self, ends: list[int]) -> Iterator[tuple[_Block, int]]:
        """Its blocks and where they begin in their rank's buffer; ``ends`` of the buffers move on.

        Of rows that do not divide, the rank with the shortest buffer takes more.
        """
        for (offset, size), ranks in self.holders.items():
            for share, rank in enumerate(sorted(ranks, key=lambda rank: -ends[rank])):
                first, end = (size[0] * number // len(ranks) for number in (share, share + 1))
                if end > first:
                    block = _Block(rank, offset, first, (end - first, *size[1:]))
                    yield block, ends[rank]
                    ends[rank] += block.elements


_Record = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype]


def whole_tensors(pieces: Sequence[Piece], bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, torch.Tensor]]:
    """Every whole tensor with its name, on every rank: stage by stage, in the order in which a stage's ranks name them.

    All ranks of the model must take every value, because there are collectives between them; before the first, a collective of
    objects says what there is. Memory is that of a bucket and of a gathered one; a value may share a bucket's memory, which lives
    as long as it.

    Args:
        pieces: of this rank.
        bucket_bytes: of whole tensors in a bucket; a larger tensor has a bucket of its own.

    Raises:
        ValueError: ``bucket_bytes`` is below 1; ranks disagree on a tensor, or no rank holds a part of one; on every rank alike,
            before the first value.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    mine = {(piece.name, piece.offset): piece for piece in pieces}
    buckets = list(_buckets(_plan(_records(pieces)), bucket_bytes))
    return _stream(buckets, mine)


@torch.no_grad()
def _stream(
    buckets: Sequence[Sequence[_Whole]], mine: Mapping[tuple[str, tuple[int, ...]], Piece]
) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        yield from _exchange(bucket, mine)


def _records(pieces: Sequence[Piece]) -> dict[tuple[int, int], list[_Record]]:
    """(stage, tensor-parallel rank) -> what it holds."""
    here = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    records = [(piece.name, piece.shape, piece.offset, piece.size, piece.dtype) for piece in pieces]
    group = parallel_state.get_model_parallel_group()
    if group.size() == 1:
        return {here: records}
    found: list[tuple[tuple[int, int], list[_Record]]] = [(here, records)] * group.size()
    dist.all_gather_object(found, (here, records), group=group)
    return dict(sorted(found, key=lambda item: item[0]))


def _plan(records: dict[tuple[int, int], list[_Record]]) -> list[_Whole]:
    wholes: dict[str, _Whole] = {}
    for (stage, rank), held in records.items():
        for name, shape, offset, size, dtype in held:
            whole = wholes.setdefault(name, _Whole(name, shape, dtype, stage))
            if (whole.shape, whole.dtype, whole.stage) != (shape, dtype, stage):
                raise ValueError(
                    f"{name} is {whole.dtype} {list(whole.shape)} on stage {whole.stage} and {dtype} {list(shape)} on stage {stage}"
                )
            whole.holders.setdefault((offset, size), []).append(rank)
    for whole in wholes.values():
        if sum(torch.Size(size).numel() for _, size in whole.holders) != torch.Size(whole.shape).numel():
            raise ValueError(f"the pieces of {whole.name} do not make up a tensor of shape {list(whole.shape)}")
    return list(wholes.values())


def _buckets(wholes: Sequence[_Whole], limit: int) -> Iterator[list[_Whole]]:
    for _, same in groupby(wholes, key=lambda whole: (whole.stage, whole.dtype)):
        bucket: list[_Whole] = []
        for whole in same:
            if bucket and sum(held.nbytes for held in bucket) + whole.nbytes > limit:
                yield bucket
                bucket = []
            bucket.append(whole)
        yield bucket


def _exchange(
    bucket: Sequence[_Whole], mine: Mapping[tuple[str, tuple[int, ...]], Piece]
) -> Iterator[tuple[str, torch.Tensor]]:
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    stages = parallel_state.get_pipeline_model_parallel_group()
    ends = [0] * tensor_group.size()
    places = [list(whole.blocks(ends)) for whole in bucket]
    buffer = torch.empty(max(ends), dtype=bucket[0].dtype, device=torch.cuda.current_device())
    stage = bucket[0].stage
    if stages.rank() == stage:
        for whole, blocks in zip(bucket, places, strict=True):
            for block, at in blocks:
                if block.rank == tensor_group.rank():
                    piece = mine[whole.name, block.offset].make()
                    buffer[at : at + block.elements].view(block.size).copy_(
                        piece[block.first : block.first + block.size[0]]
                    )
        buffer[ends[tensor_group.rank()] :].zero_()
    if stages.size() > 1:
        dist.broadcast(buffer, src=dist.get_global_rank(stages, stage), group=stages)
    gathered = collectives.all_gather(buffer, tensor_group).view(tensor_group.size(), -1)
    for whole, blocks in zip(bucket, places, strict=True):
        yield whole.name, _assembled(whole, blocks, gathered)


def _assembled(whole: _Whole, blocks: Sequence[tuple[_Block, int]], gathered: torch.Tensor) -> torch.Tensor:
    """A tensor from the buffers [t, n]; without a copy if it is in one of them as it is."""
    sent = [gathered[block.rank, at : at + block.elements].view(block.size) for block, at in blocks]
    if len(sent) == 1:
        return sent[0]
    result = sent[0].new_empty(whole.shape)
    for (block, _), part in zip(blocks, sent, strict=True):
        block.within(result).copy_(part)
    return result
