"""LoRA for Megatron-Core: the same numbers at every parallel layout, and Hugging Face PEFT in both directions."""

from mlora.attach import apply, parameter_counts
from mlora.config import LoraConfig
from mlora.dropout import MicroBatch, set_micro_batch
from mlora.switch import disable_adapter, merge_adapter, set_adapter, unmerge_adapter

__all__ = [
    "LoraConfig",
    "MicroBatch",
    "apply",
    "disable_adapter",
    "merge_adapter",
    "parameter_counts",
    "set_adapter",
    "set_micro_batch",
    "unmerge_adapter",
]
