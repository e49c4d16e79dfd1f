"""Starting from torchrun's environment or without one, what is refused before it starts, and peers that do not come."""

import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from parallel.launch import distributed
from parallel.sizes import ParallelSizes
from tests.ports import free_port

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def torchrun(rank: int, world: int, port: int = 0) -> dict[str, str]:
    """What torchrun tells a process on the only host."""
    values = (rank, world, rank, "127.0.0.1", port)
    return dict(zip(NAMES, map(str, values), strict=True))


def in_processes(function: Callable[..., Any], *environments: dict[str, str]) -> list[tuple[Any, float]]:
    """(what ``function()`` returned or raised, seconds) in a process of its own for each environment."""
    context = multiprocessing.get_context("fork")
    ends = []
    for environment in environments:
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(function, environment, send))
        worker.start()
        ends.append((worker, receive))
        send.close()
    found = []
    for worker, end in ends:
        assert end.poll(60), "a process gave no answer in 60 s"
        found.append(pickle.loads(end.recv_bytes()))
        worker.join()
    return found


def _work(function: Callable[..., Any], environment: dict[str, str], result: Any) -> None:
    for name in NAMES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    began = time.monotonic()
    try:
        value = function()
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
    result.send_bytes(pickle.dumps((value, time.monotonic() - began)))
    os._exit(0)


def alone() -> dict[str, Any]:
    before = torch.cuda.current_device
    with distributed(ParallelSizes(), seed=7) as device:
        inside = {
            "device": device,
            "world": dist.get_world_size(),
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "redirected": torch.zeros(1, device="cuda").device,
            "seeded": "model-parallel-rng" in get_cuda_rng_tracker().get_states(),
        }
    return inside | {
        "ended": not dist.is_initialized() and not parallel_state.model_parallel_is_initialized(),
        "restored": torch.cuda.current_device is before,
    }


@pytest.mark.parametrize("given", [(), ("RANK", "WORLD_SIZE", "LOCAL_RANK"), NAMES])
def test_one_process_with_and_without_torchrun(given: tuple[str, ...]) -> None:
    environment = {name: value for name, value in torchrun(0, 1, free_port()).items() if name in given}
    [(found, _)] = in_processes(alone, environment)
    cpu = torch.device("cpu")
    assert found == {
        "device": cpu, "world": 1, "tensor": 1, "redirected": cpu, "seeded": True, "ended": True, "restored": True,
    }  # fmt: skip


def divided() -> dict[str, Any]:
    with distributed(ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2)):
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return {
            "total": int(total),
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
            "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
            "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        }


def test_the_world_is_divided_as_the_sizes_say() -> None:
    port = free_port()
    found = [value for value, _ in in_processes(divided, *(torchrun(rank, 4, port) for rank in range(4)))]
    assert found == [
        {"total": rank % 2 * 2 + 2, "tensor": rank % 2, "pipeline": rank // 2, "virtual": 2} for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("environment", "sizes", "choice", "message"),
    [
        ({"RANK": "0"}, {}, {}, "RANK set but WORLD_SIZE, LOCAL_RANK not: start with torchrun, or unset them all"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, {}, "RANK, WORLD_SIZE set but LOCAL_RANK not"),
        (
            torchrun(0, 1) | {"RANK": ""},
            {},
            {},
            "RANK is '', which is no number: start with torchrun, or unset RANK, WORLD",
        ),
        (torchrun(1, 3), {"tensor": 2}, {}, "world size 3 does not fit tensor 2 x pipeline 1"),
        ({}, {"tensor": 2, "pipeline": 2}, {}, "world size 1 does not fit tensor 2 x pipeline 2 = 4"),
        ({}, {}, {"device": "gpu"}, 'device is \'gpu\'; it can be "cuda" or "cpu"'),
        ({}, {}, {"device": "cpu", "backend": "nccl"}, 'backend is \'nccl\'; on "cpu" it can be "gloo"'),
        ({}, {}, {"device": "cuda", "backend": "mpi"}, "backend is 'mpi'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_connection(
    environment: dict[str, str],
    sizes: dict[str, int],
    choice: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message)):
        enter(ParallelSizes(**sizes), **choice, timeout_minutes=0.05)  # type: ignore[arg-type]
    assert time.monotonic() - began < 1 and not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without GPU")
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_cuda_without_a_gpu_is_refused(backend: str) -> None:
    [(found, _)] = in_processes(lambda: enter(device="cuda", backend=backend), {})
    assert found == 'ValueError: device is "cuda", but torch sees no GPU; use "cpu"'


def enter(sizes: ParallelSizes | None = None, **choice: Any) -> None:
    with distributed(sizes or ParallelSizes(), **choice):
        pass


def test_a_peer_that_never_starts_is_not_waited_for_longer_than_the_limit() -> None:
    [(found, seconds)] = in_processes(lambda: enter(timeout_minutes=2 / 60), torchrun(0, 2, free_port()))
    assert "Error" in found and 1 < seconds < 20, (found, seconds)


def one_sums(peer_sleeps: float) -> None:
    with distributed(ParallelSizes(tensor=2), timeout_minutes=2 / 60):
        if dist.get_rank() == 1:
            time.sleep(peer_sleeps)
            os._exit(0)
        dist.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())


@pytest.mark.parametrize("peer_sleeps", [0.0, 9.0])
def test_a_peer_that_dies_or_hangs_raises_within_the_limit(peer_sleeps: float) -> None:
    port = free_port()
    environments = [torchrun(rank, 2, port) for rank in range(2)]
    context = multiprocessing.get_context("fork")
    _, discard = context.Pipe(duplex=False)
    peer = context.Process(target=_work, args=(lambda: one_sums(peer_sleeps), environments[1], discard))
    peer.start()
    [(found, seconds)] = in_processes(lambda: one_sums(peer_sleeps), environments[0])
    peer.kill()
    peer.join()
    assert found is not None and found.startswith("RuntimeError") and seconds < 7, (found, seconds)


def fails_alone() -> None:
    with distributed(ParallelSizes(tensor=2), timeout_minutes=1):
        if dist.get_rank() == 0:
            raise KeyError("the cause")
        dist.all_reduce(torch.ones(1))


def test_an_error_on_one_rank_comes_out_at_once() -> None:
    port = free_port()
    cause, other = in_processes(fails_alone, *(torchrun(rank, 2, port) for rank in range(2)))
    assert cause[0] == "KeyError: 'the cause'" and cause[1] < 10
    # Its peer is gone, perhaps before all groups were formed.
    assert other[0].startswith(("RuntimeError", "DistNetworkError")) and other[1] < 20
