"""The trainer's options for the adapter, as fields of PEFT's and mlora's ``LoraConfig``."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mlora_tools.options import Help, UsageError

_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA, each option a field of PEFT's LoraConfig"""

    lora_rank: Annotated[int, Help("r")] = 8
    lora_alpha: Annotated[float, Help("numerator of the scaling alpha / r")] = 8.0
    lora_dropout: Annotated[float, Help("probability that an input feature of lora_A is zeroed")] = 0.0
    lora_target_modules: Annotated[
        tuple[str, ...],
        Help("Hugging Face names (q_proj) or Megatron names (linear_qkv), or one regular expression on the whole path"),
    ] = ("all-linear",)
    lora_exclude_modules: Annotated[tuple[str, ...], Help("names not to adapt, given likewise")] = ()
    lora_layers: Annotated[tuple[int, ...] | None, Help("adapt only these layers, counted from 0")] = None
    lora_use_rslora: Annotated[bool, Help("scaling alpha / sqrt(r)")] = False
    lora_use_dora: Annotated[bool, Help("DoRA: train the lengths of the adapted weight's rows too")] = False
    lora_init: Annotated[
        str,
        Help("PEFT's init_lora_weights: true, false, gaussian, orthogonal, pissa, pissa_niter_N or olora", "INIT"),
    ] = "true"
    lora_shared_a: Annotated[bool, Help("one lora_A for the projections that Megatron fuses (q, k, v; gate, up)")] = (
        False
    )
    lora_adapter_dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Help("of the adapter (default: the base's)")
    ] = None
    lora_config: Annotated[Path | None, Help("PEFT's adapter_config.json in place of the options above", "FILE")] = None

    def fields(self, seed: int) -> dict[str, Any]:
        """Fields of :class:`mlora.config.LoraConfig`, as its ``from_dict`` takes them.

        Raises:
            UsageError: the file is no JSON object, or names and regular expressions are mixed.
        """
        if self.lora_config is not None:
            try:
                values = json.loads(self.lora_config.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise UsageError(f"{self.lora_config}: not valid JSON: {error}") from None
            if not isinstance(values, dict):
                raise UsageError(f"{self.lora_config}: expected a JSON object")
            return {"seed": seed, **values}
        return {
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": _modules("--lora-target-modules", self.lora_target_modules),
            "exclude_modules": _modules("--lora-exclude-modules", self.lora_exclude_modules) or None,
            "layers_to_transform": self.lora_layers,
            "use_rslora": self.lora_use_rslora,
            "use_dora": self.lora_use_dora,
            "init_lora_weights": {"true": True, "false": False}.get(self.lora_init, self.lora_init),
            "shared_A": self.lora_shared_a,
            "adapter_dtype": self.lora_adapter_dtype,
            "seed": seed,
        }


def _modules(flag: str, words: tuple[str, ...]) -> str | tuple[str, ...]:
    """PEFT's form: one word that is no plain name is a regular expression, as is "all-linear" a word of its own."""
    if words == ("all-linear",):
        return words[0]
    expressions = [word for word in words if not _NAME.fullmatch(word)]
    if not expressions:
        return words
    if len(words) > 1:
        raise UsageError(f"{flag}: give names, or one regular expression; {expressions[0]!r} is no name")
    try:
        re.compile(expressions[0])
    except re.error as error:
        raise UsageError(f"{flag}: {expressions[0]!r} is no regular expression: {error}") from None
    return expressions[0]
