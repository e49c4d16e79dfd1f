"""What training minimises: the interface between a kind of data with its loss, and the trainer, which knows neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mlora.sft.samples import EncodedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MicroBatches = Sequence[Mapping[str, Any]]


class Objective(Protocol):
    """A loss that is a mean over units of the global batch: target tokens, or pairs of answers.

    Megatron divides the gradients by the number of units in the whole global batch, so that neither the micro batch size nor the
    number of data-parallel ranks changes a step.

    Attributes:
        unit: what the loss is a mean over, in words.
        metrics: names of further means over the units.
    """

    unit: str
    metrics: tuple[str, ...]

    def prepare(self, chunks: Sequence[torch.nn.Module], micro_batches: MicroBatches) -> MicroBatches:
        """What the loss needs to know before the forward passes, in the micro batches. Every rank calls it before a step."""

    def sums(self, batch: Mapping[str, Any], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a micro batch, from its labels' cross entropies [b, s]: sum of the loss, number of units, sums of the metrics [m]."""


class DataObjective(Objective, Protocol):
    """An objective whose data lies in files.

    Attributes:
        rows_of_item: rows that belong together: they stand in one micro batch, one after another.
    """

    rows_of_item: int

    def encode(self, path: str | PathLike[str], tokenizer: "PreTrainedTokenizerBase", seq_length: int) -> EncodedData:
        """The samples of a JSONL file, ``rows_of_item`` of them for each item.

        Raises:
            ValueError: a line is malformed, or no item is left; file and line are named.
        """


@dataclass(frozen=True)
class Totals:
    """Sums over the units of one or several global batches.

    Attributes:
        loss: of the units' losses.
        units: their number.
        target_tokens: that were predicted.
        metrics: of the objective's metrics, by name.
    """

    loss: float
    units: int
    target_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: "Totals") -> "Totals":
        metrics = {name: value + other.metrics[name] for name, value in self.metrics.items()}
        return Totals(
            self.loss + other.loss, self.units + other.units, self.target_tokens + other.target_tokens, metrics
        )

    @property
    def mean_loss(self) -> float:
        """The loss of a unit."""
        return self.loss / self.units

    @property
    def mean_metrics(self) -> dict[str, float]:
        """The metrics of a unit, by name."""
        return {name: value / self.units for name, value in self.metrics.items()}
