"""Where the assistant speaks: located in templates that do not say, held against the same templates that do."""

from functools import cache
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from mlora.sft.chat import encode_chats
from mlora.sft.records import Record
from mlora.sft.samples import encode
from tests.mlora.sft.templates import CHATML, FORMATS, LLAMA3, MISTRAL, PHI3, PLAIN, QWEN2_5, QWEN3, SPACED, Format
from tests.mlora.sft.tokenizer import byte_level


@cache
def tokenizer_of(form: Format, *, trim: bool = False) -> PreTrainedTokenizerFast:
    return byte_level(added=form.special, trim=trim)


def with_template(form: Format, template: str, **options: bool) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_of(form, **options)
    tokenizer.chat_template = template
    return tokenizer


def record(*turns: str, system: str | None = None) -> Record:
    """User and assistant in turn, after a system message if there is one."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(turns)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record(kind="messages", messages=tuple(messages), path="chat.jsonl", line=3)


def located(form: Format, conversation: Record, **options: bool) -> tuple[list[int], list[bool]]:
    return encode_chats([conversation], with_template(form, form.template, **options))[0]


def spoken(form: Format, conversation: Record, **options: bool) -> list[str]:
    """The texts of the assistant's turns."""
    tokens, marks = located(form, conversation, **options)
    runs = groupby(zip(tokens, marks, strict=True), key=lambda pair: pair[1])
    return [tokenizer_of(form, **options).decode([token for token, _ in run]) for mark, run in runs if mark]


EXPECTED = [
    (CHATML, ["fine<|im_end|>", "Paris<|im_end|>"]),
    (QWEN2_5, ["fine<|im_end|>", "Paris<|im_end|>"]),
    (QWEN3, ["fine<|im_end|>", "<think>\n\n</think>\n\nParis<|im_end|>"]),
    (LLAMA3, ["fine<|eot_id|>", "Paris<|eot_id|>"]),
    (PHI3, ["fine<|end|>", "Paris<|end|>"]),
    (PLAIN, [" fine\n", " Paris\n"]),  # one token holds the header's space and the word
    (SPACED, ["fine ", "Paris "]),
]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("form", "texts"), EXPECTED, ids=["chatml", "qwen2.5", "qwen3", "llama3", "phi3", "plain", "spaced"]
)
def test_a_turn_is_its_content_and_its_end(form: Format, texts: list[str], trim: bool) -> None:
    conversation = record("how are you?", "fine", "what is the capital of France?", "Paris", system="You are helpful.")
    assert spoken(form, conversation, trim=trim) == texts


def test_thinking_is_trained_where_the_template_shows_it() -> None:
    thought = "<think>\nhm\n</think>\n\nParis"
    assert spoken(QWEN3, record("a", thought, "b", thought)) == ["Paris<|im_end|>", f"{thought}<|im_end|>"]


def test_tokens_are_those_of_the_rendered_conversation() -> None:
    for form in FORMATS.values():
        conversation = record("how are you?", "fine", "and now?", "fine too")
        tokenizer = with_template(form, form.template)
        messages = [dict(message) for message in conversation.messages]
        expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        tokens = encode(conversation, tokenizer).tokens.tolist()
        assert tokens == expected
        assert tokens.count(tokenizer.bos_token_id) == form.template.count("<s>") * (
            2 if form == FORMATS["llama2"] else 1
        )


content = st.text(st.sampled_from("ABab \n\t漢🙂.:<|assistant"), min_size=1, max_size=12)


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.tuples(content, content), min_size=1, max_size=4), st.booleans())
@settings(max_examples=250, deadline=None, derandomize=True)
def test_located_turns_are_those_that_markers_say(name: str, pairs: list[tuple[str, str]], system: bool) -> None:
    form = FORMATS[name]
    turns = [turn for pair in pairs for turn in pair]
    conversation = record(*turns, system="You are helpful." if system and form.system else None)
    tokens, marks = located(form, conversation)
    said_tokens, said = encode_chats([conversation], with_template(form, form.with_generation))[0]
    assert tokens == said_tokens
    assert marks == said


def test_conversations_encoded_together_are_as_encoded_alone() -> None:
    conversations = [record("a", "b"), record("how are you?", "fine", "x", "y"), record("a", "b" * 40)]
    for template in (CHATML.template, CHATML.with_generation):
        tokenizer = with_template(CHATML, template)
        assert encode_chats(conversations, tokenizer) == [encode_chats([one], tokenizer)[0] for one in conversations]


def test_two_answers_in_a_row_and_a_last_word_of_the_user() -> None:
    messages = [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")]
    conversation = Record(kind="messages", messages=tuple({"role": role, "content": text} for role, text in messages))
    assert spoken(CHATML, conversation) == ["b<|im_end|>", "c<|im_end|>"]


def test_further_keys_of_a_message_reach_the_template() -> None:
    template = CHATML.template.replace("{{ m.content }}", "{{ m.name }}{{ m.content }}")
    messages = ({"role": "user", "content": "a", "name": "Ann "}, {"role": "assistant", "content": "b", "name": "Bob "})
    tokenizer = with_template(CHATML, template)
    tokens, marks = encode_chats([Record(kind="messages", messages=messages)], tokenizer)[0]
    assert "Ann a" in tokenizer.decode(tokens)
    assert tokenizer.decode([token for token, mark in zip(tokens, marks, strict=True) if mark]) == "Bob b<|im_end|>"


def fails(template: str, conversation: Record, form: Format = CHATML) -> str:
    with pytest.raises(ValueError) as error:
        encode_chats([conversation], with_template(form, template))
    return str(error.value)


def test_what_a_template_refuses_is_an_error_under_file_and_line() -> None:
    message = fails(MISTRAL.template, record("a", "b", system="s"), MISTRAL)
    assert message == (
        "chat.jsonl:3: the chat template refuses the conversation: "
        "Conversation roles must alternate user/assistant/user/assistant/..."
    )
    assert fails("{{ messages[0].nothing.more }}", record("a", "b")).startswith(
        "chat.jsonl:3: the chat template refuses"
    )


MARKERS = "; put {% generation %} and {% endgeneration %} around assistant turns in tokenizer.chat_template"
HIDDEN = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
# The generation prompt opens a thought that a finished conversation does not show, as DeepSeek-R1's does.
OPENED = CHATML.template.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
LAST_ONLY = "{% for m in messages %}{{ m.content }}|{% endfor %}{% if messages[-1].role == 'assistant' %}.{% endif %}"


@pytest.mark.parametrize(
    ("template", "turn", "reason"),
    [
        (HIDDEN, 1, "its content is not rendered"),
        (OPENED, 1, "it does not start with the generation prompt, '"),
        (LAST_ONLY, 1, "its end is '|.' at the end of a conversation, but not before"),
    ],
    ids=["hidden", "opened", "last only"],
)
def test_a_turn_that_the_template_does_not_show_is_an_error(template: str, turn: int, reason: str) -> None:
    message = fails(template, record("hello", "bye", "a", "b"))
    assert message.startswith(
        f'chat.jsonl:3: the chat template does not show where the assistant turn "messages"[{turn}] is: {reason}'
    )
    assert message.endswith(MARKERS)


def test_a_conversation_that_the_assistant_opens_needs_markers() -> None:
    opening = Record(kind="messages", messages=({"role": "assistant", "content": "hello"},), path="chat.jsonl", line=3)
    assert '"messages"[0] is: nothing stands before it' in fails(CHATML.template, opening)
    tokenizer = with_template(CHATML, CHATML.with_generation)
    tokens, marks = encode_chats([opening], tokenizer)[0]
    assert tokenizer.decode([token for token, mark in zip(tokens, marks, strict=True) if mark]) == "hello<|im_end|>"


def test_markers_around_nothing_are_an_error() -> None:
    empty = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    assert (
        fails(empty, record("a", "b")) == f"chat.jsonl:3: the chat template marks nothing of the conversation{MARKERS}"
    )


def test_without_a_template_the_ways_out_are_said() -> None:
    tokenizer = byte_level()
    with pytest.raises(ValueError) as error:
        encode_chats([record("a", "b")], tokenizer)
    assert str(error.value).startswith(
        "chat.jsonl:3: the tokenizer has no chat template, so messages cannot be encoded;"
    )


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: it knows no character offsets."""

    vocab_size = 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(at): at for at in range(128)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_a_tokenizer_without_character_offsets_is_refused() -> None:
    tokenizer = Letters(chat_template=CHATML.template)
    with pytest.raises(
        ValueError, match=r"chat.jsonl:3: finding the assistant's tokens needs a fast tokenizer, got Letters"
    ):
        encode_chats([record("a", "b")], tokenizer)
