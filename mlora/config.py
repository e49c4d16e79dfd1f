"""What to adapt and how: Hugging Face PEFT's ``LoraConfig`` field names and JSON, plus the few fields that PEFT has not."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# PEFT's fields that mlora has no use for -> the values under which they change nothing. Another value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "eva_config": (None,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# PEFT's fields that describe the file and not the mathematics.
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter: ``y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ`` on each targeted linear (Hu et al. 2021, eq. 3).

    Field names, defaults and JSON are PEFT's; names are matched by PEFT's rules on Hugging Face names (``q_proj``) and, by the
    same rules, on Megatron names (``linear_qkv``: every projection it holds).

    Attributes:
        r: rank, at least 1.
        lora_alpha: numerator of the scaling ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).
        lora_dropout: probability in [0, 1) that an input feature of A is zeroed in training.
        target_modules: names to adapt: a list (a name matches a module whose path is it or ends in ``.name``), a string (a
            regular expression that matches the whole path), or "all-linear": every linear but the output layer.
        exclude_modules: names not to adapt, a list or a regular expression likewise.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023).
        rank_pattern, alpha_pattern: regular expression on the end of a path -> rank or alpha of the modules that it matches.
        layers_to_transform: only these layer indices (over the whole model); with a list of target modules.
        layers_pattern: names of the module lists that ``layers_to_transform`` counts in, such as "layers".
        init_lora_weights: True (A Kaiming uniform, B zero), "gaussian" (A normal with std 1/r, B zero) or False (both random).
        bias: "none": base biases stay frozen.
        shared_A: one A for all projections of a fused linear (q, k, v; gate, up) in place of one each.
        adapter_dtype: of A and B; None for the base weight's.
        seed: of the initial weights and the dropout masks.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    shared_A: bool = False
    adapter_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(sorted(value) if isinstance(value, set | frozenset) else value))
        if self.layers_to_transform is not None and not isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        if isinstance(self.adapter_dtype, str):
            object.__setattr__(self, "adapter_dtype", _dtype(self.adapter_dtype))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name) or {})))
        self._check_numbers()
        self._check_names()

    def _check_numbers(self) -> None:
        for where, rank in [
            ("r", self.r),
            *((f"rank_pattern[{key!r}]", rank) for key, rank in self.rank_pattern.items()),
        ]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{where} is {rank!r}; a LoRA rank is a whole number of at least 1")
        alphas = [(f"alpha_pattern[{key!r}]", alpha) for key, alpha in self.alpha_pattern.items()]
        for where, alpha in [("lora_alpha", self.lora_alpha), *alphas]:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(
                    f"{where} is {alpha!r}; it must be a positive number (with 0 the adapter would do nothing)"
                )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")

    def _check_names(self) -> None:
        if not self.target_modules:
            raise ValueError('target_modules is empty; name modules, a regular expression, or "all-linear"')
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f'init_lora_weights is {self.init_lora_weights!r}; it can be true, false or "gaussian"')
        if self.bias != "none":
            raise ValueError(f'bias is {self.bias!r}; only "none" is supported: base biases stay frozen')
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform; give both or neither")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                raise ValueError(
                    "layers_to_transform needs target_modules as a list; a regular expression can name the layers"
                )

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor of the low-rank product for a module of this rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values under the field names."""
        values: dict[str, Any] = {name.name: getattr(self, name.name) for name in fields(self)}
        for key, value in values.items():
            if isinstance(value, tuple):
                values[key] = list(value)
            elif isinstance(value, Mapping):
                values[key] = dict(value)
            elif isinstance(value, torch.dtype):
                values[key] = str(value).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> "LoraConfig":
        """A configuration from PEFT's or mlora's JSON values.

        Raises:
            ValueError: for a key that neither knows (with the nearest that exists), or a PEFT feature that mlora lacks.
        """
        known = {name.name for name in fields(cls)}
        kind = values.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(f"{source}: peft_type is {kind!r}; only LORA is supported")
        for key, value in values.items():
            if key in known or key in _DESCRIPTIVE:
                continue
            if key not in _NEUTRAL:
                near = difflib.get_close_matches(key, [*known, *_NEUTRAL], n=1)
                raise ValueError(f"{source}: unknown field {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            if value not in _NEUTRAL[key]:
                raise ValueError(f"{source}: {key} = {value!r} is not supported; it must be {_NEUTRAL[key][0]!r}")
        return cls(**{key: value for key, value in values.items() if key in known and value is not None})

    @classmethod
    def from_json(cls, path: str | Path) -> "LoraConfig":
        """A configuration from an ``adapter_config.json``."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")), source=str(path))


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"adapter_dtype is {name!r}; it can be one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
