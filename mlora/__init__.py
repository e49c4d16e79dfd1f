"""LoRA for Megatron-Core: the same numbers at every parallel layout, and Hugging Face PEFT in both directions.

A name is imported when it is first used: torch and Megatron take seconds, for which a wrong option should not have to wait.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlora.attach import apply
    from mlora.config import LoraConfig
    from mlora.counts import parameter_counts
    from mlora.dropout import MicroBatch, set_micro_batch
    from mlora.saved import load_adapter
    from mlora.streaming import iter_adapter_tensors, iter_merged_tensors
    from mlora.switch import (
        adapter_names,
        delete_adapter,
        disable_adapter,
        merge_adapter,
        set_adapter,
        unmerge_adapter,
        use_adapter,
    )

__all__ = [
    "LoraConfig",
    "MicroBatch",
    "adapter_names",
    "apply",
    "delete_adapter",
    "disable_adapter",
    "iter_adapter_tensors",
    "iter_merged_tensors",
    "load_adapter",
    "merge_adapter",
    "parameter_counts",
    "set_adapter",
    "set_micro_batch",
    "unmerge_adapter",
    "use_adapter",
]

# Where the names above are.
MODULES = {
    "mlora.attach": ("apply",),
    "mlora.config": ("LoraConfig",),
    "mlora.counts": ("parameter_counts",),
    "mlora.dropout": ("MicroBatch", "set_micro_batch"),
    "mlora.saved": ("load_adapter",),
    "mlora.streaming": ("iter_adapter_tensors", "iter_merged_tensors"),
    "mlora.switch": (
        "adapter_names",
        "delete_adapter",
        "disable_adapter",
        "merge_adapter",
        "set_adapter",
        "unmerge_adapter",
        "use_adapter",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
