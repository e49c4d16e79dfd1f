"""Reading fine-tuning data: one JSON object a line, in one of three forms.

Knows nothing of tokens: what a record becomes is said in ``samples``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Literal

Kind = Literal["messages", "prompt", "text"]

_FORMS: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
_EXPECTED = 'one of "messages", "prompt" with "completion", or "text"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line of a data file; the fields of the other forms are empty.

    Attributes:
        kind: "messages" (a conversation), "prompt" (prompt and completion) or "text".
        messages: the conversation; each message has at least the strings "role" and "content".
        given: so many messages at its start are given: assistant turns among them are not trained on.
        prompt, completion: the pair; the prompt may be empty.
        text: plain text.
        path, line: where it was read, the line counted from 1.
    """

    kind: Kind
    messages: tuple[Mapping[str, Any], ...] = ()
    given: int = 0
    prompt: str = ""
    completion: str = ""
    text: str = ""
    path: str = "<memory>"
    line: int = 1

    @property
    def where(self) -> str:
        """``file:line``, as error messages name it."""
        return f"{self.path}:{self.line}"


def read_jsonl(path: str | PathLike[str]) -> list[Record]:
    """Reads every record of a JSONL file, in the file's order.

    A line is an object with "messages" (a non-empty list of ``{"role": str, "content": str}``, at least one of
    them by the assistant), with "prompt" and "completion", or with "text". What is trained on must not be empty:
    the completion, the text and every assistant turn. Further keys beside a form ("id", a lone "prompt" beside
    "messages", …) are common in public data and are ignored; further keys of a message reach the chat template and
    nothing else. Two that would change what is trained are refused: "tools" beside "messages", and a "weight" other
    than 1 in an assistant's message. Blank lines are ignored wherever they stand (they hold no data) but count as
    lines; a UTF-8 byte order mark at the start of the file is ignored too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no record, or a line is not UTF-8, not JSON or not of exactly one form. The message
            names the file and the line.
    """
    return [_parse(value, fspath(path), line) for line, value in read_objects(path, _EXPECTED)]


def read_objects(path: str | PathLike[str], expected: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, JSON object) of every line of a JSONL file that is not blank.

    Args:
        expected: what an object should hold, for the messages of errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no object, or a line is no JSON object in UTF-8; file and line are named.
    """
    name, is_empty = fspath(path), True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            data = line.removesuffix(b"\n")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                is_empty = False
                yield number, _load(data, f"{name}:{number}", expected)
    if is_empty:
        raise ValueError(f"{name}: the file has no record; write one JSON object a line, with {expected}")


def _load(line: bytes, where: str, expected: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = error.start + 1
        raise ValueError(f"{where}: byte {at} of the line is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        fault = f"not valid JSON at column {error.colno}: {error.msg}"
        raise ValueError(f"{where}: {fault}; each line must be one whole JSON object") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, an abyss of brackets
        raise ValueError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {kind_of(value)}; write {expected}")
    return value


def _parse(value: Mapping[str, Any], path: str, line: int) -> Record:
    where = f"{path}:{line}"
    kind = _form(value, where)
    if kind == "messages":
        check_no_tools(value, where)
        messages = conversation(value["messages"], '"messages"', where)
        return Record(kind=kind, messages=messages, path=path, line=line)
    if kind == "prompt":
        prompt = text_of(value["prompt"], '"prompt"', where)
        completion = filled_text_of(value["completion"], '"completion"', where)
        return Record(kind=kind, prompt=prompt, completion=completion, path=path, line=line)
    return Record(kind=kind, text=filled_text_of(value["text"], '"text"', where), path=path, line=line)


def check_no_tools(value: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a record with tools."""
    if value.get("tools"):
        raise ValueError(f'{where}: "tools" are not supported: the chat template is not given any; remove the record')


def _form(value: Mapping[str, Any], where: str) -> Kind:
    found: list[Kind] = [kind for kind, keys in _FORMS.items() if all(key in value for key in keys)]
    if len(found) == 1:
        return found[0]
    if found:
        keys = " and ".join("/".join(f'"{key}"' for key in _FORMS[kind]) for kind in found)
        raise ValueError(f"{where}: {keys} are different forms of a record; keep one of them")
    half = [key for key in _FORMS["prompt"] if key in value]
    got = f"has {half[0]!r} but not its partner" if half else f"has the keys {sorted(value)}"
    raise ValueError(f"{where}: the object {got}; it needs {_EXPECTED}")


def conversation(value: Any, field: str, where: str, is_given: bool = False) -> tuple[Mapping[str, Any], ...]:
    """The messages of a record's field.

    Args:
        field: its name in quotation marks.
        where: file and line.
        is_given: it is not trained on, so no turn need be an assistant's.

    Raises:
        ValueError: they are no messages, or there is nothing to train on; file, line and field are named.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where}: {field} must be a list of messages, got {kind_of(value)}")
    if not value:
        raise ValueError(f"{where}: {field} is empty")
    for index, message in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f'{where}: {name} must be {{"role": …, "content": …}}, got {kind_of(message)}')
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f'{where}: {name} has no "{key}"')
            text_of(message[key], f'{name}["{key}"]', where)
        if message["role"] == "assistant" and not is_given:
            filled_text_of(message["content"], f'{name}["content"] (an assistant turn)', where)
            if message.get("weight", 1) != 1:
                raise ValueError(
                    f'{where}: {name}["weight"] is {message["weight"]!r}; turns cannot be weighted: every assistant '
                    "turn is trained on; remove the key, or the record"
                )
    if not is_given and all(message["role"] != "assistant" for message in value):
        raise ValueError(f'{where}: {field} has no turn of role "assistant", so there is nothing to train on')
    return tuple(value)


def text_of(value: Any, name: str, where: str) -> str:
    """A field that must be a string; raises ValueError if it is none, or cannot be encoded."""
    if kind_of(value) != "a string":
        raise ValueError(f"{where}: {name} must be a string, got {kind_of(value)}")
    text: str = value
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer can read it
        raise ValueError(f"{where}: character {error.start + 1} of {name} is an unpaired surrogate") from error
    return text


def filled_text_of(value: Any, name: str, where: str) -> str:
    """Likewise of a field that must not be empty."""
    text = text_of(value, name, where)
    if not text:
        raise ValueError(f"{where}: {name} is empty, so there is nothing to train on; remove the record")
    return text


def kind_of(value: Any) -> str:
    """The JSON word for a value that ``json`` has read."""
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
