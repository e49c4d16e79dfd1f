"""What an adapter was trained with, from the configuration that another library saved beside its checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlora.conversion.peft_config import CONFIG_FILE as PEFT_FILE
from mlora.conversion.peft_config import CONFIG_LIMIT, read_config

RUN_FILE = "run_config.yaml"  # Megatron-Bridge
ARGS_FILE = "args.json"  # ms-swift


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an adapter.

    Attributes:
        file: that says so; None if a person did.
        alpha: numerator of the scaling.
        rank: None if it is not said.
        use_rslora: the scaling is alpha / sqrt(rank) in place of alpha / rank.
        dropout: of A's input.
        tensor_parallel: tensor-parallel ranks at the save; None if it is not said.
    """

    file: Path | None
    alpha: float
    rank: int | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    tensor_parallel: int | None = None

    def scaling(self, rank: int) -> float:
        """The factor of the low-rank product."""
        return self.alpha / math.sqrt(rank) if self.use_rslora else self.alpha / rank


def bridge_settings(folder: Path) -> Settings | None:
    """Of Megatron-Bridge's ``run_config.yaml`` in an iteration's folder or the one above; None if there is none.

    Raises:
        ValueError: it has no LoRA, or one that a sum of low-rank terms cannot express; the file and the field are named.
    """
    file = _find(folder, RUN_FILE)
    if file is None:
        return None
    config = _Fields(file, _read_yaml(file))
    peft = config.section("peft")
    kind = str(peft.get("_target_", str)).rpartition(".")[2]
    if kind not in ("LoRA", "CanonicalLoRA"):
        raise ValueError(f"{file}: peft._target_ is {kind!r}; it can be LoRA or CanonicalLoRA")
    dropout = peft.get("dropout", float, 0.0)
    if dropout and (position := peft.get("dropout_position", str, "pre")) != "pre":
        raise ValueError(
            f"{file}: peft.dropout_position is {position!r}; only dropout in front of A can be trained on. Set peft.dropout to 0 "
            f"to go on without"
        )
    model = config.section("model")
    return Settings(
        file=file,
        alpha=peft.get("alpha", float),
        rank=peft.get("dim", int),
        dropout=dropout,
        tensor_parallel=model.get("tensor_model_parallel_size", int, None),
    )


def swift_settings(folder: Path) -> Settings | None:
    """Of ms-swift's ``args.json``, or PEFT's ``adapter_config.json``, in an iteration's folder or the one above; None if there is
    none.

    Raises:
        ValueError: the adapter has something that a sum of low-rank terms cannot express; the file and the field are named.
    """
    if file := _find(folder, ARGS_FILE):
        values = _Fields(file, read_config(file))
        values.require("lora_bias", "none")
        return Settings(
            file=file,
            alpha=values.get("lora_alpha", float),
            rank=values.get("lora_rank", int),
            use_rslora=values.get("use_rslora", bool, False),
            dropout=values.get("lora_dropout", float, 0.0),
            tensor_parallel=values.get("tensor_model_parallel_size", int, None),
        )
    if file := _find(folder, PEFT_FILE):
        values = _Fields(file, read_config(file))
        for name, plain in (("bias", "none"), ("lora_bias", False), ("use_dora", False)):
            values.require(name, plain)
        for name in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            values.require(name, None)
        return Settings(
            file=file,
            alpha=values.get("lora_alpha", float),
            rank=values.get("r", int),
            use_rslora=values.get("use_rslora", bool, False),
            dropout=values.get("lora_dropout", float, 0.0),
        )
    return None


@dataclass(frozen=True)
class _Fields:
    """The fields of a file, or of a section of it, that say what is wrong with them."""

    file: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def section(self, name: str) -> "_Fields":
        """A mapping in it; an empty one if it is missing."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise self._error(name, "it must hold names and values")
        return _Fields(self.file, value, f"{name}.")

    def get(self, name: str, kind: type, *default: Any) -> Any:
        """A value of a kind; ``default`` if it is missing or null."""
        value: Any = self.values.get(name)
        if value is None:
            if default:
                return default[0]
            raise ValueError(f"{self.file}: {self.prefix}{name} is missing")
        kinds = {int, float} if kind is float else {kind}
        if type(value) not in kinds:
            raise self._error(name, f"it must be of type {kind.__name__}")
        if kind in (int, float) and not (math.isfinite(value) and value >= (1 if kind is int else 0)):
            raise self._error(name, "it is out of range")
        return value

    def require(self, name: str, plain: Any) -> None:
        """Raises ValueError if a field is neither ``plain`` nor off."""
        value = self.values.get(name)
        if value and value != plain:
            raise self._error(name, f"it is not supported{'' if plain is None else f', only {plain!r} is'}")

    def _error(self, name: str, rule: str) -> ValueError:
        return ValueError(f"{self.file}: {self.prefix}{name} is {self.values[name]!r:.60}; {rule}")


def _find(folder: Path, name: str) -> Path | None:
    return next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{file}: reading YAML needs PyYAML: pip install 'megatron-mlora[train]'") from None
    if file.stat().st_size > CONFIG_LIMIT:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; at most {CONFIG_LIMIT} are read")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected names and values")
    return values
