"""Which rows make up which batch, and rows as tensors.

Batches are functions of the iteration number, with no state: resuming is asking for a later iteration, and a layout only
decides which rank takes which slice of the same global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from mlora.sft.packing import Row

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Endless shuffled epochs over the rows, cut into global batches.

    Every epoch is a permutation of its own, a function of (seed, epoch). Batches run on across the end of an epoch, so no
    row is left out and the number of rows may be smaller than a batch.

    Attributes:
        num_rows: rows of data, at least 1.
        global_batch_size: rows of a global batch, at least 1.
        seed: 0 to 2**64 - 1.

    Raises:
        ValueError: a field is out of its range.
    """

    num_rows: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        _check_positive(num_rows=self.num_rows, global_batch_size=self.global_batch_size)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0 to 2**64 - 1, got {self.seed}")

    def rows(self, iteration: int) -> Indices:
        """Row indices of the 0-based global batch ``iteration``, int64 [global_batch_size].

        Raises:
            ValueError: ``iteration`` is negative.
        """
        if iteration < 0:
            raise ValueError(f"iteration must be at least 0, got {iteration}")
        first = iteration * self.global_batch_size
        last = first + self.global_batch_size
        epochs = range(first // self.num_rows, (last - 1) // self.num_rows + 1)
        order = np.concatenate([_permutation(self.num_rows, self.seed, epoch) for epoch in epochs])
        offset = first - epochs.start * self.num_rows
        return order[offset : offset + self.global_batch_size]


@dataclass(frozen=True)
class EvalPlan:
    """Every row once, in order, cut into global batches; the last one is filled up with rows of padding.

    The filler has the index ``num_rows``, which ``Rows`` answers with a row whose loss mask is zero.

    Attributes:
        num_rows: rows of data, at least 1.
        global_batch_size: rows of a global batch, at least 1.

    Raises:
        ValueError: a field is out of its range.
    """

    num_rows: int
    global_batch_size: int

    def __post_init__(self) -> None:
        _check_positive(num_rows=self.num_rows, global_batch_size=self.global_batch_size)

    @property
    def num_batches(self) -> int:
        """Global batches that it takes to see every row."""
        return -(-self.num_rows // self.global_batch_size)

    def rows(self, batch: int) -> Indices:
        """Row indices of the 0-based global batch, int64 [global_batch_size].

        Raises:
            ValueError: there is no such batch.
        """
        if not 0 <= batch < self.num_batches:
            raise ValueError(f"evaluation has {self.num_batches} batches, there is no batch {batch}")
        first = batch * self.global_batch_size
        return np.minimum(np.arange(first, first + self.global_batch_size, dtype=np.int64), self.num_rows)


def micro_batches(rows: Indices, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Indices]:
    """A data-parallel rank's micro-batches of a global batch, each int64 [micro_batch_size].

    Micro-batch m of rank d is ``rows[(m * dp_size + d) * micro_batch_size :][:micro_batch_size]``.

    Raises:
        ValueError: the global batch does not divide by ``micro_batch_size * dp_size``, or there is no such rank.
    """
    _check_positive(micro_batch_size=micro_batch_size, dp_size=dp_size)
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank must be in 0 to {dp_size - 1}, got {dp_rank}")
    if len(rows) % (micro_batch_size * dp_size):
        raise ValueError(
            f"global batch size {len(rows)} is not a multiple of micro batch size {micro_batch_size} "
            f"times data-parallel size {dp_size}"
        )
    return list(rows.reshape(-1, dp_size, micro_batch_size)[:, dp_rank])


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows as CPU tensors [b, s]: "tokens", "labels", "position_ids" int64, "loss_mask" float32, "segments" int32.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("there is no row to collate")
    fields = ("tokens", "labels", "loss_mask", "segments", "position_ids")
    return {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in fields}


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """What may not be attended to, bool [b, 1, s, s], [.., query, key], True = masked (Megatron's convention).

    A place attends to itself and to earlier places of its own segment. Padding is a segment like the others: it attends to
    padding only, and always to itself, so no softmax is over nothing.

    Args:
        segments: [b, s], the segment of each place.
    """
    other = segments[:, None, :, None] != segments[:, None, None, :]
    length = segments.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(1)
    return other | later


def segment_ends(segments: torch.Tensor) -> torch.Tensor:
    """Where the segments of all rows, one row after another, begin and end: int32 [segments + 1], from 0 to b·s.

    Args:
        segments: [b, s], the segment of each place; a segment's places stand together. Padding is a segment like the others.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    end = torch.tensor([segments.numel()])
    return torch.cat([begins.flatten().nonzero().flatten(), end]).to(torch.int32)


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Indices:
    """A permutation of ``count`` indices, a function of its arguments alone.

    It sorts the raw words of Philox4x64-10 (Salmon et al. 2011) under the key (seed, epoch). NumPy keeps that stream
    for good, which it does not promise of ``Generator.permutation``: a run also resumes under another NumPy.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)  # shared by the cache
    return order
