"""Megatron's schedules over micro batches, and one call of a model chunk on a micro batch, as they make it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from mlora.dropout import MicroBatch, set_micro_batch


def run_schedule(
    step: Callable[..., Any],
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Any],
    shape: tuple[int, int],
    **options: bool,
) -> list[Any]:
    """Run the schedule of this layout; what ``step`` makes of each micro batch, on ranks of the last stage. Every rank calls it.

    Args:
        step: Megatron's forward step, which takes an iterator over the micro batches and a chunk.
        chunks: this rank's, with or without DDP; each of them gets all micro batches.
        shape: (rows, tokens of a row) of every micro batch.
        options: of Megatron's schedules: ``forward_only``, ``collect_non_loss_data``.
    """
    iterators = [iter(micro_batches) for _ in chunks]
    is_interleaved = len(chunks) > 1
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if is_interleaved else iterators[0],
        model=list(chunks) if is_interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=shape[1],
        micro_batch_size=shape[0],
        **options,
    )
    return list(found)


@contextlib.contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """No dropout while the context lasts, whatever ends it."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The micro batch with its tensors on the current device."""
    device = torch.cuda.current_device()
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def run_model(model: torch.nn.Module, batch: Mapping[str, Any], iteration: int = 0) -> torch.Tensor:
    """What the chunk makes of a micro batch on its device; the last stage's gives the labels' losses [b, s].

    Args:
        batch: as :meth:`mlora.train.Trainer.step` takes it.
        iteration: of the optimizer, from 0; keys the dropout masks.
    """
    set_micro_batch(MicroBatch(iteration, batch["first_row"], batch.get("row_length")))
    output: torch.Tensor = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        packed_seq_params=_packed_samples(batch),
    )
    return output


def _packed_samples(batch: Mapping[str, Any]) -> PackedSeqParams | None:
    """Where the samples of one joined sequence begin and end, for Transformer Engine's attention."""
    if "cu_seqlens" not in batch:
        return None
    ends, longest = batch["cu_seqlens"], batch["max_seqlen"]
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
