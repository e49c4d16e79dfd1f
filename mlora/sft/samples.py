"""From a record to tokens, and which of them are trained on.

The tokenizer is a Hugging Face one that the caller has loaded. Knows nothing of packing and batches.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlora.sft.chat import encode_chats
from mlora.sft.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LINES_SHOWN = 5
_BATCH = 1000  # records that go to the tokenizer together: enough to keep its threads busy


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """The tokens of one record.

    Attributes:
        tokens: token ids, int32 [n]: a rank may hold a billion of them.
        is_target: bool [n]; true where the token is to be predicted from those before it. Never true for the first.
    """

    tokens: npt.NDArray[np.int32]
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
    - "text": the text with the special tokens that the tokenizer puts before it, and EOS if the tokenizer has one.
      Every token after the first is a target.
    - "messages": the conversation under the tokenizer's chat template. Targets are the assistant turns, content and
      end-of-turn token: what the template marks with ``{% generation %}``, else what can be located (see ``chat``).

    An EOS that is already there is not repeated.

    Raises:
        ValueError: the tokenizer lacks what the form needs (EOS for "prompt"; a chat template that shows where
            assistant turns are, and character offsets, for "messages"), or the template refuses the conversation.
    """
    (sample,) = _encode([record], tokenizer)
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
    for record, whole in zip(records, encode_records(records, tokenizer), strict=True):
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
            counted(truncated),
            seq_length,
            counted(dropped),
        )
    return EncodedData(samples, tuple(truncated), tuple(dropped))


def pad_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with: the tokenizer's padding token, else EOS, else 0. Padding is never a target."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def counted(lines: Sequence[int]) -> str:
    """How many lines, and which are the first of them, for a warning."""
    if not lines:
        return "0"
    shown = ", ".join(map(str, lines[:_LINES_SHOWN])) + (", …" if len(lines) > _LINES_SHOWN else "")
    return f"{len(lines)} (line {shown})"


def encode_records(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
    """The samples of records, whole; see :func:`encode`."""
    for first in range(0, len(records), _BATCH):
        yield from _encode(records[first : first + _BATCH], tokenizer)


def _encode(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
    """The records' samples, whole; each form goes to the tokenizer at once."""
    samples: dict[int, Sample] = {}
    for kind, encode_form in _ENCODERS.items():
        chosen = {at: record for at, record in enumerate(records) if record.kind == kind}
        if chosen:
            samples.update(zip(chosen, encode_form(list(chosen.values()), tokenizer), strict=True))
    return [samples[at] for at in range(len(records))]


def _encode_prompts(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{records[0].where}: the tokenizer has no eos_token, so a completion would have no end; "
            "set tokenizer.eos_token"
        )
    prompts = _begun(tokenizer, [record.prompt for record in records])
    completions = _ids(tokenizer, [record.completion for record in records], special=False)
    samples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        end = _ended(completion, eos)
        samples.append(_sample(prompt + end, [False] * len(prompt) + [True] * len(end)))
    return samples


def _encode_texts(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
    texts = _begun(tokenizer, [record.text for record in records])
    ended = [_ended(tokens, tokenizer.eos_token_id) for tokens in texts]
    return [_sample(tokens, [True] * len(tokens)) for tokens in ended]


def _encode_messages(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase") -> list[Sample]:
    return [_sample(tokens, marks) for tokens, marks in encode_chats(records, tokenizer)]


_ENCODERS = {"prompt": _encode_prompts, "text": _encode_texts, "messages": _encode_messages}


def _sample(tokens: Sequence[int], is_target: Sequence[bool]) -> Sample:
    mask = np.array(is_target, dtype=np.bool_)
    mask[:1] = False  # nothing stands before the first token, so nothing predicts it
    return Sample(np.array(tokens, dtype=np.int32), mask)


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, special: bool) -> list[list[int]]:
    # verbose=False: the tokenizer would warn of its own maximum length, and samples are cut afterwards.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _begun(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """The texts' ids behind the special tokens that the tokenizer puts before a text, without those it puts behind."""
    after = _special_tokens_after(tokenizer)
    whole = _ids(tokenizer, texts, special=True)
    return [ids[: -len(after)] if after and ids[-len(after) :] == after else ids for ids in whole]


def _special_tokens_after(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts behind a text, for example T5's EOS."""
    ((bare,), (whole,)) = (_ids(tokenizer, ["a"], special=special) for special in (False, True))
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[next(starts, len(whole)) + len(bare) :]


def _ended(tokens: list[int], eos: int | None) -> list[int]:
    return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]
