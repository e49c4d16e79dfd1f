"""Direct preference optimisation (Rafailov et al. 2023, eq. 7) as an objective of the trainer.

    L = -log σ(β Δ),   Δ = log π(chosen) / π_ref(chosen) - log π(rejected) / π_ref(rejected)

π is the model with the adapter that trains, π_ref the model with it off, or with a named frozen one: nothing is held twice. With
label smoothing ε, L = -(1 - ε) log σ(β Δ) - ε log σ(-β Δ) (Mitchell 2023, "cDPO"). β log π / π_ref is an answer's reward.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, overload

import torch
from torch.nn.functional import logsigmoid

from mlora.dpo.records import read_preferences
from mlora.dpo.samples import encode_pairs
from mlora.log_probs import log_probs
from mlora.objective import MicroBatches
from mlora.sft.samples import EncodedData
from mlora.switch import disable_adapter, use_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE = "reference"  # What a micro batch calls the reference's log-probabilities [b, s].


class Dpo:
    """The objective of DPO; see :class:`mlora.objective.DataObjective`. Rows come as chosen, rejected, chosen, rejected, ...

    Args:
        beta: how much straying from the reference costs, above 0.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5).
        reference: the named adapter that is the reference; None for the base model.
    """

    unit = "pair of answers"
    rows_of_item = 2
    metrics: tuple[str, ...] = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, reference: str | None = None) -> None:
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be above 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
        self.beta, self.label_smoothing, self.reference = beta, label_smoothing, reference

    def encode(self, path: str | PathLike[str], tokenizer: "PreTrainedTokenizerBase", seq_length: int) -> EncodedData:
        """Two samples for each preference."""
        return encode_pairs(read_preferences(path), tokenizer, seq_length)

    def prepare(self, chunks: Sequence[torch.nn.Module], micro_batches: MicroBatches) -> MicroBatches:
        """The reference's log-probabilities, from a forward pass by the same schedule, on the ranks that compute the loss."""
        with use_adapter(chunks, self.reference) if self.reference else disable_adapter(chunks):
            return WithReference(micro_batches, log_probs(chunks, micro_batches))

    def sums(self, batch: Mapping[str, Any], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over the pairs; one of padding does not count."""
        mask = batch["loss_mask"]
        # Token by token, before their sum: that keeps what the difference of two large sums would lose.
        ratios = ((-losses.float() - batch[REFERENCE]) * mask).sum(1).view(-1, 2)
        counts = (mask.view(-1, 2, mask.shape[1]).sum(2) > 0).all(1).float()
        rewards = self.beta * ratios
        chosen, rejected = rewards.unbind(1)
        margin = chosen - rejected
        loss = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        metrics = torch.stack([chosen, rejected, margin, (margin > 0).float()]).detach()
        return (loss * counts).sum(), counts.sum(), (metrics * counts).sum(1)


class WithReference(Sequence[Mapping[str, Any]]):
    """Micro batches with the reference's log-probabilities, where there are any: on the ranks of the last stage."""

    def __init__(self, micro_batches: MicroBatches, reference: Sequence[torch.Tensor]) -> None:
        self._micro_batches = micro_batches
        self._reference = reference

    def __len__(self) -> int:
        return len(self._micro_batches)

    @overload
    def __getitem__(self, number: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, number: slice) -> "WithReference": ...

    def __getitem__(self, number: int | slice) -> "Mapping[str, Any] | WithReference":
        if isinstance(number, slice):
            return WithReference(self._micro_batches[number], self._reference[number])
        batch = self._micro_batches[number]
        return {**batch, REFERENCE: self._reference[number]} if self._reference else batch
