"""A rank's share of a global batch as tensors on its device, made when they are asked for."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch

from mlora.sft.batches import Indices, attention_mask, collate, micro_batches, segment_ends
from mlora.sft.packing import Rows


class Feed:
    """Turns row indices of global batches into the micro batches of one data-parallel rank.

    Args:
        rows: of the data.
        micro_batch_size: rows of a micro batch; with ``rows_of_item`` items.
        dp_rank, dp_size: of the data-parallel group.
        device: where the tensors go.
        packed: rows may hold several samples, so attention must be told; else it is plainly causal (padding stands at the
            right, where nothing that counts sees it).
        joined: packed rows stand one after another in one sequence, with ``cu_seqlens``, as Transformer Engine's attention
            takes them; else attention is told by a mask.
        rows_of_item: rows that belong together: indices then are those of items, item i being the ``rows_of_item`` rows from
            ``i · rows_of_item`` on, and ``first_row`` still counts rows.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        packed: bool,
        joined: bool = False,
        rows_of_item: int = 1,
    ) -> None:
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.device = device
        self.packed = packed
        self.joined = joined
        self.rows_of_item = rows_of_item

    def batch(self, indices: Indices) -> "MicroBatches":
        """This rank's micro batches of the global batch of these rows.

        Raises:
            ValueError: the batch does not divide by micro batch and data-parallel size.
        """
        parts = micro_batches(indices, self.micro_batch_size, self.dp_rank, self.dp_size)
        firsts = range(self.dp_rank * self.micro_batch_size, len(indices), self.dp_size * self.micro_batch_size)
        wholes = [self._rows_of(part) for part in parts]
        return MicroBatches(
            self, [(self.rows_of_item * first, part) for first, part in zip(firsts, wholes, strict=True)]
        )

    def _rows_of(self, items: Indices) -> Indices:
        """The rows of items; of the item behind the last one, which stands for padding, the row that does."""
        rows: Indices = np.add.outer(items * self.rows_of_item, np.arange(self.rows_of_item)).ravel()
        return rows.clip(max=len(self.rows))

    def micro_batch(self, first_row: int, indices: Indices) -> dict[str, Any]:
        """What the trainer takes, of rows that stand at ``first_row`` and after in the global batch."""
        tensors = collate([self.rows[index] for index in indices])
        ends = segment_ends(tensors["segments"]) if self.packed and self.joined else None
        batch: dict[str, Any] = {name: value.to(self.device) for name, value in tensors.items()}
        segments = batch.pop("segments")
        if ends is None:
            return {
                **batch,
                "attention_mask": attention_mask(segments) if self.packed else None,
                "first_row": first_row,
            }
        return {
            **{name: value.view(1, -1) for name, value in batch.items()},
            "attention_mask": None,
            "cu_seqlens": ends.to(self.device),
            "max_seqlen": int(ends.diff().max()),
            "first_row": first_row,
            "row_length": segments.shape[1],
        }


class MicroBatches(Sequence[Mapping[str, Any]]):
    """A global batch's micro batches of one rank, each made anew at each access: all masks [b, 1, s, s] would be too much."""

    def __init__(self, feed: Feed, parts: list[tuple[int, Indices]]) -> None:
        self._feed = feed
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, number: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, number: slice) -> "MicroBatches": ...

    def __getitem__(self, number: int | slice) -> "Mapping[str, Any] | MicroBatches":
        if isinstance(number, slice):
            return MicroBatches(self._feed, self._parts[number])
        return self._feed.micro_batch(*self._parts[number])
