"""One file for each family of Hugging Face models: how its configuration, modules and tensors map to Megatron.

A new family is one such file and an entry in :data:`FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from mlora.families.family import Architecture, Family
from mlora.families.llama import LLAMA
from mlora.families.mistral import MISTRAL
from mlora.families.qwen2 import QWEN2
from mlora.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "LLAMA", "MISTRAL", "QWEN2", "QWEN3", "Architecture", "Family", "find_family"]

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def find_family(config: Mapping[str, Any], source: str = "config.json") -> Family:
    """The family of a ``config.json``.

    Raises:
        ValueError: there is none for its ``model_type``.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(f"{source}: model_type = {model_type!r} is not supported; it can be {', '.join(FAMILIES)}")
    return family
