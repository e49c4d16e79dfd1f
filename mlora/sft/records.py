"""Reading fine-tuning data: one JSON object a line, in one of three forms.

Knows nothing of tokens: what a record becomes is said in ``samples``.
"""

import json
from collections.abc import Mapping
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
        prompt, completion: the pair; the prompt may be empty.
        text: plain text.
        path, line: where it was read, the line counted from 1.
    """

    kind: Kind
    messages: tuple[Mapping[str, Any], ...] = ()
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
    name = fspath(path)
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            data = line.removesuffix(b"\n")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                records.append(_parse(data, name, number))
    if not records:
        raise ValueError(f"{name}: the file has no record; write one JSON object a line, with {_EXPECTED}")
    return records


def _parse(line: bytes, path: str, number: int) -> Record:
    where = f"{path}:{number}"
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
    if _kind_of(value) != "an object":
        raise ValueError(f"{where}: expected a JSON object, got {_kind_of(value)}; write {_EXPECTED}")
    kind = _form(value, where)
    if kind == "messages":
        if value.get("tools"):
            raise ValueError(
                f'{where}: "tools" are not supported: the chat template is not given any; remove the record'
            )
        return Record(kind=kind, messages=_messages(value["messages"], where), path=path, line=number)
    if kind == "prompt":
        prompt = _string(value["prompt"], '"prompt"', where)
        completion = _filled(value["completion"], '"completion"', where)
        return Record(kind=kind, prompt=prompt, completion=completion, path=path, line=number)
    return Record(kind=kind, text=_filled(value["text"], '"text"', where), path=path, line=number)


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


def _messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if _kind_of(value) != "a list":
        raise ValueError(f'{where}: "messages" must be a list of messages, got {_kind_of(value)}')
    if not value:
        raise ValueError(f'{where}: "messages" is empty')
    for index, message in enumerate(value):
        name = f'"messages"[{index}]'
        if _kind_of(message) != "an object":
            raise ValueError(f'{where}: {name} must be {{"role": …, "content": …}}, got {_kind_of(message)}')
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f'{where}: {name} has no "{key}"')
            _string(message[key], f'{name}["{key}"]', where)
        if message["role"] == "assistant":
            _filled(message["content"], f'{name}["content"] (an assistant turn)', where)
            if message.get("weight", 1) != 1:
                raise ValueError(
                    f'{where}: {name}["weight"] is {message["weight"]!r}; turns cannot be weighted: every assistant '
                    "turn is trained on; remove the key, or the record"
                )
    if all(message["role"] != "assistant" for message in value):
        raise ValueError(f'{where}: "messages" has no turn of role "assistant", so there is nothing to train on')
    return tuple(value)


def _string(value: Any, name: str, where: str) -> str:
    if _kind_of(value) != "a string":
        raise ValueError(f"{where}: {name} must be a string, got {_kind_of(value)}")
    text: str = value
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer can read it
        raise ValueError(f"{where}: character {error.start + 1} of {name} is an unpaired surrogate") from error
    return text


def _filled(value: Any, name: str, where: str) -> str:
    text = _string(value, name, where)
    if not text:
        raise ValueError(f"{where}: {name} is empty, so there is nothing to train on; remove the record")
    return text


def _kind_of(value: Any) -> str:
    """The JSON word for a value that ``json`` has read."""
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}.get(type(value), "a number")
