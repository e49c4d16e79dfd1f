"""Reading preference data: one JSON object a line, in the forms that TRL has.

| form | "prompt" | "chosen", "rejected" |
|---|---|---|
| text | string | string |
| messages | list of messages | list of messages: the answer |
| whole conversations | none, or the first user turn's string | list of messages: the prompt, the same in both, and the answer |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from mlora.sft.records import Record, check_no_tools, conversation, filled_text_of, kind_of, read_objects, text_of

_EXPECTED = '"prompt", "chosen" and "rejected", or "chosen" and "rejected" as whole conversations'
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Preference:
    """One line of a file of preferences: the same prompt with two answers."""

    chosen: Record
    rejected: Record


def read_preferences(path: str | PathLike[str]) -> list[Preference]:
    """Reads every preference of a JSONL file, in the file's order. Further keys ("score_chosen", …) are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no record, or a line is not of one of the forms. The message names the file and the line.
    """
    return [_parse(value, fspath(path), line) for line, value in read_objects(path, _EXPECTED)]


def _parse(value: Mapping[str, Any], path: str, line: int) -> Preference:
    where = f"{path}:{line}"
    for key in ("chosen", "rejected"):
        if key not in value:
            raise ValueError(f'{where}: the object has no "{key}"; it needs {_EXPECTED}')
    kinds = {key: kind_of(value[key]) for key in ("chosen", "rejected")}
    if kinds == {"chosen": "a string", "rejected": "a string"}:
        return _of_texts(value, path, line)
    if kinds == {"chosen": "a list", "rejected": "a list"}:
        return _of_messages(value, path, line)
    raise ValueError(
        f'{where}: "chosen" is {kinds["chosen"]} and "rejected" is {kinds["rejected"]}; both must be strings, or both lists of '
        "messages"
    )


def _of_texts(value: Mapping[str, Any], path: str, line: int) -> Preference:
    where = f"{path}:{line}"
    if "prompt" not in value:
        raise ValueError(f'{where}: the object has no "prompt"; where it ends in "chosen" cannot be told from strings')
    if isinstance(value["prompt"], list):
        raise ValueError(
            f'{where}: "prompt" is a list, and "chosen" and "rejected" are strings; all must be strings, or all lists of messages'
        )
    prompt = text_of(value["prompt"], '"prompt"', where)
    chosen, rejected = (
        Record(
            kind="prompt", prompt=prompt, completion=filled_text_of(value[key], f'"{key}"', where), path=path, line=line
        )
        for key in ("chosen", "rejected")
    )
    return Preference(chosen, rejected)


def _of_messages(value: Mapping[str, Any], path: str, line: int) -> Preference:
    where = f"{path}:{line}"
    check_no_tools(value, where)
    answers = {key: conversation(value[key], f'"{key}"', where) for key in ("chosen", "rejected")}
    prompt = value.get("prompt")
    if isinstance(prompt, list):
        given: Messages = conversation(prompt, '"prompt"', where, is_given=True)
        whole = {key: (*given, *answer) for key, answer in answers.items()}
        count = len(given)
    else:
        whole, count = answers, _shared(answers["chosen"], answers["rejected"])
        _check_shared(prompt, answers["chosen"][:count], answers, where)
    chosen, rejected = (
        Record(kind="messages", messages=tuple(whole[key]), given=count, path=path, line=line)
        for key in ("chosen", "rejected")
    )
    return Preference(chosen, rejected)


def _shared(one: Messages, other: Messages) -> int:
    """How many messages two conversations have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


def _check_shared(prompt: Any, given: Messages, answers: Mapping[str, Messages], where: str) -> None:
    if not given:
        raise ValueError(f'{where}: "chosen" and "rejected" begin with different messages, so there is no prompt')
    for key, answer in answers.items():
        if all(message["role"] != "assistant" for message in answer[len(given) :]):
            raise ValueError(f'{where}: "{key}" has no assistant turn that the other has not')
    users = [message["content"] for message in given if message["role"] == "user"]
    if prompt is not None and (not isinstance(prompt, str) or users[:1] != [prompt]):
        raise ValueError(
            f'{where}: "prompt" is neither a list of messages nor the text of the first user turn in "chosen"'
        )
