"""The model's logits for given tokens, whole, whatever the layout."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from mlora.forward import evaluating, run_schedule


@torch.no_grad()
def whole_logits(
    chunks: Sequence[torch.nn.Module], tokens: torch.Tensor, vocab_size: int, micro_batch_size: int = 1
) -> torch.Tensor:
    """Run the model forward only, ``micro_batch_size`` sequences at a time, in evaluation mode.

    Every rank calls it with the same tokens, also every data-parallel one.

    Args:
        chunks: this rank's chunks.
        tokens: int64 [n, s]; attention is causal. With sequence parallelism s must divide by the tensor-parallel size.
        vocab_size: logits to keep; those of the padded vocabulary follow them.
        micro_batch_size: divides n.

    Returns:
        [n, s, vocab_size] in the model's dtype, on its device and on every rank.

    Raises:
        ValueError: ``micro_batch_size`` does not divide n.
    """
    rows, length = tokens.shape
    device = torch.cuda.current_device()
    if rows % micro_batch_size:
        raise ValueError(f"{rows} sequences do not divide by a micro batch size of {micro_batch_size}")
    batches = list(torch.split(tokens.to(device), micro_batch_size))
    with evaluating(chunks):
        found = run_schedule(
            _forward_step, chunks, batches, (micro_batch_size, length), forward_only=True, collect_non_loss_data=True
        )
    config: Any = chunks[0].config
    if found:
        logits = torch.cat([part[..., :vocab_size] for part in found]).contiguous()
    else:
        logits = torch.empty(rows, length, vocab_size, dtype=config.params_dtype, device=device)
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return logits


def _forward_step(data: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(data)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return model(tokens, positions, None), _gathered


def _gathered(logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    """[b, s, padded/t] -> [b, s, padded]."""
    whole: torch.Tensor = gather_from_tensor_model_parallel_region(logits)
    return whole
