"""Who the ranks of a run are, and what each sends in one step: ``ranks.json``."""

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mlora_tools.output import write_json
from parallel.together import on_rank_zero
from parallel.traffic import Traffic


def write_ranks(path: Path, device: torch.device, iteration: int, traffic: Traffic) -> None:
    """Write every rank's host, device, place in the groups and collectives of one step. A collective of the world.

    Args:
        path: of the file.
        device: this rank's.
        iteration: of the step.
        traffic: what this rank sent in it.
    """
    here = {
        "rank": dist.get_rank(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "collectives": [dataclasses.asdict(flow) for flow in traffic.flows()],
    }
    ranks: list[dict[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, here)
    on_rank_zero(lambda: write_json(path, {"iteration": iteration, "ranks": ranks}))
