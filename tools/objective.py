"""The trainer's options for what it minimises."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mlora_tools.options import Help, UsageError, check_positive, flag

if TYPE_CHECKING:
    from mlora.objective import DataObjective

REFERENCE = "reference"  # The name of the frozen adapter that --reference-adapter attaches.
_OF_DPO = ("dpo_beta", "dpo_label_smoothing", "reference_adapter")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """objective"""

    objective: Annotated[
        Literal["sft", "dpo"],
        Help(
            'what is minimised: the cross entropy of targets, or the DPO loss of pairs ("prompt", "chosen", "rejected")'
        ),
    ] = "sft"
    dpo_beta: Annotated[float, Help("how much straying from the reference costs")] = 0.1
    dpo_label_smoothing: Annotated[float, Help("probability that a preference is the wrong way round")] = 0.0
    reference_adapter: Annotated[
        Path | None,
        Help(
            "reference of DPO: this adapter, frozen, a PEFT directory or a checkpoint (default: the base model)", "DIR"
        ),
    ] = None

    def __post_init__(self) -> None:
        check_positive(self, "dpo_beta")
        if not 0 <= self.dpo_label_smoothing < 0.5:
            raise UsageError(f"--dpo-label-smoothing {self.dpo_label_smoothing} must be at least 0 and below 0.5")

    def check(self, given: set[str], packing: bool) -> None:
        """Raises UsageError for options that do not go together.

        Args:
            given: names of the options that were given.
        """
        if self.objective == "sft":
            for name in _OF_DPO:
                if name in given:
                    raise UsageError(f"{flag(name)} goes with --objective dpo")
        elif packing:
            raise UsageError(
                "--packing does not go with --objective dpo: an answer's log-probability is summed over its row"
            )

    def make(self) -> "DataObjective":
        """What the trainer minimises."""
        if self.objective == "sft":
            from mlora.sft.objective import Sft

            return Sft()
        from mlora.dpo.objective import Dpo

        return Dpo(self.dpo_beta, self.dpo_label_smoothing, REFERENCE if self.reference_adapter else None)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a run, by the names of the options."""
        if self.objective == "sft":
            return {}
        return {
            "--objective": self.objective,
            "--dpo-beta": self.dpo_beta,
            "--dpo-label-smoothing": self.dpo_label_smoothing,
        }
