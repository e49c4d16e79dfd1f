"""From preferences to tokens: two samples for each, chosen and rejected, whose targets are the answers."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlora.dpo.records import Preference
from mlora.sft.samples import EncodedData, Sample, counted, encode_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def encode_pairs(
    preferences: Sequence[Preference], tokenizer: "PreTrainedTokenizerBase", seq_length: int
) -> EncodedData:
    """Encodes every preference: chosen, rejected, chosen, rejected, ..., each cut to ``seq_length + 1`` tokens.

    A pair is left out if one of its answers is not within. Logs a warning with counts and the first line numbers if samples were
    cut or pairs left out, and one if there are pairs whose answers are the same, which teach nothing.

    Raises:
        ValueError: as :func:`mlora.sft.samples.encode`; ``seq_length`` below 1; no pair is left, or none has two answers.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    records = [record for pair in preferences for record in (pair.chosen, pair.rejected)]
    whole = list(encode_records(records, tokenizer))
    samples: list[Sample] = []
    truncated: list[int] = []
    dropped: list[int] = []
    alike: list[int] = []
    for number, pair in enumerate(preferences):
        long = whole[2 * number : 2 * number + 2]
        cut = [sample.cut(seq_length + 1) for sample in long]
        if not all(sample.is_target.any() for sample in cut):
            dropped.append(pair.chosen.line)
            continue
        samples += cut
        if np.array_equal(cut[0].tokens, cut[1].tokens):
            alike.append(pair.chosen.line)
        if any(len(short.tokens) < len(sample.tokens) for short, sample in zip(cut, long, strict=True)):
            truncated.append(pair.chosen.line)
    if not samples:
        raise ValueError(
            f"none of {len(preferences)} pairs has a token of both answers within seq_length {seq_length}; "
            "use a longer seq_length or shorter prompts"
        )
    if 2 * len(alike) == len(samples):
        raise ValueError(
            f'{preferences[0].chosen.path}: "chosen" and "rejected" are the same in every pair, within seq_length {seq_length}'
        )
    if alike:
        logger.warning(
            "%s: of %d pairs, %s teach nothing: their answers are the same within seq_length %d",
            preferences[0].chosen.path,
            len(preferences),
            counted(alike),
            seq_length,
        )
    if truncated or dropped:
        logger.warning(
            "%s: of %d pairs, %s cut to seq_length %d, %s left out because an answer is not within it",
            preferences[0].chosen.path,
            len(preferences),
            counted(truncated),
            seq_length,
            counted(dropped),
        )
    return EncodedData(samples, tuple(truncated), tuple(dropped))
