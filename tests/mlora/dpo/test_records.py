"""The forms of preference data, and what is refused under file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlora.dpo.records import Preference, read_preferences


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, GOOD, BAD = turn("user", "Why?"), turn("assistant", "Because."), turn("assistant", "No.")
EARLIER = [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hello"), ASK]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records))
    return path


def read_one(tmp_path: Path, **record: Any) -> Preference:
    (found,) = read_preferences(write(tmp_path / "p.jsonl", record))
    return found


def test_texts(tmp_path: Path) -> None:
    found = read_one(tmp_path, prompt="Why?", chosen=" Because.", rejected=" No.", score=3)
    assert (found.chosen.kind, found.chosen.prompt, found.chosen.completion) == ("prompt", "Why?", " Because.")
    assert (found.rejected.prompt, found.rejected.completion) == ("Why?", " No.")
    assert found.chosen.where == f"{tmp_path}/p.jsonl:1"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": EARLIER, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
        {"prompt": "Hi", "chosen": [*EARLIER, GOOD], "rejected": [*EARLIER, BAD]},
    ],
)
def test_messages_are_the_same_in_every_form(tmp_path: Path, record: dict[str, Any]) -> None:
    found = read_one(tmp_path, **record)
    assert (found.chosen.kind, found.chosen.messages, found.chosen.given) == ("messages", (*EARLIER, GOOD), 4)
    assert (found.rejected.messages, found.rejected.given) == ((*EARLIER, BAD), 4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b"}, 'the object has no "rejected"; it needs "prompt", "chosen" and "rejected"'),
    ({"chosen": "b", "rejected": "c"}, 'the object has no "prompt"'),
    ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, '"chosen" is a string and "rejected" is a list; both must be'),
    ({"prompt": "a", "chosen": 1, "rejected": 2}, '"chosen" is a number and "rejected" is a number'),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, '"chosen" is empty'),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, '"prompt" must be a string, got a number'),
    ({"prompt": [ASK], "chosen": "b", "rejected": "c"}, '"prompt" is a list, and "chosen" and "rejected" are strings'),
    ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, '"chosen" has no turn of role "assistant"'),
    ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, '"prompt" is empty'),
    ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, '"prompt"[0] has no "content"'),
    ({"chosen": [ASK, GOOD], "rejected": [turn("user", "How?"), BAD]}, "begin with different messages"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, '"chosen" has no assistant turn that the other has not'),
    ({"prompt": "How?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, '"prompt" is neither a list of messages nor'),
    ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "tools": [{}]}, '"tools" are not supported'),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_other_objects_are_refused_under_file_and_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, "", record)
    with pytest.raises(ValueError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.jsonl: the file has no record; .*chosen"):
        read_preferences(write(tmp_path / "p.jsonl", ""))
