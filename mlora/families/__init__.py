"""One file for each family of Hugging Face models: how its configuration, modules and tensors map to Megatron.

A new family is one such file and an entry in :data:`FAMILIES`.
"""

from collections.abc import Mapping
from typing import Any

from mlora.families.family import Architecture, Family
from mlora.families.gemma2 import GEMMA2
from mlora.families.gemma3 import GEMMA3
from mlora.families.llama import LLAMA
from mlora.families.mistral import MISTRAL
from mlora.families.olmo2 import OLMO2
from mlora.families.phi3 import PHI3
from mlora.families.qwen2 import QWEN2
from mlora.families.qwen3 import QWEN3

__all__ = [
    "FAMILIES",
    "GEMMA2",
    "GEMMA3",
    "LLAMA",
    "MISTRAL",
    "OLMO2",
    "PHI3",
    "QWEN2",
    "QWEN3",
    "Architecture",
    "Family",
    "find_family",
]

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, OLMO2)
}


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
