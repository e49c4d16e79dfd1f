"""Records to tokens: what is a target, what is cut, and that batches of records give what records alone give."""

import logging
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlora.sft.records import Record
from mlora.sft.samples import Sample, encode, encode_all, pad_token
from tests.mlora.sft.tokenizer import BOS, EOS, byte_level, metaspace

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def pair(prompt: str, completion: str, line: int = 1) -> Record:
    return Record(kind="prompt", prompt=prompt, completion=completion, path="data.jsonl", line=line)


def text(value: str, line: int = 1) -> Record:
    return Record(kind="text", text=value, path="data.jsonl", line=line)


def chat(*contents: str, line: int = 1) -> Record:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[at % 2], "content": content} for at, content in enumerate(contents))
    return Record(kind="messages", messages=messages, path="data.jsonl", line=line)


def shown(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """(text of what is no target, text of the targets), special tokens included."""
    apart = [sample.tokens[~sample.is_target], sample.tokens[sample.is_target]]
    before, targets = (tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in apart)
    return before, targets


def test_targets_of_a_pair_are_the_completion_and_eos() -> None:
    tokenizer = byte_level(bos=True)
    sample = encode(pair("What is the capital?", " Paris."), tokenizer)
    assert shown(sample, tokenizer) == (f"{BOS}What is the capital?", f" Paris.{EOS}")
    assert sample.tokens.dtype == np.int32 and sample.is_target.dtype == np.bool_
    # Targets stand behind the prompt, without a gap.
    assert np.flatnonzero(sample.is_target).tolist() == list(range(len(sample.tokens)))[-int(sample.is_target.sum()) :]


def test_prompt_and_completion_are_tokenised_apart() -> None:
    """Together "capi" + "tal" would be one token; at inference the model sees the prompt's tokens alone."""
    tokenizer = byte_level()
    ids = {part: tokenizer(part)["input_ids"] for part in ("The capi", "tal", "The capital")}
    assert ids["The capital"] != ids["The capi"] + ids["tal"]
    sample = encode(pair("The capi", "tal"), tokenizer)
    assert sample.tokens.tolist() == [*ids["The capi"], *ids["tal"], tokenizer.eos_token_id]


def test_an_empty_prompt_leaves_the_first_token_without_a_predecessor() -> None:
    with_bos, without = byte_level(bos=True), byte_level()
    assert shown(encode(pair("", "dog"), with_bos), with_bos) == (BOS, f"dog{EOS}")
    sample = encode(pair("", "dog"), without)
    assert not sample.is_target[0] and sample.is_target[1:].all()


def test_eos_is_not_repeated() -> None:
    for tokenizer in (byte_level(), metaspace(), metaspace(after=True)):
        for record in (pair("The dog", "is lazy"), text("The dog is lazy")):
            tokens = encode(record, tokenizer).tokens.tolist()
            assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id
        assert encode(pair("dog", f"dog{EOS}"), tokenizer).tokens.tolist().count(tokenizer.eos_token_id) == 1
        assert encode(text(f"dog{EOS}"), tokenizer).tokens.tolist().count(tokenizer.eos_token_id) == 1


def test_what_a_tokenizer_puts_behind_a_text_does_not_end_the_prompt() -> None:
    tokenizer, plain = metaspace(after=True), metaspace()
    assert tokenizer("dog")["input_ids"][-1] == tokenizer.eos_token_id
    for prompt in ("The dog", f"The dog{EOS}", ""):  # an EOS that the data spells stays
        assert (
            encode(pair(prompt, "is"), tokenizer).tokens.tolist() == encode(pair(prompt, "is"), plain).tokens.tolist()
        )


def test_a_text_is_all_targets_but_the_first_token() -> None:
    tokenizer = byte_level(bos=True)
    assert shown(encode(text("The dog."), tokenizer), tokenizer) == (BOS, f"The dog.{EOS}")
    without_eos = byte_level(eos=False)
    sample = encode(text("The dog."), without_eos)
    assert without_eos.decode(sample.tokens.tolist()) == "The dog."
    assert not sample.is_target[0] and sample.is_target[1:].all()


def test_a_pair_needs_an_eos_token() -> None:
    with pytest.raises(ValueError) as error:
        encode(pair("a", "b", line=7), byte_level(eos=False))
    assert str(error.value).startswith(
        "data.jsonl:7: the tokenizer has no eos_token, so a completion would have no end; set"
    )


def test_max_tokens_cuts_at_the_end() -> None:
    tokenizer = byte_level()
    whole = encode(pair("The quick brown fox", " jumps over the lazy dog"), tokenizer)
    cut = encode(pair("The quick brown fox", " jumps over the lazy dog"), tokenizer, max_tokens=9)
    assert cut.tokens.tolist() == whole.tokens[:9].tolist() and cut.is_target.tolist() == whole.is_target[:9].tolist()


def mixed(count: int) -> list[Record]:
    """Records of all forms and many lengths."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "漢字", "🙂"]
    records = []
    for at in range(count):
        some = " ".join(words[(at * 7 + step) % len(words)] for step in range(at % 23 + 1))
        forms = [pair(some, some[::-1], at), text(some, at), chat(some, some[::-1], some, "b", line=at)]
        records.append(forms[at * 5 % 7 % 3])
    return records


def test_records_encoded_together_are_as_encoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlora.sft.samples._BATCH", 32)
    tokenizer = byte_level(bos=True, added=("<|user|>", "<|assistant|>"))
    tokenizer.chat_template = CHAT
    records = mixed(100)
    assert {record.kind for record in records} == {"prompt", "text", "messages"}
    together = encode_all(records, tokenizer, seq_length=10_000)
    assert len(together.samples) == len(records)
    for record, sample in zip(records, together.samples, strict=True):
        alone = encode(record, tokenizer)
        assert sample.tokens.tolist() == alone.tokens.tolist() and sample.is_target.tolist() == alone.is_target.tolist()


def test_what_is_cut_and_what_is_left_out_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()  # a byte of these texts is a token
    records = [
        pair("xz", "zx", line=1),  # 5 tokens
        pair("xzxz", "zxzxz", line=3),  # 10: cut
        pair("xzxzxz", "z", line=4),  # 6 of the prompt: no target left
        text("xzxzx", line=5),  # 6: just fits
        *(text("xzxzxzxz", line=line) for line in range(6, 12)),  # 9: cut
    ]
    with caplog.at_level(logging.WARNING):
        found = encode_all(records, tokenizer, seq_length=5)
    assert found.truncated_lines == (3, 6, 7, 8, 9, 10, 11) and found.dropped_lines == (4,)
    assert [len(sample.tokens) for sample in found.samples] == [5, 6, 6, 6, 6, 6, 6, 6, 6]
    assert [int(sample.is_target.sum()) for sample in found.samples[:3]] == [3, 2, 5]
    (message,) = caplog.messages
    assert message == (
        "data.jsonl: of 10 records, 7 (line 3, 6, 7, 8, 9, …) cut to seq_length 5, "
        "1 (line 4) left out because no target is within it"
    )


def test_nothing_is_said_if_everything_fits(caplog: pytest.LogCaptureFixture) -> None:
    found = encode_all([pair("a", "b")], byte_level(), seq_length=2)
    assert not found.truncated_lines and not found.dropped_lines and not caplog.messages


def test_no_sample_left_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 2 records has a token to train on within seq_length 2; use a longer"):
        encode_all([pair("xzxz", "x")] * 2, byte_level(), seq_length=2)
    with pytest.raises(ValueError, match="seq_length must be at least 1, got 0"):
        encode_all([pair("a", "b")], byte_level(), seq_length=0)


def test_padding_falls_back_to_eos_and_zero() -> None:
    tokenizer: Any = byte_level()
    assert pad_token(tokenizer) == tokenizer.pad_token_id == 2
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    assert pad_token(tokenizer) == 0
