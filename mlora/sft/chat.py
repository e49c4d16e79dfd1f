"""From a conversation to tokens, and which of them are the assistant's.

A chat template is a program that turns messages into text; only templates with ``{% generation %}`` markers say which text
is the assistant's. For the others this file locates the turns in the text. Knows nothing of lengths or of training.
"""

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlora.sft.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKERS = "put {% generation %} and {% endgeneration %} around assistant turns in tokenizer.chat_template"


def encode_chats(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], list[bool]]]:
    """Conversations under the tokenizer's chat template: of each the token ids, and whether each is an assistant's.

    An assistant turn is its content and its end-of-turn token, not its header. A token that reaches over either end of
    a turn counts as the turn's. Turns among the messages that a record says are given do not count.

    Raises:
        ValueError: there is no chat template, the tokenizer gives no character offsets (it is not a fast one), the
            template refuses a conversation or does not show where an assistant turn is.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{records[0].where}: the tokenizer has no chat template, so messages cannot be encoded; take the tokenizer of "
            "a chat model, set tokenizer.chat_template, or write prompts and answers as strings"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{records[0].where}: finding the assistant's tokens needs a fast tokenizer, got {type(tokenizer).__name__}"
        )
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special = frozenset(token for token in added | set(tokenizer.all_special_tokens) if token.strip())
    chats = [_Chat(record, tokenizer, special) for record in records]
    if _GENERATION.search(tokenizer.get_chat_template()):
        return [chat.marked() for chat in chats]
    texts, spans = zip(*(chat.located() for chat in chats), strict=True)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        (list(tokens), _within(offsets, turns))
        for tokens, offsets, turns in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    ]


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens, given their ranges of characters, reach into one of ``spans``."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begin = np.minimum(begin, end - 1)  # byte-level tokenizers may trim a token of white space to nothing
    mask = np.zeros(len(begin), dtype=np.bool_)
    for first, last in spans:
        mask |= (begin < last) & (end > first)
    marks: list[bool] = mask.tolist()
    return marks


@dataclass(frozen=True)
class _Chat:
    """One conversation under one template; ``special`` holds the tokenizer's special tokens."""

    record: Record
    tokenizer: "PreTrainedTokenizerBase"
    special: frozenset[str]

    def marked(self) -> tuple[list[int], list[bool]]:
        """The assistant's is what the template marks with ``{% generation %}``."""
        encoded = self._apply(
            self.record.messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        mask = [bool(marked) for marked in encoded["assistant_masks"]]
        if self.record.given:
            mask = self._without_given(mask)
        if not any(mask):
            raise ValueError(f"{self.record.where}: the chat template marks nothing of the conversation; {_MARKERS}")
        return list(encoded["input_ids"]), mask

    def _without_given(self, mask: list[bool]) -> list[bool]:
        """The marks without those that the given messages have when they stand alone, which come first."""
        given = self.record.messages[: self.record.given]
        left = 0
        if any(message["role"] == "assistant" for message in given):
            alone = self._apply(
                given,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            left = sum(map(bool, alone["assistant_masks"]))
        kept = []
        for marked in mask:
            kept.append(marked and left == 0)
            left -= marked and left > 0
        return kept

    def located(self) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as rendered, and the ranges of its characters that are assistant turns."""
        text = self._render(self.record.messages)
        roles = (message["role"] for message in self.record.messages)
        turns = [turn for turn, role in enumerate(roles) if role == "assistant" and turn >= self.record.given]
        return text, [self._span(turn, text) for turn in turns]

    def _span(self, turn: int, text: str) -> tuple[int, int]:
        """Character range of an assistant turn in ``text``, the whole conversation as rendered.

        It starts where the generation prompt ends. For its end the conversation is rendered again with another content
        in this turn: what stays equal at the right is what follows the content. The turn is closed by the first special
        token there that also follows the content when the conversation stops with this turn. (Comparing prefixes would
        not do: Qwen3 drops the thinking of earlier turns, Phi-3 puts EOS after the last turn only.)
        """
        messages = self.record.messages
        if turn == 0:
            raise self._error(turn, "nothing stands before it")
        head = self._render(messages[:turn], prompted=True)
        probe = [*messages[:turn], {**messages[turn], "content": _unlike(messages[turn]["content"])}]
        other = self._render([*probe, *messages[turn + 1 :]])
        if not (text.startswith(head) and other.startswith(head)):
            raise self._error(turn, f"it does not start with the generation prompt, {head[-40:]!r}")
        if text == other:
            raise self._error(turn, "its content is not rendered")
        start = len(head)
        if head == self._render(messages[:turn]):  # a template without generation prompt: a header may still follow
            start = len(os.path.commonprefix([text, other]))
        follows = _common_suffix(text[len(head) :], other[len(head) :])
        closing = follows
        if turn + 1 < len(messages):
            closing = _common_suffix(self._render(messages[: turn + 1]), self._render(probe))
        return start, len(text) - len(follows) + self._closing_length(turn, follows, closing)

    def _closing_length(self, turn: int, follows: str, closing: str) -> int:
        """Characters of the end-of-turn at the start of ``follows``, given what closes a conversation's last turn."""
        shared = os.path.commonprefix([follows, closing])
        ends = [shared.index(token) + len(token) for token in self.special if token in shared]
        if not ends and shared != closing:
            raise self._error(turn, f"its end is {closing!r} at the end of a conversation, but not before")
        return min(ends, default=len(shared))

    def _render(self, messages: Sequence[Mapping[str, Any]], *, prompted: bool = False) -> str:
        return str(self._apply(messages, tokenize=False, add_generation_prompt=prompted))

    def _apply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{self.record.where}: the chat template refuses the conversation: {error}") from error

    def _error(self, turn: int, reason: str) -> ValueError:
        return ValueError(
            f'{self.record.where}: the chat template does not show where the assistant turn "messages"[{turn}] is: '
            f"{reason}; {_MARKERS}"
        )


def _unlike(content: str) -> str:
    """A content that differs from ``content`` in the first and the last character, trimmed or not."""
    bare = content.strip()
    return next(letter for letter in "ABC" if letter not in (bare[:1], bare[-1:]))


def _common_suffix(one: str, other: str) -> str:
    length = len(os.path.commonprefix([one[::-1], other[::-1]]))
    return one[len(one) - length :]
