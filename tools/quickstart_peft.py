"""The quickstart's other side: the base and the exported adapter in Hugging Face PEFT, in one process.

Knows nothing of Megatron; the only thing shared with the trainer is how a pair becomes tokens (`mlora.sft`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mlora.sft.records import Record, read_jsonl
from mlora.sft.samples import Sample, encode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

COMPARED_SAMPLES = 16
SHOWN_EXAMPLES = 5
BATCH = 32


@dataclass(frozen=True)
class Example:
    """A held-out pair and what the model completes, without and with the adapter."""

    signature: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """Held-out loss (nats a token) without and with the adapter, greatest |logit difference|, examples."""

    loss_before: float
    loss_after: float
    logit_difference: float
    examples: list[Example]


def _tokenizer(base: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    return tokenizer


def _load(base: Path, adapter: Path) -> PeftModel:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def _pad(samples: Sequence[Sample], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, is_target), both [samples, longest]; padded at the end, out of causal attention's sight."""
    tokens = [torch.from_numpy(sample.tokens).long() for sample in samples]
    targets = [torch.from_numpy(sample.is_target) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True, padding_value=fill), pad(targets, batch_first=True)


def write_tokens(base: Path, heldout: Path, file: Path) -> None:
    """The first held-out samples: `tokens` int64 [samples, an even number of tokens], and their `lengths`."""
    tokenizer = _tokenizer(base)
    samples = [encode(record, tokenizer) for record in read_jsonl(heldout)[:COMPARED_SAMPLES]]
    tokens, _ = _pad(samples, int(tokenizer.pad_token_id))
    tokens = torch.nn.functional.pad(tokens, (0, tokens.shape[1] % 2), value=int(tokenizer.pad_token_id))
    save_file({"tokens": tokens, "lengths": torch.tensor([len(sample.tokens) for sample in samples])}, file)


@torch.no_grad()
def _loss(model: PeftModel, samples: Sequence[Sample]) -> float:
    """Mean negative log-likelihood over the target tokens of all samples."""
    total, count = 0.0, 0
    for first in range(0, len(samples), BATCH):
        tokens, is_target = _pad(samples[first : first + BATCH], 0)
        logits = model(input_ids=tokens).logits[:, :-1]
        labels = tokens[:, 1:].masked_fill(~is_target[:, 1:], -100)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int(is_target[:, 1:].sum())
    return total / count


@torch.no_grad()
def _logit_difference(model: PeftModel, file: Path) -> float:
    """Greatest |difference| over the real tokens between PEFT's logits and those in `file`."""
    inputs, ours = load_file(file.with_name("tokens.safetensors")), load_file(file)["logits"]
    logits = model(input_ids=inputs["tokens"]).logits
    if ours.shape != logits.shape:
        raise ValueError(f"{file}: logits of shape {list(ours.shape)}, HF PEFT's have {list(logits.shape)}")
    real = torch.arange(logits.shape[1]) < inputs["lengths"][:, None]
    return float((ours - logits)[real].abs().max())


@torch.no_grad()
def _complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy completions, line breaks shown as such."""
    tokenizer.padding_side = "left"
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**batch, max_new_tokens=24, do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.replace("\n", "⏎") or "(nothing)" for text in texts]


def _examples(model: PeftModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> list[Example]:
    prompts = [record.prompt for record in records]
    with model.disable_adapter():
        before = _complete(model, tokenizer, prompts)
    after = _complete(model, tokenizer, prompts)
    return [
        Example(record.prompt.splitlines()[1], record.completion, old, new)
        for record, old, new in zip(records, before, after, strict=True)
    ]


def compare_with_peft(base: Path, adapter: Path, heldout: Path, logits: Path) -> Comparison:
    """Loads `adapter` with HF PEFT on `base`, and holds it against our logits and the held-out pairs."""
    tokenizer, model, records = _tokenizer(base), _load(base, adapter), read_jsonl(heldout)
    samples = [encode(record, tokenizer) for record in records]
    with model.disable_adapter():
        loss_before = _loss(model, samples)
    return Comparison(
        loss_before=loss_before,
        loss_after=_loss(model, samples),
        logit_difference=_logit_difference(model, logits),
        examples=_examples(model, tokenizer, records[:SHOWN_EXAMPLES]),
    )
