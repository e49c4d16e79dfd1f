"""Dataclasses as a command line: each field is an option, each class a group of `--help`.

A configuration file may give the same names; the command line wins. A value that is given nowhere is the field's default, so
the dataclass says everything about an option: name, type, default, choices and help.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, NoReturn

from mlora.options import Help, Kind, UsageError, add_group, flag

__all__ = ["Help", "UsageError", "check_at_least", "check_positive", "flag", "parse"]

CONFIG_OPTION = "config"


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
    fields: dict[str, tuple[Field[Any], Kind]] = {}
    for group in groups:
        fields |= add_group(parser, group)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown_words(unknown, [flag(name) for name in fields]))
    given = vars(known)
    if CONFIG_OPTION in given:
        given = {**_read_config(given[CONFIG_OPTION], fields), **given}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    missing = [name for name, (field, _) in fields.items() if field.default is MISSING and name not in values]
    if missing:
        raise UsageError(f"required but not given: {', '.join(flag(name) for name in missing)}")
    return [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in groups
    ], set(values)


def _read_config(path: Path, fields: Mapping[str, tuple[Field[Any], Kind]]) -> dict[str, Any]:
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
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not readable as UTF-8: {error}") from None
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


def check_at_least(least: float, options: Any, *names: str) -> None:
    """Raises UsageError if a field of a dataclass of options is below ``least`` or not finite; None is neither."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise UsageError(f"{flag(name)} {value} must be at least {least}")


def check_positive(options: Any, *names: str) -> None:
    """Raises UsageError if a field of a dataclass of options is not above 0 or not finite; None is."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{flag(name)} {value} must be above 0")
