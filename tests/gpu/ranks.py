"""Ranks on GPUs for tests: spawned processes, a GPU each, under NCCL.

NCCL lets no two ranks share a GPU, and gloo ends with a segmentation fault in the coalesced collectives of Megatron's optimizer.
"""

import faulthandler
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from parallel.launch import divide
from parallel.sizes import ParallelSizes


def _work(
    rank: int, size: int, folder: str, sizes: ParallelSizes, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(os.path.join(folder, "store"), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    divide(sizes, timeout_minutes=2)
    model_parallel_cuda_manual_seed(1234)
    value = function(rank, *args)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(value))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def run_gpu_ranks(size: int, function: Callable[..., Any], *args: Any, sizes: ParallelSizes) -> list[Any]:
    """Run ``function(rank, *args)`` on ``size`` ranks; the list of what each returned (CPU tensors and plain objects).

    The test is skipped where there are fewer GPUs.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the first traceback, when a rank fails.
    """
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, args=(size, folder, sizes, function, args), nprocs=size)  # type: ignore[no-untyped-call]
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(size)]
