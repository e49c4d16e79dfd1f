"""JSONL files: what is read, and every fault under its file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlora.sft.records import Record, read_jsonl

PAIR = {"prompt": "p", "completion": "c"}
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def write(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return str(path)


def test_the_three_forms_are_read_with_their_lines(tmp_path: Path) -> None:
    lines = [
        json.dumps({"messages": TURNS, "id": 4, "prompt": "ignored"}),
        json.dumps({**PAIR, "source": None}),
        json.dumps({"text": "t", "completion": "ignored"}),
        json.dumps({"prompt": "", "completion": " "}),
    ]
    path = write(tmp_path, "\n".join(lines).encode())
    assert read_jsonl(path) == [
        Record(kind="messages", messages=tuple(TURNS), path=path, line=1),
        Record(kind="prompt", prompt="p", completion="c", path=path, line=2),
        Record(kind="text", text="t", path=path, line=3),
        Record(kind="prompt", completion=" ", path=path, line=4),
    ]
    assert read_jsonl(Path(path))[2].where == f"{path}:3"


def test_byte_order_mark_carriage_returns_and_blank_lines_are_no_data_but_count_as_lines(tmp_path: Path) -> None:
    line = json.dumps(PAIR).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + line + b"\r\n\r\n \t \n\n" + line + b"\r\n" + line)
    assert [(record.line, record.prompt) for record in read_jsonl(path)] == [(1, "p"), (5, "p"), (6, "p")]


def test_unicode_is_kept_and_its_line_separators_end_no_line(tmp_path: Path) -> None:
    text = "ü 漢字 🙂 \u2028 \u2029 \x85 \x0b é e\u0301"
    for ascii_only in (True, False):
        path = write(tmp_path, json.dumps({"text": text}, ensure_ascii=ascii_only).encode() + b"\n")
        assert [record.text for record in read_jsonl(path)] == [text]


FAULTS: list[tuple[Any, str]] = [
    (b'{"prompt": "p", "completion": "\xff"}', "byte 32 of the line is not UTF-8; save the file as UTF-8"),
    ("{}".encode("utf-16"), "byte 1 of the line is not UTF-8"),
    (b'{"prompt": "p"', "not valid JSON at column 15: Expecting ',' delimiter; each line must be one whole JSON object"),
    (b"[", "not valid JSON at column 2: Expecting value; each line must be one whole JSON object"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON at column 15: Extra data"),
    (b"{'text': 'a'}", "not valid JSON at column 2: Expecting property name enclosed in double quotes"),
    (b'{"text": "a\tb"}', "not valid JSON at column 12: Invalid control character at"),
    (b"[" * 100_000, "not readable as JSON: "),
    (b'{"text": ' + b"1" * 5000 + b"}", "not readable as JSON: "),
    ([PAIR], 'expected a JSON object, got a list; write one of "messages", "prompt" with "completion", or "text"'),
    ("text", "expected a JSON object, got a string"),
    (None, "expected a JSON object, got null"),
    (3, "expected a JSON object, got a number"),
    (True, "expected a JSON object, got a boolean"),
    ({}, 'the object has the keys []; it needs one of "messages", "prompt" with "completion", or "text"'),
    ({"instruction": "i", "output": "o"}, "the object has the keys ['instruction', 'output']; it needs one of"),
    ({"prompt": "p"}, "the object has 'prompt' but not its partner; it needs one of"),
    ({"completion": "c"}, "the object has 'completion' but not its partner"),
    ({**PAIR, "text": "t"}, '"prompt"/"completion" and "text" are different forms of a record; keep one of them'),
    ({"messages": TURNS, "text": "t"}, '"messages" and "text" are different forms'),
    ({**PAIR, "prompt": 3}, '"prompt" must be a string, got a number'),
    ({**PAIR, "prompt": None}, '"prompt" must be a string, got null'),
    ({**PAIR, "completion": ["c"]}, '"completion" must be a string, got a list'),
    ({**PAIR, "completion": ""}, '"completion" is empty, so there is nothing to train on; remove the record'),
    ({"text": ""}, '"text" is empty'),
    ({"text": {}}, '"text" must be a string, got an object'),
    (b'{"text": "ab\\ud83d"}', 'character 3 of "text" is an unpaired surrogate'),
    ({"messages": {}}, '"messages" must be a list of messages, got an object'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": ["hi"]}, '"messages"[0] must be {"role": …, "content": …}, got a string'),
    ({"messages": [{"content": "c"}]}, '"messages"[0] has no "role"'),
    ({"messages": [TURNS[0], {"role": "assistant"}]}, '"messages"[1] has no "content"'),
    ({"messages": [{"role": "user", "content": None}]}, '"messages"[0]["content"] must be a string, got null'),
    ({"messages": [{"role": 1, "content": "c"}]}, '"messages"[0]["role"] must be a string, got a number'),
    ({"messages": [{"role": "assistant", "content": ""}]}, '"messages"[0]["content"] (an assistant turn) is empty'),
    ({"messages": TURNS[:1]}, '"messages" has no turn of role "assistant", so there is nothing to train on'),
    ({"messages": TURNS, "tools": [{"name": "f"}]}, '"tools" are not supported'),
    ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, '"messages"[1]["weight"] is 0; turns cannot be weighted'),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), FAULTS)
def test_a_fault_is_named_with_its_file_and_line(value: Any, message: str, tmp_path: Path) -> None:
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    path = write(tmp_path, b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_a_record_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}: the file has no record; write one JSON object a line")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_jsonl(tmp_path / "nowhere.jsonl")


def test_empty_tools_and_weights_of_one_are_no_fault(tmp_path: Path) -> None:
    messages = [{**TURNS[0], "weight": 0}, {**TURNS[1], "weight": 1}]
    (record,) = read_jsonl(write(tmp_path, json.dumps({"messages": messages, "tools": []}).encode()))
    assert record.messages == tuple(messages)
