"""Log-probabilities of given labels under the model as it is: with an adapter, another one, or none."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mlora.forward import evaluating, on_device, run_model, run_schedule
from parallel.stages import as_chunks

Model = torch.nn.Module | Sequence[torch.nn.Module]


@torch.no_grad()
def log_probs(model: Model, micro_batches: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """Of every label: forward only, by Megatron's schedule, in evaluation mode (no dropout). Every rank calls it.

    Args:
        model: this rank's chunks.
        micro_batches: of this data-parallel rank, as :meth:`mlora.train.Trainer.step` takes them.

    Returns:
        Float32 [b, s] for each micro batch on ranks of the last pipeline stage, which hold the losses; nothing on the others.
    """
    chunks = as_chunks(model)
    if not micro_batches:
        return []
    shape = micro_batches[0]["tokens"].shape
    with evaluating(chunks):
        return run_schedule(_forward_step, chunks, micro_batches, shape, forward_only=True, collect_non_loss_data=True)


def on_every_stage(found: Sequence[torch.Tensor], micro_batches: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """What :func:`log_probs` gave to the last stage, on every rank of the pipeline. One collective of the pipeline group."""
    if not micro_batches:
        return []
    group = parallel_state.get_pipeline_model_parallel_group()
    shapes = [batch["tokens"].shape for batch in micro_batches]
    if found:
        flat = torch.cat([part.flatten() for part in found])
    else:
        count = sum(shape.numel() for shape in shapes)
        flat = torch.empty(count, dtype=torch.float32, device=torch.cuda.current_device())
    if group.size() > 1:
        dist.broadcast(flat, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _forward_step(data: Iterator[Mapping[str, Any]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    return run_model(model, on_device(next(data))), _log_probs


def _log_probs(losses: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    return -losses.float()
