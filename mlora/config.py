"""What to adapt and how: Hugging Face PEFT's ``LoraConfig`` field names and JSON, plus the few fields that PEFT has not."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mlora.foreign import own_fields

_INITS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d+)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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
            regular expression that matches the whole path), or "all-linear": every linear but the output layer. The embedding
            and the output layer are adapted where they are named.
        modules_to_save: names of modules that train whole beside the low-rank terms: embedding, output layer, norms. A name
            matches a module whose Hugging Face path ends with it: "norm" every norm, "model.norm" the last one.
        exclude_modules: names not to adapt, a list or a regular expression likewise.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023).
        use_dora: the length of each row of the adapted weight is a parameter too (Liu et al. 2024, DoRA).
        rank_pattern, alpha_pattern: regular expression on the end of a path -> rank or alpha of the modules that it matches.
        layers_to_transform: only these layer indices (over the whole model); with a list of target modules.
        layers_pattern: names of the module lists that ``layers_to_transform`` counts in, such as "layers".
        init_lora_weights: True (A Kaiming uniform, B zero), "gaussian" (A normal with std 1/r, B zero), False (both random),
            "orthogonal" (both random, of an even rank, with B A = 0); or parts of the base weight, see :attr:`decomposes`:
            "pissa" (Meng et al. 2024: its r greatest singular values and vectors), "pissa_niter_N" (the same from N power
            iterations, which is faster) or "olora" (Büyükakyüz 2024: the first r columns and rows of its QR decomposition).
        bias: "none": base biases stay frozen.
        shared_A: one A for all projections of a fused linear (q, k, v; gate, up) in place of one each. Where Hugging Face's
            module is fused too (Phi 3's ``qkv_proj``), it is so in any case.
        adapter_dtype: of A and B; None for the base weight's.
        seed: of the initial weights and the dropout masks.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    shared_A: bool = False
    adapter_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            self._set(name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save is {self.modules_to_save!r}; give a list of names")
        for name in ("rank_pattern", "alpha_pattern"):
            self._set(name, _pattern(name, getattr(self, name)))
        self._set("layers_to_transform", _layers(self.layers_to_transform))
        if isinstance(self.adapter_dtype, str):
            self._set("adapter_dtype", _DTYPES.get(self.adapter_dtype, self.adapter_dtype))
        for name, words in (("target_modules", {"all-linear"}), ("init_lora_weights", {"gaussian", "olora"})):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() in words:  # PEFT ignores the case of these
                self._set(name, value.lower())
        self._check_numbers()
        self._check_choices()
        self._check_names()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        # The read-only patterns cannot be pickled, nor, then, could a model that holds its configuration be copied.
        return type(self).from_dict, (self.to_dict(),)

    def _check_numbers(self) -> None:
        ranks = [(f"rank_pattern[{key!r}]", rank) for key, rank in self.rank_pattern.items()]
        for where, rank in [("r", self.r), *ranks]:
            if not _is_whole(rank) or rank < 1:
                raise ValueError(f"{where} is {rank!r}; a LoRA rank is a whole number of at least 1")
        alphas = [(f"alpha_pattern[{key!r}]", alpha) for key, alpha in self.alpha_pattern.items()]
        for where, alpha in [("lora_alpha", self.lora_alpha), *alphas]:
            if not _is_number(alpha) or alpha <= 0:
                raise ValueError(
                    f"{where} is {alpha!r}; it must be a positive number (with 0 the adapter would do nothing)"
                )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; it must be a number of at least 0 and below 1")
        if not _is_whole(self.seed):
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number")

    def _check_choices(self) -> None:
        for name in ("use_rslora", "use_dora", "shared_A"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        self._check_init()
        if self.bias != "none":
            raise ValueError(f'bias is {self.bias!r}; only "none" is supported: base biases stay frozen')
        if self.adapter_dtype is not None and self.adapter_dtype not in _DTYPES.values():
            raise ValueError(f"adapter_dtype is {self.adapter_dtype!r}; it can be one of {', '.join(_DTYPES)}, or null")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, bool) and not (isinstance(init, str) and _INITS.fullmatch(init)):
            raise ValueError(
                f'init_lora_weights is {init!r}; it can be true, false, "gaussian", "orthogonal", "olora", "pissa" or '
                f'"pissa_niter_N" with a number N'
            )
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if init == "orthogonal" and odd:
            raise ValueError(f'init_lora_weights is "orthogonal" with rank {odd[0]}; it needs ranks that are even')
        if self.decomposes and self.lora_dropout > 0:
            raise ValueError(
                f"init_lora_weights is {init!r} with a lora_dropout of {self.lora_dropout}, which would drop parts of the base "
                f"weight; set lora_dropout to 0"
            )

    def _check_names(self) -> None:
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty; name modules in a list, give a regular expression for whole paths as a string, "
                'or write "all-linear"'
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} without layers_to_transform; give both or neither"
            )
        by_regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and by_regex:
            raise ValueError(
                f"layers_to_transform is {self.layers_to_transform!r} beside the regular expression {self.target_modules!r}; "
                "name the layers in the expression, or give target_modules as a list"
            )

    @property
    def decomposes(self) -> bool:
        """A and B start as A₀ and B₀, parts of the base weight, and what is added to it is ``scaling · (B A - B₀ A₀)``.

        Papers and PEFT subtract ``scaling · B₀ A₀`` from the weight; here it stays as it is, and the term has twice the rank.
        """
        return decomposes(self.init_lora_weights)

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
        """A configuration from PEFT's or mlora's JSON values; verl's ``lora_rank`` may stand for ``r``.

        Raises:
            ValueError: for a key that neither knows (with the nearest that exists), a PEFT feature that mlora lacks, a value
                that a field cannot have. The message starts with ``source``.
        """
        try:
            return cls(**own_fields(values, {name.name for name in fields(cls)}))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> "LoraConfig":
        """A configuration from an ``adapter_config.json``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no JSON object, or as :meth:`from_dict`. The message names the file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON and of UTF-8
            raise ValueError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object with the fields of a LoraConfig, got {values!r:.60}")
        return cls.from_dict(values, source=str(path))


def decomposes(init: object) -> bool:
    """Whether an adapter with this ``init_lora_weights`` starts as a part of the base weight."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(field_name: str, value: Any) -> Any:
    """A regular expression as it is, names as a tuple (of a set: sorted), nothing as None."""
    if not isinstance(value, str | Collection | None) or isinstance(value, bytes | Mapping):
        raise ValueError(f"{field_name} is {value!r}; give a list of names, or a regular expression as a string")
    if isinstance(value, Collection) and not isinstance(value, str):
        value = tuple(sorted(value, key=str) if isinstance(value, Set) else value)
    for name in (value,) if isinstance(value, str) else value or ():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{field_name} holds {name!r}; give names as strings that are not empty")
        if isinstance(value, str) or field_name == "layers_pattern":
            _check_expression(field_name, name)
    return value or None


def _pattern(field_name: str, value: Any) -> Mapping[str, Any]:
    """Expressions and their values, read-only; null is PEFT's other way to say that there are none."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{field_name} is {value!r}; give a mapping from the end of a module's path to its value")
    for key in value or {}:
        _check_expression(field_name, key)
    return MappingProxyType(dict(value or {}))


def _check_expression(field_name: str, expression: Any) -> None:
    try:
        re.compile(expression)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field_name}: {expression!r} is no regular expression: {error}") from error


def _layers(value: Any) -> Any:
    """A layer index as it is, several as a tuple, none (PEFT takes an empty list so) as None."""
    several = isinstance(value, Collection) and not isinstance(value, str)
    for layer in value if several else () if value is None else (value,):
        if not _is_whole(layer) or layer < 0:
            raise ValueError(f"layers_to_transform is {value!r}; give a layer's index or a list of them, from 0")
    return (tuple(value) or None) if several else value
