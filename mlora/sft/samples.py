"""From a record to tokens, and which of them are trained on.

The tokenizer is a Hugging Face one that the caller has loaded. Knows nothing of packing and batches.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlora.sft.chat import encode_chat
from mlora.sft.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LINES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Sample:
    """The tokens of one record.

    Attributes:
        tokens: token ids, int64 [n].
        is_target: bool [n]; true where the token is to be predicted from those before it. Never true for the first.
    """

    tokens: npt.NDArray[np.int64]
    is_target: npt.NDArray[np.bool_]

    def cut(self, max_tokens: int) -> "Sample":
        """Its first ``max_tokens`` tokens."""
        return Sample(self.tokens[:max_tokens], self.is_target[:max_tokens])


@dataclass(frozen=True)
class EncodedData:
    """The samples of a file, in its order.

    Attributes:
        samples: those with at least one target.
        truncated_lines: 1-based lines of the samples kept but cut.
        dropped_lines: 1-based lines of the records left out because no target was left.
    """

    samples: list[Sample]
    truncated_lines: tuple[int, ...]
    dropped_lines: tuple[int, ...]


def encode(record: Record, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None = None) -> Sample:
    """The record's tokens, cut after ``max_tokens``.

    - "prompt": the prompt with the special tokens that the tokenizer puts before a text, the completion, EOS.
      Targets are the completion and EOS. The two are tokenised apart, as the prompt is alone at inference.
    - "text": the text with the special tokens that the tokenizer adds, and EOS if the tokenizer has one. Every token
      after the first is a target.
    - "messages": the conversation under the tokenizer's chat template. Targets are the assistant turns, content and
      end-of-turn token: what the template marks with ``{% generation %}``, else what can be located (see ``chat``).

    An EOS that is already there is not repeated.

    Raises:
        ValueError: the tokenizer lacks what the form needs (EOS for "prompt"; a chat template that shows where
            assistant turns are, and character offsets, for "messages"), or the template refuses the conversation.
    """
    if record.kind == "prompt":
        sample = _encode_prompt(record, tokenizer)
    elif record.kind == "text":
        sample = _encode_text(record, tokenizer)
    else:
        sample = _sample(*encode_chat(record, tokenizer))
    return sample if max_tokens is None else sample.cut(max_tokens)


def encode_all(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", seq_length: int) -> EncodedData:
    """Encodes every record, cut to ``seq_length + 1`` tokens: inputs are all but the last, labels all but the first.

    Logs one warning with counts and the first line numbers if samples were cut or left out.

    Raises:
        ValueError: as ``encode``; ``seq_length`` below 1; no sample is left.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    samples: list[Sample] = []
    truncated: list[int] = []
    dropped: list[int] = []
    for record in records:
        whole = encode(record, tokenizer)
        sample = whole.cut(seq_length + 1)
        if not sample.is_target.any():
            dropped.append(record.line)
            continue
        samples.append(sample)
        if len(sample.tokens) < len(whole.tokens):
            truncated.append(record.line)
    if not samples:
        raise ValueError(
            f"none of {len(records)} records has a token to train on within seq_length {seq_length}; "
            "use a longer seq_length or shorter prompts"
        )
    if truncated or dropped:
        logger.warning(
            "%s: of %d records, %s cut to seq_length %d, %s left out because no target is within it",
            records[0].path,
            len(records),
            _counted(truncated),
            seq_length,
            _counted(dropped),
        )
    return EncodedData(samples, tuple(truncated), tuple(dropped))


def pad_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with: the tokenizer's padding token, else EOS, else 0. Padding is never a target."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _counted(lines: list[int]) -> str:
    if not lines:
        return "0"
    shown = ", ".join(map(str, lines[:_LINES_SHOWN])) + (", …" if len(lines) > _LINES_SHOWN else "")
    return f"{len(lines)} (line {shown})"


def _sample(tokens: Sequence[int], is_target: npt.ArrayLike) -> Sample:
    mask = np.array(is_target, dtype=np.bool_)
    mask[:1] = False  # nothing stands before the first token, so nothing predicts it
    return Sample(np.array(tokens, dtype=np.int64), mask)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    # verbose=False: the tokenizer would warn of its own maximum length, and samples are cut afterwards.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _encode_prompt(record: Record, tokenizer: "PreTrainedTokenizerBase") -> Sample:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{record.where}: the tokenizer has no eos_token, so a completion would have no end; "
            "set tokenizer.eos_token"
        )
    prompt = _ids(tokenizer, record.prompt, special=True)
    added_eos = len(prompt) > 1 and prompt[-1] == eos and _ids(tokenizer, record.prompt, special=False)[-1:] != [eos]
    if added_eos:
        prompt.pop()
    completion = _ended(_ids(tokenizer, record.completion, special=False), eos)
    return _sample(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _encode_text(record: Record, tokenizer: "PreTrainedTokenizerBase") -> Sample:
    tokens = _ended(_ids(tokenizer, record.text, special=True), tokenizer.eos_token_id)
    return _sample(tokens, [True] * len(tokens))


def _ended(tokens: list[int], eos: int | None) -> list[int]:
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]
