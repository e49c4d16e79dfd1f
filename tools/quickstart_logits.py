"""The quickstart's logits on our side: base model and newest checkpoint at a parallel layout, started anew, into one file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mlora_tools.arguments import Layout
from mlora_tools.failure import one_line_errors
from mlora_tools.imports import uncollected
from mlora_tools.messages import own_rank, set_up_messages
from mlora_tools.options import Help, parse

DESCRIPTION = "Write the logits of a base model with the adapter of its newest checkpoint. Start with torchrun."

logger = logging.getLogger("mlora_tools.quickstart_logits")


@dataclass(frozen=True, kw_only=True)
class Files:
    """input and output"""

    base: Annotated[Path, Help("directory of the base model", "DIR")]
    checkpoints: Annotated[Path, Help("folder of checkpoints", "DIR")]
    tokens: Annotated[Path, Help("safetensors with `tokens`, int64 [samples, n]", "FILE")]
    output: Annotated[Path, Help("safetensors to write, with `logits`, float32 [samples, n, vocabulary]", "FILE")]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    rank = own_rank()
    set_up_messages(rank)
    with one_line_errors(rank) as outcome:
        (files, layout), _ = parse((Files, Layout), argv, DESCRIPTION)
        write_logits(files, layout)
    return outcome.code


def write_logits(files: Files, layout: Layout) -> None:
    """Build, load, run, and write on rank 0."""
    with uncollected():
        import torch.distributed as dist
        from safetensors.torch import load_file, save_file

        import mlora
        from mlora.description import latest_checkpoint
        from mlora.logits import whole_logits
        from mlora.model import build_model
        from mlora.pretrained import Pretrained
        from parallel.launch import distributed
        from parallel.together import on_rank_zero

    base = Pretrained.open(files.base)
    checkpoint = latest_checkpoint(files.checkpoints)
    tokens = load_file(files.tokens)["tokens"]
    sizes = layout.sizes(base.architecture.transformer["num_layers"])
    with distributed(sizes, backend=layout.distributed_backend, timeout_minutes=layout.distributed_timeout_minutes):
        chunks = build_model(base, sizes, seq_length=tokens.shape[1])
        mlora.load_adapter(chunks, checkpoint, base=base)
        logits = whole_logits(chunks, tokens, base.architecture.vocab_size)
        on_rank_zero(lambda: save_file({"logits": logits.float().cpu()}, files.output))
        if dist.get_rank() == 0:
            logger.info("logits of %s, float32 %s", checkpoint, list(logits.shape))


if __name__ == "__main__":
    sys.exit(main())
