"""JSONL files and a tokenizer to rows of tokens, with what a run has to remember of them.

Every rank reads everything: batches are functions of the whole data, and no rank waits for another one's tokenizer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlora.objective import DataObjective
from mlora.sft.packing import Rows, packed_rows, single_rows
from mlora.sft.samples import Sample, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """Rows, and facts about them.

    Attributes:
        rows: of ``seq_length`` tokens each; an item is one, or as many as the objective says.
        tokens: of each item without padding, int64 [items + 1]; the last entry is the filler's.
        digest: of every sample's tokens and targets: equal for data that train alike.
        facts: plain values for ``config.json``.
    """

    rows: Rows
    tokens: npt.NDArray[np.int64]
    digest: str
    facts: dict[str, Any]

    @property
    def items(self) -> int:
        """Their number: batches are made of them."""
        return len(self.tokens) - 1


def open_tokenizer(model: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{model} has no tokenizer that can be loaded: {error}") from error
    return tokenizer


def load_data(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    objective: DataObjective,
    *,
    seq_length: int,
    packing: bool,
    vocab_size: int,
) -> Dataset:
    """Read, tokenise and lay out one or more files, in the order given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is malformed (file and line are named), no sample is left, or the tokenizer is of another model.
    """
    samples: list[Sample] = []
    files = []
    for path in paths:
        encoded = objective.encode(path, tokenizer, seq_length)
        samples += encoded.samples
        kept = len(encoded.samples) // objective.rows_of_item
        files.append(
            {
                "path": str(path),
                "records": kept + len(encoded.dropped_lines),
                "samples": kept,
                "cut": len(encoded.truncated_lines),
                "left_out": len(encoded.dropped_lines),
            }
        )
    _check_vocabulary(samples, paths, vocab_size)
    rows = (packed_rows if packing else single_rows)(samples, seq_length, pad_token(tokenizer))
    lengths = np.array([len(sample.tokens) - 1 for sample in samples], dtype=np.int64)
    in_rows = np.array([lengths[list(members)].sum() for members in rows.bins], dtype=np.int64)
    tokens = np.append(in_rows.reshape(-1, objective.rows_of_item).sum(1), 0)
    facts = {
        "files": files,
        "rows": len(rows),
        "tokens": int(tokens.sum()),
        "targets": sum(int(sample.is_target.sum()) for sample in samples),
    }
    return Dataset(rows, tokens, _digest(samples), facts)


def _check_vocabulary(samples: Sequence[Sample], paths: Sequence[Path], vocab_size: int) -> None:
    # Megatron's embedding answers an index beyond the vocabulary with a row of zeros or of padding.
    greatest = max(int(sample.tokens.max()) for sample in samples)
    if greatest >= vocab_size:
        raise ValueError(
            f"{', '.join(map(str, paths))}: the tokenizer gives token {greatest}, but the model's vocabulary has {vocab_size}; "
            "is the tokenizer that of another model?"
        )


def _digest(samples: Sequence[Sample]) -> str:
    total = hashlib.sha256()
    for sample in samples:
        # In fixed types, so that a later version that holds them otherwise finds the same.
        total.update(len(sample.tokens).to_bytes(8, "little"))
        total.update(sample.tokens.astype("<i8").tobytes())
        total.update(sample.is_target.astype("u1").tobytes())
    return total.hexdigest()
