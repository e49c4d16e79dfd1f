"""Rotary position embeddings: the angles that a ``config.json`` asks for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mlora.families.keys import ConfigKeys

# Type -> the parameters it needs besides rope_theta.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """Rotation of the pairs (j, j + d/2) of a head's d features by position · f_j (Su et al. 2021), f_j = theta^(-2j/d).

    Attributes:
        theta: base of the wavelengths.
        kind: "default"; "linear" divides every f_j by ``factor``; "llama3" divides those of long wavelengths only.
        parameters: of the kind, by Hugging Face's names.
    """

    theta: float
    kind: str
    parameters: Mapping[str, float]

    def inverse_frequencies(self, width: int) -> torch.Tensor:
        """f_j for heads of ``width`` features, float32 [width/2], rounded as Hugging Face rounds them."""
        frequencies = 1.0 / (self.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        if self.kind == "linear":
            return frequencies / self.parameters["factor"]
        return self._llama3(frequencies) if self.kind == "llama3" else frequencies

    def _llama3(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Llama 3.1: wavelengths above L/low are stretched by the factor, those below L/high kept, between them a blend."""
        factor, length = self.parameters["factor"], self.parameters["original_max_position_embeddings"]
        low, high = self.parameters["low_freq_factor"], self.parameters["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        kept = (length / wavelengths - low) / (high - low)
        blend = (1 - kept) * frequencies / factor + kept * frequencies
        scaled = torch.where(wavelengths > length / low, frequencies / factor, blend)
        return torch.where(wavelengths < length / high, frequencies, scaled)


def read_rope(keys: ConfigKeys) -> Rope:
    """The rotary embedding of a ``config.json`` of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises:
        ValueError: a type, parameter or combination that cannot be represented exactly.
    """
    keys.require(
        "partial_rotary_factor", lambda value: value in (None, 1, 1.0), "is not supported; heads are rotated whole"
    )
    name, given = _given(keys)
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind not in _PARAMETERS:
        raise keys.error(name, f"has the type {kind!r}; supported are {', '.join(_PARAMETERS)}")
    theta = _theta(keys, name, given)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise keys.error(name, "rotates heads in part, which is not supported")
    if kind == "llama3" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = keys.integer("max_position_embeddings")
    needed = _PARAMETERS[kind]
    for parameter in needed:
        if not _is_positive(given.get(parameter)):
            raise keys.error(name, f"needs a positive number {parameter!r}")
    unknown = sorted(given.keys() - set(needed))
    if unknown:
        raise keys.error(name, f"has {unknown[0]!r}, which the type {kind!r} has not")
    parameters = {parameter: given[parameter] for parameter in needed}
    if kind == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise keys.error(name, "needs low_freq_factor below high_freq_factor")
    return Rope(theta, kind, parameters)


def _given(keys: ConfigKeys) -> tuple[str, dict[str, Any]]:
    """(key, its content) of the one description that the file has."""
    present = {name: keys.take(name) for name in ("rope_parameters", "rope_scaling")}
    for name, value in present.items():
        if value is not None and not isinstance(value, dict):
            raise keys.error(name, "is no object")
    named = {name: value for name, value in present.items() if value}
    if len(named) == 2 and named["rope_parameters"] != named["rope_scaling"]:
        raise keys.error(
            "rope_scaling", "differs from rope_parameters; versions of transformers disagree on which holds"
        )
    return next(((name, dict(value)) for name, value in named.items()), ("rope_scaling", {}))


def _theta(keys: ConfigKeys, name: str, given: dict[str, Any]) -> float:
    inner, outer = given.pop("rope_theta", None), keys.take("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise keys.error(
            "rope_theta", f"differs from {inner} in {name}; versions of transformers disagree on which holds"
        )
    theta = inner if inner is not None else outer if outer is not None else _DEFAULT_THETA
    if not _is_positive(theta):
        raise keys.error("rope_theta", "is not a positive number")
    return float(theta)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
