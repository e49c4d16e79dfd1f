"""Samples in rows of a fixed length: one sample a row, or as many as fit.

Nothing here depends on a parallel layout: the same samples give the same rows everywhere.
"""

import logging
import operator
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from mlora.sft.samples import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of a batch; every array is [seq_length].

    A sample of n tokens takes n - 1 places: its tokens but the last, under its tokens but the first as labels. So no label
    comes from another sample. Padding stands at the right, with the padding token as token and label.

    Attributes:
        tokens: input ids, int64.
        labels: the token to predict at each place, int64.
        loss_mask: float32, 1 where the label is a target, else 0.
        segments: int32, 1, 2, … for the samples of the row, 0 for padding.
        position_ids: int64, counted from 0 in every sample; 0 in padding.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    segments: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int64]


class Rows:
    """Rows by index, each made when it is asked for (all at once they would take 32 bytes a place).

    ``rows[i]`` for ``0 <= i < len(rows)`` is a row of data. ``rows[len(rows)]`` is a row of padding only, the filler that
    ``EvalPlan`` names by this index. Other indices, negative ones too, raise IndexError.

    Attributes:
        bins: for each row the indices of its samples, ascending.
        seq_length: places in a row.
        pad_id: the padding token.
    """

    def __init__(self, samples: Sequence[Sample], bins: Sequence[Sequence[int]], seq_length: int, pad_id: int) -> None:
        self._samples = samples
        self.bins = bins
        self.seq_length = seq_length
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.bins)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: SupportsIndex) -> Row:
        at = operator.index(index)
        if not 0 <= at <= len(self):
            raise IndexError(f"row {at} of {len(self)}")
        members = self.bins[at] if at < len(self) else ()
        return _row([self._samples[member] for member in members], self.seq_length, self.pad_id)


def single_rows(samples: Sequence[Sample], seq_length: int, pad_id: int) -> Rows:
    """Row i holds sample i alone.

    Raises:
        ValueError: there is no sample, or a sample has fewer than 2 or more than ``seq_length + 1`` tokens.
    """
    _places(samples, seq_length)
    return Rows(samples, [(index,) for index in range(len(samples))], seq_length, pad_id)


def packed_rows(samples: Sequence[Sample], seq_length: int, pad_id: int) -> Rows:
    """Whole samples packed into few rows: best fit, longest first (at most 11/9 of the fewest + 4; Johnson et al. 1974).

    Samples stand in a row in their order, rows in the order of their first samples. O(n log n) for n samples.

    Raises:
        ValueError: there is no sample, or a sample has fewer than 2 or more than ``seq_length + 1`` tokens.
    """
    places = _places(samples, seq_length)
    bins = sorted(sorted(members) for members in _best_fit(places, seq_length))
    rows = Rows(samples, bins, seq_length, pad_id)
    full = 100 * int(places.sum()) / (len(rows) * seq_length)
    logger.info("%d samples in %d rows of %d, %.1f %% full", len(samples), len(rows), seq_length, full)
    return rows


def _places(samples: Sequence[Sample], seq_length: int) -> npt.NDArray[np.int64]:
    """Places that each sample takes in a row, [number of samples]."""
    if not samples:
        raise ValueError("there is no sample to put into rows")
    places = np.array([len(sample.tokens) - 1 for sample in samples], dtype=np.int64)
    wrong = np.flatnonzero((places < 1) | (places > seq_length))
    if len(wrong):
        count = places[wrong[0]] + 1
        raise ValueError(
            f"sample {wrong[0]} has {count} tokens; a row of seq_length {seq_length} takes 2 to {seq_length + 1}"
        )
    return places


def _best_fit(places: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Each sample, longest first, goes into the bin with the least space that still holds it."""
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # space left -> bins with it
    spaces: list[int] = []  # the keys of open_bins, ascending; at most `capacity` of them
    for sample in np.argsort(-places, kind="stable").tolist():
        need = int(places[sample])
        at = bisect_left(spaces, need)
        if at == len(spaces):
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            chosen = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space], spaces[at]
        bins[chosen].append(sample)
        left = space - need
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(spaces, left)
            open_bins[left].append(chosen)
    return bins


def _row(samples: Sequence[Sample], seq_length: int, pad_id: int) -> Row:
    row = Row(
        tokens=np.full(seq_length, pad_id, dtype=np.int64),
        labels=np.full(seq_length, pad_id, dtype=np.int64),
        loss_mask=np.zeros(seq_length, dtype=np.float32),
        segments=np.zeros(seq_length, dtype=np.int32),
        position_ids=np.zeros(seq_length, dtype=np.int64),
    )
    start = 0
    for number, sample in enumerate(samples, start=1):
        count = len(sample.tokens) - 1
        here = slice(start, start + count)
        row.tokens[here] = sample.tokens[:-1]
        row.labels[here] = sample.tokens[1:]
        row.loss_mask[here] = sample.is_target[1:]
        row.segments[here] = number
        row.position_ids[here] = np.arange(count)
        start += count
    return row
