"""Pairs as tokens: targets are the answers alone, and a pair stays or goes as a whole."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mlora.dpo.records import Preference, read_preferences
from mlora.dpo.samples import encode_pairs
from mlora.sft.records import Record
from tests.mlora.sft.templates import CHATML, LLAMA3, QWEN2_5, Format
from tests.mlora.sft.tokenizer import byte_level


def preferences(path: Path, *records: dict[str, Any]) -> list[Preference]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_preferences(path)


def test_targets_are_the_answer_and_its_end(tmp_path: Path) -> None:
    tokenizer = byte_level(bos=True)
    pairs = preferences(tmp_path / "p", {"prompt": "What is it? ", "chosen": "Paris.", "rejected": "a dog"})
    chosen, rejected = encode_pairs(pairs, tokenizer, 64).samples
    for sample, answer in ((chosen, "Paris."), (rejected, "a dog")):
        assert tokenizer.decode(sample.tokens[~sample.is_target]) == "<s>What is it? "
        assert tokenizer.decode(sample.tokens[sample.is_target]) == f"{answer}</s>"


@pytest.mark.parametrize("form", [CHATML, QWEN2_5, LLAMA3])
@pytest.mark.parametrize("marked", [False, True])
def test_assistant_turns_of_the_prompt_are_no_targets(tmp_path: Path, form: Format, marked: bool) -> None:
    tokenizer = byte_level(added=form.special)
    tokenizer.chat_template = form.with_generation if marked else form.template
    roles = ("user", "assistant", "user")
    prompt = [{"role": role, "content": text} for role, text in zip(roles, ("Hello", "fine", "France"), strict=True)]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Paris"), ("rejected", "dog"))
    }
    pairs = preferences(tmp_path / "p", {"prompt": prompt, **answers})
    end = form.special[-1] if form is not LLAMA3 else "<|eot_id|>"
    for sample, answer in zip(encode_pairs(pairs, tokenizer, 200).samples, ("Paris", "dog"), strict=True):
        assert tokenizer.decode(sample.tokens[sample.is_target]) == f"{answer}{end}"
    # The same conversation of which nothing is given has the earlier turn as a target too.
    whole = Record(kind="messages", messages=pairs[0].chosen.messages)
    first = encode_pairs([Preference(whole, pairs[0].rejected)], tokenizer, 200).samples[0]
    assert "fine" in tokenizer.decode(first.tokens[first.is_target])


def test_a_pair_without_one_of_its_answers_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()
    pairs = preferences(
        tmp_path / "p",
        {"prompt": "a", "chosen": "b" * 30, "rejected": "c"},
        {"prompt": "a" * 30, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    )
    with caplog.at_level(logging.WARNING):
        found = encode_pairs(pairs, tokenizer, 10)
    assert len(found.samples) == 4 and max(len(sample.tokens) for sample in found.samples) <= 11
    assert (found.truncated_lines, found.dropped_lines) == ((1,), (2,))
    assert "of 3 pairs, 1 (line 1) cut to seq_length 10, 1 (line 2) left out" in caplog.text
    with pytest.raises(ValueError, match="none of 1 pairs has a token of both answers within seq_length 10"):
        encode_pairs(pairs[1:2], tokenizer, 10)
    with pytest.raises(ValueError, match="seq_length must be at least 1"):
        encode_pairs(pairs, tokenizer, 0)


def test_pairs_whose_answers_are_the_same_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = preferences(
        tmp_path / "p",
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b" * 10 + "c", "rejected": "b" * 10 + "d"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    )
    assert len(encode_pairs(pairs, byte_level(), 10).samples) == 6
    assert "of 3 pairs, 2 (line 1, 2) teach nothing: their answers are the same within seq_length 10" in caplog.text
    with pytest.raises(ValueError, match='"chosen" and "rejected" are the same in every pair, within seq_length 10'):
        encode_pairs(pairs[:2], byte_level(), 10)
