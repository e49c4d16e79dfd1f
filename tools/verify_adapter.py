"""Is an adapter the same model here as in Hugging Face? Logits at a parallel layout against PEFT's, or against a merged model's.

See `--help`. Our side runs on every rank, the other one on rank 0 alone.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mlora_tools.arguments import Layout
from mlora_tools.failure import one_line_errors
from mlora_tools.messages import own_rank, set_up_messages
from mlora_tools.options import Help, UsageError, parse

if TYPE_CHECKING:
    import torch

    from mlora.conversion import AdapterState
    from mlora.pretrained import Pretrained

logger = logging.getLogger("mlora_tools.verify_adapter")

DESCRIPTION = """Compare an adapter's logits at a parallel layout with those of Hugging Face PEFT, or of a merged model, in float32.

  one process    python tools/verify_adapter.py --base M --adapter A --prompts "The capital of France is"
  several ranks  torchrun --nproc-per-node 4 tools/verify_adapter.py ... --tensor-model-parallel-size 2

Exit code 0 if they agree and the adapter does something; 1 if not, or if something cannot be read; 2 for a wrong command line."""
SHOWN = 40  # characters of a prompt


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """input"""

    base: Annotated[Path, Help("base model: a Hugging Face config, tokenizer and safetensors", "DIR")]
    adapter: Annotated[Path, Help("native checkpoint (or a folder of them: the newest) or PEFT directory")]
    prompts: Annotated[tuple[str, ...], Help("texts, or files with one on each line", "TEXT|FILE")]
    merged: Annotated[
        Path | None, Help("compare with this model, which the adapter was merged into, in place of PEFT", "DIR")
    ] = None
    tolerance: Annotated[
        float, Help("greatest difference of a logit, as a share of the greatest change that the adapter makes to one")
    ] = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance} must be above 0 and below 1")

    def texts(self) -> list[str]:
        """The prompts.

        Raises:
            UsageError: there is none, or an empty one.
        """
        found: list[str] = []
        for prompt in self.prompts:
            if os.path.isfile(prompt):
                lines = Path(prompt).read_text(encoding="utf-8").splitlines()
                found += [line for line in lines if line.strip()]
            else:
                found.append(prompt)
        if not found or not all(found):
            raise UsageError(f"--prompts {' '.join(map(repr, self.prompts))} holds no text")
        return found


@dataclass(frozen=True)
class Batch:
    """The prompts as tokens, padded at the end, out of causal attention's sight.

    Attributes:
        tokens: int64 [prompts, longest].
        lengths: of each prompt.
    """

    tokens: torch.Tensor
    lengths: list[int]

    @classmethod
    def of(cls, texts: Sequence[str], base: Path, multiple: int) -> Batch:
        """Tokenize with the base's tokenizer; the length becomes a multiple of ``multiple``."""
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        rows = [torch.tensor(tokenizer(text).input_ids, dtype=torch.int64) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not len(row):
                raise ValueError(f"{base}: its tokenizer makes no token of {text!r}")
        longest = max(map(len, rows))
        longest += -longest % multiple
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row
        return cls(tokens, [len(row) for row in rows])


@dataclass(frozen=True)
class Row:
    """What was found for a prompt: the greatest |ours - theirs| and the greatest |theirs - base| of a logit."""

    text: str
    length: int
    difference: float
    effect: float


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    rank = own_rank()
    set_up_messages(rank)
    with one_line_errors(rank) as outcome:
        (inputs, layout), _ = parse((Inputs, Layout), argv, DESCRIPTION)
        verify(inputs, layout, rank)
    return outcome.code


def verify(inputs: Inputs, layout: Layout, rank: int) -> None:
    """Compute both sides and compare them on rank 0.

    Raises:
        ValueError: they differ, or the adapter does nothing.
    """
    from mlora.conversion import open_adapter
    from mlora.pretrained import Pretrained

    texts, base = inputs.texts(), Pretrained.open(inputs.base)
    state = open_adapter(inputs.adapter)
    sizes = layout.sizes(base.architecture.transformer["num_layers"])
    batch = Batch.of(texts, inputs.base, sizes.tensor if sizes.sequence_parallel else 1)
    logits, device = our_logits(state, base, batch, layout)
    if rank:
        return
    theirs = "the merged model" if inputs.merged else "PEFT"
    logger.info("computing the logits of %s", theirs)
    pairs = (
        merged_logits(inputs.base, inputs.merged, batch, device)
        if inputs.merged
        else peft_logits(state, base, batch, device)
    )
    rows = []
    for number, (adapted, plain) in enumerate(pairs):
        if adapted.shape != logits[number].shape:
            raise ValueError(f"{theirs} has logits {list(adapted.shape)}, here they are {list(logits[number].shape)}")
        real = slice(batch.lengths[number])
        difference = (logits[number] - adapted)[real].abs().max().item()
        rows.append(Row(texts[number], batch.lengths[number], difference, (adapted - plain)[real].abs().max().item()))
    print_rows(rows, theirs)
    judge(rows, theirs, inputs.tolerance)


def our_logits(
    state: AdapterState, base: Pretrained, batch: Batch, layout: Layout
) -> tuple[torch.Tensor, torch.device]:
    """(float32 [prompts, longest, vocabulary] on the CPU, this rank's device) of the Megatron model at the layout."""
    from mlora.logits import whole_logits
    from mlora.model import build_model
    from parallel.launch import distributed

    sizes = layout.sizes(base.architecture.transformer["num_layers"])
    timeout = layout.distributed_timeout_minutes
    with distributed(sizes, backend=layout.distributed_backend, timeout_minutes=timeout) as device:
        chunks = build_model(base, sizes, seq_length=batch.tokens.shape[1])
        attach(state, base, chunks)
        logits = whole_logits(chunks, batch.tokens, base.architecture.vocab_size).float().cpu()
    return logits, device


def attach(state: AdapterState, base: Pretrained, chunks: list[torch.nn.Module]) -> None:
    """Put the adapter, whatever its format, on this rank's chunks, in float32."""
    import torch

    import mlora
    from mlora.saved import SavedAdapter

    saved = SavedAdapter.open(state.source, base)
    mlora.apply(chunks, replace(saved.config, adapter_dtype=torch.float32), family=base.family)
    saved.load(chunks)


def peft_logits(
    state: AdapterState, base: Pretrained, batch: Batch, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each prompt, PEFT's logits with the adapter and without it, [longest, vocabulary]."""
    from peft import PeftModel

    with peft_directory(state, base) as folder:
        model = PeftModel.from_pretrained(hugging_face(base.path), str(folder)).eval().to(device)
    for row in batch.tokens:
        adapted = run(model, row)
        with model.disable_adapter():
            yield adapted, run(model, row)


@contextmanager
def peft_directory(state: AdapterState, base: Pretrained) -> Iterator[Path]:
    """The adapter as PEFT reads it: its own directory, or one made of the native checkpoint for a while."""
    from mlora.conversion.peft_writer import write_peft
    from mlora.conversion.profiles import peft_adapter

    if state.format == "peft":
        yield state.source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        write_peft(peft_adapter(state, "peft", base=base), path)
        yield path


def merged_logits(
    base: Path, merged: Path, batch: Batch, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each prompt, the logits of the merged model and of its base, [longest, vocabulary]; one model at a time."""
    model = hugging_face(base).eval().to(device)
    plain = [run(model, row) for row in batch.tokens]
    del model
    model = hugging_face(merged).eval().to(device)
    for row, logits in zip(batch.tokens, plain, strict=True):
        yield run(model, row), logits


def hugging_face(path: Path) -> Any:
    """The model in float32, with attention that leaves nothing out: other implementations ignore Gemma 2's cap on scores."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence, [tokens, vocabulary] on the CPU."""
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens[None].to(model.device)).logits[0].float().cpu()
    return logits


def print_rows(rows: Sequence[Row], theirs: str) -> None:
    """A table on stdout."""
    print(f"{'tokens':>7}  {'difference':>10}  {'effect':>10}  prompt")
    for row in rows:
        shown = row.text if len(row.text) <= SHOWN else row.text[: SHOWN - 3] + "..."
        print(f"{row.length:>7}  {row.difference:>10.3g}  {row.effect:>10.3g}  {shown!r}")
    print(f"difference: greatest |here - {theirs}| of a logit; effect: greatest |{theirs} - base|")


def judge(rows: Sequence[Row], theirs: str, tolerance: float) -> None:
    """Raises ValueError if the logits differ or are not finite, or if the adapter does nothing."""
    for row in rows:
        if not math.isfinite(row.difference + row.effect):
            raise ValueError(f"the logits of {row.text!r} are not finite")
    difference, effect = max(row.difference for row in rows), max(row.effect for row in rows)
    if not effect:
        raise ValueError(f"the adapter does nothing in {theirs}: its logits are the base's")
    if difference > tolerance * effect:
        raise ValueError(
            f"the logits differ from those of {theirs} by {difference:.3g}, which is {difference / effect:.3g} of what the adapter "
            f"changes; the tolerance is {tolerance:g}"
        )
    print(f"they agree: {difference / effect:.2g} of what the adapter changes, tolerance {tolerance:g}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
