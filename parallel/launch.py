"""Start-up and shutdown of a Megatron process from the environment that torchrun (or nothing) gives."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from parallel.attempt import shares_store, store_of_attempt
from parallel.cpu import megatron_on_cpu
from parallel.sizes import ParallelSizes


def environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun's variables say it; (0, 1, 0) without them.

    Raises:
        ValueError: one of them is missing or no number.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in os.environ]
    if not given:
        return 0, 1, 0
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(given)} set but {', '.join(missing)} not: start with torchrun, or unset them all")
    for name in names:
        if not os.environ[name].isdecimal():
            raise ValueError(
                f"{name} is {os.environ[name]!r}, which is no number: start with torchrun, or unset {', '.join(names)}"
            )
    rank, world, local = (int(os.environ[name]) for name in names)
    return rank, world, local


def _device_and_backend(device: str | None, backend: str | None) -> tuple[str, str]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = backend or ("nccl" if device == "cuda" else "gloo")
    if device not in ("cuda", "cpu"):
        raise ValueError(f'device is {device!r}; it can be "cuda" or "cpu"')
    if backend not in (("nccl", "gloo") if device == "cuda" else ("gloo",)):
        raise ValueError(f'backend is {backend!r}; on "cpu" it can be "gloo", on "cuda" also "nccl"')
    return device, backend


def _start_process_group(rank: int, world: int, local_rank: int, device: str, backend: str, timeout: timedelta) -> None:
    if device == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError('device is "cuda", but torch sees no GPU; use "cpu"')
        if backend == "nccl" and local_rank >= count:
            raise ValueError(
                f"local rank {local_rank} has no GPU: this host has {count}; start at most {count} ranks on it"
            )
        torch.cuda.set_device(local_rank % count)
    if world == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif shares_store():
        dist.init_process_group(
            backend, store=store_of_attempt(rank, world, timeout), rank=rank, world_size=world, timeout=timeout
        )
    else:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=timeout)


@contextlib.contextmanager
def distributed(
    sizes: ParallelSizes,
    *,
    seed: int = 1234,
    device: str | None = None,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
) -> Iterator[torch.device]:
    """Join the process groups that the environment names and divide them for Megatron; leave them at the end.

    Args:
        sizes: how the world is divided.
        seed: of Megatron's random states (tensor-parallel ranks get their own).
        device: "cuda" or "cpu"; by default CUDA where a GPU is seen. On "cpu", Megatron's CUDA calls are redirected
            (:func:`parallel.cpu.megatron_on_cpu`) until the context ends.
        backend: "nccl" or "gloo"; by default NCCL on CUDA and gloo on the CPU. Several ranks on one GPU need gloo.
        timeout_minutes: after which a collective whose peers are gone raises instead of waiting.

    Yields:
        The device on which the model belongs.

    Raises:
        ValueError: the world size does not fit ``sizes``, torchrun's variables are incomplete or no numbers, the device or backend
            is unknown, or a rank has no GPU. It is raised before any connection is made; the first three on every rank alike.
    """
    rank, world, local_rank = environment()
    sizes.data(world)
    device, backend = _device_and_backend(device, backend)
    timeout = timedelta(minutes=timeout_minutes)
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(megatron_on_cpu())
        _start_process_group(rank, world, local_rank, device, backend, timeout)
        divide(sizes, timeout_minutes=timeout_minutes)
        model_parallel_cuda_manual_seed(seed)
        yield torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        # Only a clean end takes the groups down: after an exception the peers may be gone, and a group that waits for them
        # would hide the cause. The launcher ends the other ranks.
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def divide(sizes: ParallelSizes, *, timeout_minutes: float = 10.0) -> None:
    """Make Megatron's process groups, each with that timeout, in a default group that exists already."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline,
        distributed_timeout_minutes=timeout_minutes,
    )
