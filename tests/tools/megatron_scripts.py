"""Megatron's training scripts on the CPU, in forked ranks: real parser, data sets, schedules, checkpoints, logging and evaluation.

Only what asks for a GPU is answered for the CPU. Wheels before 0.17 have no ``megatron.training``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, PersistentAsyncCaller
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from parallel.optimizer import allocate_adam_state, saveable
from parallel.optimizer import load as load_optimizer
from parallel.sizes import ParallelSizes
from tests.ranks import end_writers, run_ranks

# A small gated GPT on invented data; float32, on Megatron's local layers.
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --swiglu --disable-bias-linear
    --seq-length 32 --max-position-embeddings 32 --vocab-size 127
    --make-vocab-size-divisible-by 32 --tokenizer-type NullTokenizer --mock-data --split 90,5,5 --transformer-impl local
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2
"""
STEPS = """
    --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-2 --weight-decay 0 --calculate-per-token-loss
    --log-interval 1 --eval-interval 100 --eval-iters 1 --save-interval 2 --distributed-backend gloo
"""


@contextlib.contextmanager
def training_on_cpu(argv: Sequence[str]) -> Iterator[None]:
    """This rank as a process that was started with these arguments."""
    from megatron.training import arguments, initialize, training

    ranks = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    without_cuda = partial(training.initialize_megatron, allow_no_cuda=True)
    with (
        mock.patch.dict(os.environ, ranks),
        mock.patch("sys.argv", ["script", *argv]),
        mock.patch.object(training, "initialize_megatron", without_cuda),
        mock.patch.object(arguments, "get_device_arch_version", lambda: 10),
        mock.patch.object(torch._dynamo.config, "disable", True),
        mock.patch.object(training.sys, "exit", _leave),
        mock.patch.object(training, "get_megatron_optimizer", _ready(training.get_megatron_optimizer)),
        mock.patch.object(initialize, "init_persistent_async_worker", _fork_writer),
        mock.patch.object(PersistentAsyncCaller, "async_loop", staticmethod(_write_on_cpu)),
    ):
        try:
            yield
        finally:
            if AsyncCallsQueue._persistent_caller is not None:
                AsyncCallsQueue._persistent_caller.close()
            end_writers()


_write = PersistentAsyncCaller.async_loop


def _write_on_cpu(*args: Any, **kwargs: Any) -> None:
    """The process that writes checkpoints asynchronously; it asks for a GPU and does not use it."""
    with mock.patch.object(torch.cuda, "device_count", lambda: 1), mock.patch.object(torch.cuda, "set_device"):
        _write(*args, **kwargs)


def _fork_writer(rank: int, mp_mode: str) -> None:
    """A forked process has what is answered for the CPU."""
    from megatron.training import async_utils

    async_utils.init_persistent_async_worker(rank, "fork")


def _ready(make: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's Adam stands for Transformer Engine's, which the distributed optimizer can save and load without help."""

    def made(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        if isinstance(optimizer.chained_optimizers[0], DistributedOptimizer):
            allocate_adam_state(optimizer)
            optimizer.sharded_state_dict = _when_saveable(optimizer, optimizer.sharded_state_dict)
            optimizer.load_state_dict = partial(load_optimizer, optimizer)
        return optimizer

    return made


def _when_saveable(optimizer: Any, sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    def state(*args: Any, **kwargs: Any) -> Any:
        with saveable(optimizer):
            return sharded_state_dict(*args, **kwargs)

    return state


class _Left(Exception):
    """``--exit-interval`` ended the script."""


def _leave(code: int | None = None) -> None:
    raise _Left if not code else SystemExit(code)


def _script(rank: int, main: Callable[[], Any], argv: Sequence[str]) -> dict[int, tuple[float | None, float]]:
    from megatron.training import training

    seen: list[tuple[int, dict[str, float], float]] = []
    log = training.training_log

    def log_and_keep(losses: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        by_name = dict(zip(("total", "lr", "iteration", "scale", "report", "skipped", "grad_norm"), args, strict=False))
        seen.append((by_name["iteration"], {k: float(v) for k, v in losses.items()}, by_name["grad_norm"]))
        return log(losses, *args, **kwargs)

    with training_on_cpu(argv), mock.patch.object(training, "training_log", log_and_keep):
        with contextlib.suppress(_Left):
            main()
        return {iteration: (losses.get("lm loss"), grad_norm) for iteration, losses, grad_norm in seen}


def run_script(
    main: Callable[[], Any],
    *argv: str,
    size: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int | None = None,
) -> list[dict[int, tuple[float | None, float]]]:
    """``main`` as ``size`` ranks; of each its losses and gradient norms by iteration."""
    sizes = ParallelSizes(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    layout = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
    if virtual:
        layout += ["--num-virtual-stages-per-pipeline-rank", str(virtual)]
    return run_ranks(size, _script, main, [*MODEL.split(), *STEPS.split(), *layout, *argv], sizes=sizes)
