"""Real ranks for tests: forked processes that form gloo groups and divide them for Megatron on the CPU.

Forking from a parent that has imported Megatron costs a fraction of a second; spawning costs many. The parent therefore runs
torch on one thread and never starts a process group itself.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from parallel.cpu import megatron_on_cpu
from parallel.launch import divide
from parallel.sizes import ParallelSizes

torch.set_num_threads(1)

TIMEOUT_S = 30  # of a collective
ANSWER_S = 4 * TIMEOUT_S


@contextlib.contextmanager
def world(rank: int, size: int, store: str, sizes: ParallelSizes, seed: int = 1234) -> Iterator[None]:
    """This process as one rank of a gloo world that meets at the file ``store``."""
    timeout = timedelta(seconds=TIMEOUT_S)
    with megatron_on_cpu():
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
        divide(sizes, timeout_minutes=1)
        model_parallel_cuda_manual_seed(seed)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def end_writers() -> None:
    """End the process that Megatron's saving keeps: a forked rank leaves without the clean-up that would."""
    if filesystem_async._results_queue is not None:
        filesystem_async._results_queue._manager.shutdown()
        filesystem_async._results_queue = None


def _work(
    rank: int,
    size: int,
    store: str,
    sizes: ParallelSizes,
    result: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(ANSWER_S - 10)  # Where a rank is that gives no answer.
    gc.freeze()  # Megatron collects garbage when it saves: spare it what came from the parent.
    # A forked child must not look like a torchrun worker of whatever started pytest.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        with world(rank, size, store, sizes):
            value = function(rank, *args)
        result.send_bytes(pickle.dumps((True, value)))
    except BaseException:
        result.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        result.close()
        sys.stdout.flush()
        os._exit(0)


def run_ranks(size: int, function: Callable[..., Any], *args: Any, sizes: ParallelSizes | None = None) -> list[Any]:
    """Run ``function(rank, *args)`` on ``size`` ranks; the list of what each returned (tensors and plain objects).

    Raises:
        AssertionError: with the tracebacks, as soon as one rank fails; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ends, workers = [], []
        for rank in range(size):
            receive, send = context.Pipe(duplex=False)
            worker = context.Process(
                target=_work, args=(rank, size, store, sizes or ParallelSizes(tensor=size), send, function, args)
            )
            worker.start()
            send.close()
            ends.append(receive)
            workers.append(worker)
        try:
            return _collect(ends)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _collect(ends: list[Connection]) -> list[Any]:
    values: list[Any] = [None] * len(ends)
    waiting = {end: rank for rank, end in enumerate(ends)}
    while waiting:
        ready = wait(list(waiting), timeout=ANSWER_S)
        assert ready, f"ranks {sorted(waiting.values())} gave no answer in {ANSWER_S} s"
        for end in ready:
            rank = waiting.pop(end)  # type: ignore[index]
            try:
                good, value = pickle.loads(end.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert good, f"rank {rank}:\n{value}"
            values[rank] = value
    return values
