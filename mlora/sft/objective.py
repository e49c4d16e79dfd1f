"""Supervised fine-tuning: the mean cross entropy of the target tokens."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from mlora.objective import MicroBatches
from mlora.sft.records import read_jsonl
from mlora.sft.samples import EncodedData, encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sft:
    """The objective of supervised fine-tuning; see :class:`mlora.objective.DataObjective`."""

    unit = "target token"
    rows_of_item = 1
    metrics: tuple[str, ...] = ()

    def encode(self, path: str | PathLike[str], tokenizer: "PreTrainedTokenizerBase", seq_length: int) -> EncodedData:
        """One sample for each record."""
        return encode_all(read_jsonl(path), tokenizer, seq_length)

    def prepare(self, chunks: Sequence[torch.nn.Module], micro_batches: MicroBatches) -> MicroBatches:
        """Nothing is needed."""
        return micro_batches

    def sums(self, batch: Mapping[str, Any], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over the target tokens."""
        mask = batch["loss_mask"]
        return (losses.float() * mask).sum(), mask.sum(), losses.new_empty(0, dtype=torch.float32)
