"""Dataclasses as a command line: each field is an option, each class a group of `--help`.

A configuration file may give the same names; the command line wins. A value that is given nowhere is the field's default, so
the dataclass says everything about an option: name, type, default, choices and help.
"""

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

CONFIG_OPTION = "config"


class UsageError(ValueError):
    """What was asked for on the command line or in the configuration file does not make sense; the message says what."""


@dataclasses.dataclass(frozen=True)
class Help:
    """What ``--help`` says of an option, as in ``lr: Annotated[float, Help("learning rate")] = 1e-4``.

    Attributes:
        text: the explanation; the default is added to it.
        metavar: stands for the value; by default a word for its type.
    """

    text: str
    metavar: str | None = None


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The type of an option taken apart: ``tuple[int, ...]`` is many ints, a ``Literal`` is a string with choices."""

    help: Help
    scalar: type
    many: bool = False
    choices: tuple[str, ...] | None = None

    @classmethod
    def of(cls, annotated: Any) -> "_Kind":
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


class _Parser(argparse.ArgumentParser):
    """Raises a one-line error instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the options)")


def parse(groups: Sequence[type], argv: Sequence[str] | None, description: str) -> tuple[list[Any], set[str]]:
    """One instance of each dataclass in ``groups`` from the command line and the configuration file it may name.

    Args:
        groups: dataclasses whose fields are annotated with :class:`Help`; their docstrings' first lines become headings. If one
            has a field ``config``, that is the configuration file.
        argv: the words of the command line; None for this process's.

    Returns:
        The instances, and the names of the fields that were given.

    Raises:
        UsageError: an unknown option or key (with the nearest that exists), a value of the wrong type, a missing one.
        ValueError: from a dataclass's own checks.
    """
    parser = _Parser(
        usage="%(prog)s [options]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields: dict[str, tuple[Field[Any], _Kind]] = {}
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").splitlines()[0])
        hints = typing.get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            fields[field.name] = field, _Kind.of(hints[field.name])
            _add(section, *fields[field.name])
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown_words(unknown, [_flag(name) for name in fields]))
    given = vars(known)
    if CONFIG_OPTION in given:
        given = {**_read_config(given[CONFIG_OPTION], fields), **given}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    missing = [name for name, (field, _) in fields.items() if field.default is MISSING and name not in values]
    if missing:
        raise UsageError(f"required but not given: {', '.join(_flag(name) for name in missing)}")
    return [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in groups
    ], set(values)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add(section: Any, field: Field[Any], kind: _Kind) -> None:
    text = kind.help.text
    if field.default is MISSING:
        text += " (required)"
    elif field.default not in (None, ()) and kind.scalar is not bool:
        shown = " ".join(map(str, field.default)) if kind.many else field.default
        text += f" (default: {shown})"
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind.scalar is bool:
        section.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, **settings)
        return
    settings["metavar"] = kind.help.metavar
    if kind.choices:
        settings["choices"] = kind.choices
    else:
        settings["type"] = kind.scalar
        settings["metavar"] = settings["metavar"] or {int: "N", float: "X", Path: "PATH", str: "NAME"}[kind.scalar]
    if kind.many:
        settings["nargs"] = "+"
    section.add_argument(_flag(field.name), **settings)


def _read_config(path: Path, fields: Mapping[str, tuple[Field[Any], _Kind]]) -> dict[str, Any]:
    """The values of a YAML or JSON file by field name; null means not given."""
    values: dict[str, Any] = {}
    for key, value in _load(path):
        name = str(key).replace("-", "_")
        if name not in fields or name == CONFIG_OPTION:
            raise UsageError(f"{path}: unknown key {key!r}{_near(name, list(fields))}")
        if name in values:
            raise UsageError(f"{path}: {key!r} is given twice")
        if value is None:
            continue
        try:
            values[name] = fields[name][1].convert(value)
        except ValueError as error:
            raise UsageError(f"{path}: {key}: {value!r}: {error}") from None
    return values


def _load(path: Path) -> list[tuple[Any, Any]]:
    """The file's names and values in its order, those that stand there twice too."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            pairs = json.loads(text, object_pairs_hook=_Pairs)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}: not valid JSON: {error}") from None
    else:
        try:
            import yaml
        except ImportError:
            raise UsageError(
                f"{path}: reading YAML needs PyYAML: pip install 'megatron-mlora[train]', or write JSON"
            ) from None
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else None
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        pairs = None if keys is None else _Pairs((key, values.get(key)) for key in keys)
    if not isinstance(pairs, _Pairs):
        raise UsageError(f"{path}: expected names and values, such as `lr: 1e-4`")
    return pairs


class _Pairs(list[tuple[Any, Any]]):
    """A JSON object or YAML mapping, told apart from a list."""


def _unknown_words(words: Sequence[str], flags: Sequence[str]) -> str:
    bad = next((word for word in words if word.startswith("-")), None)
    if bad is None:
        return f"unexpected argument {words[0]!r} (--help lists the options)"
    name = bad.partition("=")[0]
    return f"unknown option {name}{_near(name, flags) or ' (--help lists the options)'}"


def _near(name: str, names: Sequence[str]) -> str:
    bare = {candidate.removeprefix("--"): candidate for candidate in names}  # Dashes would make everything look alike.
    near = difflib.get_close_matches(name.removeprefix("--"), bare, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(bare[match] for match in near)}?" if near else ""
