"""verl's words for LoRA: its model configuration as an attached adapter.

| verl | here |
|---|---|
| `lora_rank` | `r`; 0 for no LoRA |
| `lora_alpha`, `target_modules`, `exclude_modules` | the same |
| `lora_adapter_path` | an adapter to start from, with its own ranks, alphas and targets |
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mlora.attach import apply
from mlora.config import LoraConfig
from mlora.names import DEFAULT_ADAPTER
from mlora.pretrained import Pretrained
from mlora.saved import SavedAdapter, load_adapter
from parallel.together import together

logger = logging.getLogger(__name__)

_PATH = "lora_adapter_path"
# What an adapter on disk decides itself; its targets are not held against verl's default.
_SAME = {"lora_rank": "r", "r": "r", "lora_alpha": "lora_alpha"}


def attach(
    model: Sequence[torch.nn.Module],
    settings: Mapping[str, Any],
    *,
    base: Pretrained | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
) -> list[torch.nn.Module]:
    """Freeze the base and attach the adapter that verl's ``settings`` describe. Every rank calls it, before DDP.

    Args:
        model: this rank's chunks.
        settings: verl's words; other fields of :class:`~mlora.config.LoraConfig` may stand beside them.
        base: the model's directory, for a PEFT adapter and for families whose names are not Llama's.

    Returns:
        ``model``'s chunks; with a rank of 0 and no path, as they were.

    Raises:
        FileNotFoundError, ValueError: a word is unknown, ``lora_rank`` and ``r`` contradict each other or the adapter at
            ``lora_adapter_path``, or as :func:`mlora.apply` and :func:`mlora.load_adapter`.
    """
    path, words = settings.get(_PATH), {key: value for key, value in settings.items() if key != _PATH}
    if path:
        # Only to know every word: the configuration is the saved adapter's.
        LoraConfig.from_dict(words | {"lora_rank": words.get("lora_rank") or None}, "verl's settings")
        together(lambda: _check_same(SavedAdapter.open(path, base).config, settings))
        load_adapter(model, path, adapter_name, base=base)
        return list(model)
    if settings.get("lora_rank") == 0:
        if dist.get_rank() == 0:
            logger.info("lora_rank is 0: no adapter is attached, and nothing is frozen")
        return list(model)
    config = LoraConfig.from_dict(words, "verl's settings")
    return apply(model, config, adapter_name, family=base.family if base else None)


def _check_same(config: LoraConfig, settings: Mapping[str, Any]) -> None:
    for word, name in _SAME.items():
        theirs = settings.get(word)
        if theirs is not None and theirs != getattr(config, name):
            raise ValueError(
                f"{word} is {theirs!r}, and the adapter at {settings[_PATH]} has {getattr(config, name)!r}"
            )
