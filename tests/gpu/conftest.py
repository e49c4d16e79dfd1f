"""Before CUDA starts: float32 products in float32, so that errors are the code's. One world of one rank for all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine asks for TF32, whatever torch is told.


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> Iterator[None]:
    """This process as a world of its own."""
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a GPU with Transformer Engine; tests/ without it needs none", returncode=2)
    from parallel.launch import distributed
    from parallel.sizes import ParallelSizes

    with distributed(ParallelSizes()):
        yield


def leave_the_world() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture
def no_world() -> Iterator[None]:
    """The trainer forms a world of its own: this process leaves the tests' one, and forms it anew."""
    from parallel.launch import distributed
    from parallel.sizes import ParallelSizes

    leave_the_world()
    yield
    leave_the_world()  # If the trainer has failed.
    distributed(ParallelSizes()).__enter__()  # Which the fixture of the whole session ends.
