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
    "longrope": ("short_factor", "original_max_position_embeddings"),
}
COMMON = ("default", "linear", "llama3")
DEFAULT_THETA = 10000.0
_IN_PART = "rotates heads in part, which this family does not"


@dataclass(frozen=True)
class Rope:
    """Rotation of the pairs (j, j + d/2) of a head's first d features by position · f_j (Su et al. 2021), f_j = theta^(-2j/d).

    Attributes:
        theta: base of the wavelengths.
        kind: "default"; "linear" divides every f_j by ``factor``; "llama3" divides those of long wavelengths only; "longrope"
            divides each by its own of ``short_factor``.
        parameters: of the kind, by Hugging Face's names.
        share: d over the features of a head.
        magnitude: what queries and keys are multiplied with where they are rotated.
        longest: sequence, in tokens, for which these angles hold; None for any.
    """

    theta: float
    kind: str
    parameters: Mapping[str, Any]
    share: float = 1.0
    magnitude: float = 1.0
    longest: int | None = None

    def inverse_frequencies(self, width: int) -> torch.Tensor:
        """f_j for heads of ``width`` features, float32 [d/2], rounded as Hugging Face rounds them."""
        rotated = int(width * self.share)
        powers = self.theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        if self.kind == "longrope":
            return 1.0 / (torch.tensor(self.parameters["short_factor"], dtype=torch.float32) * powers)
        frequencies = 1.0 / powers
        if self.kind == "linear":
            return frequencies / float(self.parameters["factor"])
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


def read_rope(keys: ConfigKeys, width: int, kinds: tuple[str, ...] = COMMON, *, partial: bool = False) -> Rope:
    """The rotary embedding of a ``config.json`` of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Args:
        width: features of a head.
        kinds: that Hugging Face's class knows and that can be represented.
        partial: the class may leave a part of a head's features as it is.

    Raises:
        ValueError: a type, parameter or combination that cannot be represented exactly.
    """
    name, given = _given(keys)
    keys.require("partial_rotary_factor", lambda value: partial or value in (None, 1), _IN_PART)
    for key in ("rope_theta", "partial_rotary_factor"):
        outer = keys.take(key)
        if outer is None:
            continue
        if not _is_positive(outer):
            raise keys.error(key, "is not a positive number")
        if given.setdefault(key, outer) != outer:
            raise keys.error(
                key, f"differs from {given[key]} in {name}; versions of transformers disagree on which holds"
            )
    return rope_of(keys, name, given, width, kinds, partial=partial)


def rope_of(
    keys: ConfigKeys,
    name: str,
    given: Mapping[str, Any],
    width: int,
    kinds: tuple[str, ...] = COMMON,
    *,
    theta: float = DEFAULT_THETA,
    partial: bool = False,
) -> Rope:
    """The rotary embedding that ``given``, the key ``name`` or a part of it, describes; ``theta`` if it names none.

    Raises:
        ValueError: as :func:`read_rope`.
    """
    given = dict(given)
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    kind = "longrope" if kind == "su" else kind  # its first name
    if kind not in kinds:
        raise keys.error(name, f"has the type {kind!r}; supported are {', '.join(kinds)}")
    if not _is_positive(theta := given.pop("rope_theta", theta)):
        raise keys.error(name, "needs a positive number 'rope_theta'")
    share = given.pop("partial_rotary_factor", 1.0)
    if share != 1 and not partial:
        raise keys.error(name, _IN_PART)
    if not _is_positive(share) or share > 1 or int(width * share) % 2 or int(width * share) == 0:
        raise keys.error(name, f"rotates a share {share!r} of a head's {width} features, which is no number of pairs")
    if kind == "longrope":
        return _longrope(keys, name, given, theta, share, int(width * share))
    if kind == "llama3" and given.get("original_max_position_embeddings") is None:
        given["original_max_position_embeddings"] = keys.integer("max_position_embeddings")
    parameters = _parameters(keys, name, given, kind)
    if kind == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise keys.error(name, "needs low_freq_factor below high_freq_factor")
    return Rope(float(theta), kind, parameters, share)


def _longrope(keys: ConfigKeys, name: str, given: dict[str, Any], theta: float, share: float, rotated: int) -> Rope:
    """LongRoPE (Ding et al. 2024) of sequences up to the length that the model was first trained at.

    Hugging Face rotates longer ones by ``long_factor``, all their tokens, so which angles hold depends on the batch.
    """
    original = keys.integer("original_max_position_embeddings")
    if given.setdefault("original_max_position_embeddings", original) != original:
        raise keys.error("original_max_position_embeddings", f"differs from that in {name}")
    factor = given.pop("factor", None) or keys.integer("max_position_embeddings") / original
    given.pop("long_factor", None)
    magnitude = given.pop("attention_factor", None)
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if not _is_positive(magnitude) or magnitude < 1:
        raise keys.error(name, f"makes an attention factor of {magnitude!r}; it must be a number of at least 1")
    short = given.pop("short_factor", None)
    if not isinstance(short, list) or len(short) != rotated // 2 or not all(map(_is_positive, short)):
        raise keys.error(name, f"needs a short_factor of {rotated // 2} positive numbers")
    parameters = _parameters(keys, name, {**given, "short_factor": 1}, "longrope") | {"short_factor": tuple(short)}
    return Rope(float(theta), "longrope", parameters, share, float(magnitude), original)


def _parameters(keys: ConfigKeys, name: str, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    needed = _PARAMETERS[kind]
    for parameter in needed:
        if not _is_positive(given.get(parameter)):
            raise keys.error(name, f"needs a positive number {parameter!r}")
    unknown = sorted(given.keys() - set(needed))
    if unknown:
        raise keys.error(name, f"has {unknown[0]!r}, which the type {kind!r} has not")
    return {parameter: given[parameter] for parameter in needed}


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
    name = next(iter(named), "rope_scaling")
    return name, {key: value for key, value in named.get(name, {}).items() if value is not None}


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
