"""``adapter_config.json`` of Hugging Face PEFT, as far as it says what the tensors beside it mean.

:class:`mlora.LoraConfig` holds what can be trained; this holds what can be read, which is more. Rules are those of PEFT 0.21.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlora.conversion.state import Report
from mlora.targets import layer_index, matches, matches_pattern_key

CONFIG_FILE = "adapter_config.json"
CONFIG_LIMIT = 64_000_000  # bytes; a list of every module of a large model takes less than one
EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT's own names for them

# Fields that are read here.
_READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_dora",
    "use_rslora",
}  # fmt: skip
# Fields that change nothing about what the file's tensors mean.
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Features of PEFT's that a plain sum of low-rank terms, DoRA and whole parameters cannot express.
_UNSUPPORTED = {
    "alora_invocation_tokens": "an adapter that is on only behind certain tokens",
    "arrow_config": "routing between adapters",
    "fan_in_fan_out": "base linears that store their weight transposed",
    "kasa_config": "KaSA's diagonal",
    "layer_replication": "a base with repeated layers",
    "lora_bias": "a bias on lora_B",
    "monteclora_config": "Monte-CLoRA",
    "target_parameters": "adapters on packed 3-D parameters",
    "trainable_token_indices": "single trained rows of the embedding",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "quantisation-aware LoRA",
    "velora_config": "VeLoRA",
}
# Initialisations by which PEFT subtracts the initial product from the base, again at every load: the matrices alone are not the
# adapter. (PEFT can save such an adapter converted, and then says init_lora_weights = true.)
MUTATING = re.compile(r"(pissa(_niter_\d+)?|olora|corda|loftq|lora_ga)$")

# Fields that hold a list of names; the first three may be a string too, which is one name or an expression.
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields of an ``adapter_config.json`` that give its tensors their meaning; names and defaults are PEFT's."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] = ()  # empty: all
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] = ()
    ensure_weight_tying: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str, report: Report) -> "PeftConfig":
        """What ``values`` say; ``source`` is the file to name.

        Features that cannot be read are told to ``report``.

        Raises:
            ValueError: a field is of the wrong type or an impossible value, so nothing can be told of the tensors.
        """
        _check_features(values, source, report)
        given = {key: value for key, value in values.items() if key in cls.__dataclass_fields__ and value is not None}
        for name in _NAMES:
            _check_names(given, name, source)
        layers = given.get("layers_to_transform", ())
        given["layers_to_transform"] = (layers,) if isinstance(layers, int) else tuple(layers)
        for name, empty in (("rank_pattern", {}), ("alpha_pattern", {}), ("target_modules", ())):
            given.setdefault(name, empty)
        if not given["target_modules"]:
            report(
                f"{source}: target_modules is {values.get('target_modules')!r}; it must name the modules of the adapter"
            )
        for name in ("r", "lora_alpha"):
            if name not in given:
                report(f"{source}: {name} is missing; PEFT would take 8, which is hardly what was trained")
        config = cls(**given)
        config._check_numbers(source)
        config._check_expressions(source)
        return config

    def _check_numbers(self, source: str) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{source}: {name} is {getattr(self, name)!r}; it must map patterns to numbers")
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{source}: {name} is {rank!r}; a rank is a whole number of at least 1")
        alphas = {"lora_alpha": self.lora_alpha} | {
            f"alpha_pattern[{key!r}]": a for key, a in self.alpha_pattern.items()
        }
        for name, alpha in alphas.items():
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
                raise ValueError(
                    f"{source}: {name} is {alpha!r}; it must be a number, and with 0 the adapter does nothing"
                )
        if not all(isinstance(layer, int) for layer in self.layers_to_transform):
            raise ValueError(f"{source}: layers_to_transform is {self.layers_to_transform!r}; layers are whole numbers")

    def _check_expressions(self, source: str) -> None:
        expressions: list[tuple[str, str]] = []
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                expressions.append((name, value))
        for name in ("rank_pattern", "alpha_pattern"):
            expressions += [(name, key) for key in getattr(self, name)]
        layers = self.layers_pattern or ()
        expressions += [("layers_pattern", pattern) for pattern in ([layers] if isinstance(layers, str) else layers)]
        for name, expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{source}: {name}: {expression!r} is no regular expression: {error}") from error

    def rank(self, module: str) -> int:
        """The rank that the file should have for a module."""
        key = next((key for key in self.rank_pattern if matches_pattern_key(module, key)), None)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """The numerator of a module's scaling."""
        key = next((key for key in self.alpha_pattern if matches_pattern_key(module, key)), None)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling(self, module: str) -> float:
        """The factor of B A for a module. A pattern that changes only the rank changes the scaling too, as in PEFT."""
        alpha, rank = self.alpha(module), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT would give the module a low-rank term; "all-linear" means all linears but the output layer."""
        if self.exclude_modules and matches(module, self.exclude_modules):
            return False
        if self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module.rpartition(".")[2] not in EMBEDDINGS
            return matches(module, self.target_modules)
        if not matches(module, self.target_modules):
            return False
        if not self.layers_to_transform or module in self.target_modules:
            return True  # A list's entry that spells the whole path is not filtered by layer.
        return layer_index(module, self.layers_pattern) in self.layers_to_transform

    def ties(self, module: str) -> bool:
        """Whether PEFT would give a module the term of the embedding that it is tied to, by ``ensure_weight_tying``."""
        partners = ("model.embed_tokens", "lm_head")
        return self.ensure_weight_tying and module.rpartition(".")[2] in EMBEDDINGS and any(map(self.targets, partners))

    def saves(self, module: str) -> bool:
        """Whether the module, or one that it lies in, is in ``modules_to_save``."""
        return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in self.modules_to_save)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is too long for a configuration or no JSON object; the file is named.
    """
    if path.stat().st_size > CONFIG_LIMIT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {CONFIG_LIMIT} are read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _check_names(given: Mapping[str, Any], name: str, source: str) -> None:
    value = given.get(name, ())
    if isinstance(value, str) and name != "modules_to_save":
        return
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{source}: {name} is {_short(value)}; it must be a list of names")


def _check_features(values: Mapping[str, Any], source: str, report: Report) -> None:
    if values.get("peft_type") != "LORA":
        report(f"{source}: peft_type is {values.get('peft_type')!r}; only LORA adapters can be read")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and MUTATING.match(init.lower()):
        report(
            f"{source}: init_lora_weights is {init!r}: PEFT changes the base weights when it loads this adapter; save it "
            f"converted to plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = _READ | _DESCRIPTIVE | _UNSUPPORTED.keys()
    for key, value in values.items():
        if key in _UNSUPPORTED and value:
            report(f"{source}: {key} = {_short(value)} ({_UNSUPPORTED[key]}) is not supported")
        elif key not in known and value:
            # Whatever it is, it is off when it is null, false or empty; newer and older PEFT write such fields.
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            report(f"{source}: unknown field {key!r} = {_short(value)}{hint}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
