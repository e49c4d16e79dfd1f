"""The adapter's options on a command line: one definition for our trainer and for Megatron's scripts.

A dataclass is a group of `--help`, each of its fields an option that says everything about itself: name, type, default, choices
and help.
"""

import argparse
import dataclasses
import json
import re
import types
import typing
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

_NAME = re.compile(r"[\w.-]+")


class UsageError(ValueError):
    """What was asked for on the command line or in the configuration file does not make sense; the message says what."""


@dataclass(frozen=True)
class Help:
    """What ``--help`` says of an option, as in ``lr: Annotated[float, Help("learning rate")] = 1e-4``.

    Attributes:
        text: the explanation; the default is added to it.
        metavar: stands for the value; by default a word for its type.
    """

    text: str
    metavar: str | None = None


@dataclass(frozen=True)
class Kind:
    """The type of an option taken apart: ``tuple[int, ...]`` is many ints, a ``Literal`` is a string with choices."""

    help: Help
    scalar: type
    many: bool = False
    choices: tuple[str, ...] | None = None

    @classmethod
    def of(cls, annotated: Any) -> "Kind":
        hint, help = typing.get_args(annotated)
        if typing.get_origin(hint) in (Union, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        if typing.get_origin(hint) is tuple:
            return cls(help, typing.get_args(hint)[0], many=True)
        if typing.get_origin(hint) is Literal:
            return cls(help, str, choices=typing.get_args(hint))
        return cls(help, hint)

    def convert(self, value: Any) -> Any:
        """The value of a configuration file as the field's type.

        Raises:
            ValueError: it is of another type; the message says which was expected.
        """
        if self.many:
            return tuple(self._one(part) for part in (value if isinstance(value, list) else [value]))
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if isinstance(value, bool) != (self.scalar is bool) or isinstance(value, list | dict | None):
            raise ValueError(f"expected {self.words}")
        if self.choices and value not in self.choices:
            raise ValueError(f"expected {self.words}")
        if self.scalar is int and not isinstance(value, int | str):
            raise ValueError(f"expected {self.words}")
        if self.scalar is str and not isinstance(value, str):
            raise ValueError(f"expected {self.words}")
        try:
            return self.scalar(value)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self.words}") from None

    @property
    def words(self) -> str:
        """What is expected, for people."""
        names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "a text"}
        return f"one of {', '.join(self.choices)}" if self.choices else names[self.scalar]


def add_group(parser: argparse.ArgumentParser, group: type) -> dict[str, tuple[Field[Any], Kind]]:
    """Let ``parser`` know a dataclass's fields; one that is not given is no attribute of what the parser returns.

    Args:
        group: its fields are annotated with :class:`Help`; its docstring's first line becomes the heading.

    Returns:
        The fields and their kinds by name.
    """
    section = parser.add_argument_group((group.__doc__ or "").splitlines()[0])
    hints = typing.get_type_hints(group, include_extras=True)
    fields = {field.name: (field, Kind.of(hints[field.name])) for field in dataclasses.fields(group)}
    for field, kind in fields.values():
        _add(section, field, kind)
    return fields


def flag(name: str) -> str:
    """The option that gives a field."""
    return "--" + name.replace("_", "-")


def _add(section: Any, field: Field[Any], kind: Kind) -> None:
    text = kind.help.text
    if field.default is MISSING:
        text += " (required)"
    elif field.default not in (None, ()) and kind.scalar is not bool:
        shown = " ".join(map(str, field.default)) if kind.many else field.default
        text += f" (default: {shown})"
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind.scalar is bool:
        section.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **settings)
        return
    settings["metavar"] = kind.help.metavar
    if kind.choices:
        settings["choices"] = kind.choices
    else:
        settings["type"] = kind.scalar
        settings["metavar"] = settings["metavar"] or {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind.scalar]
    if kind.many:
        settings["nargs"] = "+"
    section.add_argument(flag(field.name), **settings)


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
    lora_modules_to_save: Annotated[
        tuple[str, ...], Help("train these whole beside the adapter: embed_tokens, lm_head, norms")
    ] = ()
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
            except ValueError as error:  # of JSON and of UTF-8
                raise UsageError(f"{self.lora_config}: not readable as JSON: {error}") from None
            if not isinstance(values, dict):
                raise UsageError(f"{self.lora_config}: expected a JSON object")
            return {"seed": seed, **values}
        return {
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": _modules("--lora-target-modules", self.lora_target_modules),
            "exclude_modules": _modules("--lora-exclude-modules", self.lora_exclude_modules) or None,
            "modules_to_save": self.lora_modules_to_save or None,
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
