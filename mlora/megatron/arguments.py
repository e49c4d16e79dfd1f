"""LoRA's options in Megatron's argument parser: the names, defaults and help of our own trainer's."""

import argparse
from dataclasses import fields
from typing import Any

from mlora.config import LoraConfig
from mlora.options import Lora, add_group


def add_lora_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's ``extra_args_provider``: adds ``--lora-rank`` and the others."""
    add_group(parser, Lora)
    return parser


def lora_config_from_args(args: argparse.Namespace) -> LoraConfig | None:
    """What the options say of the adapter; its seed is ``--seed``. None if none of them was given: then there is no LoRA.

    Raises:
        ValueError: a value makes no sense; the message names the field.
    """
    values: dict[str, Any] = {
        field.name: getattr(args, field.name) for field in fields(Lora) if hasattr(args, field.name)
    }
    if not values:
        return None
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    lora = Lora(**values)
    return LoraConfig.from_dict(lora.fields(args.seed), str(lora.lora_config or "LoRA's options"))
