"""LoRA for Megatron-Core: the same numbers at every parallel layout, and Hugging Face PEFT in both directions.

A name is imported when it is first used: torch and Megatron take seconds, for which a wrong option should not have to wait.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where the names above are.
MODULES = {
    "mlora.attach": ("apply", "parameter_counts"),
    "mlora.config": ("LoraConfig",),
    "mlora.dropout": ("MicroBatch", "set_micro_batch"),
    "mlora.switch": ("disable_adapter", "merge_adapter", "set_adapter", "unmerge_adapter"),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
