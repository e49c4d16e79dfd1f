"""One call of a model chunk on a micro batch, as the schedules make it."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from mlora.dropout import MicroBatch, set_micro_batch


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
