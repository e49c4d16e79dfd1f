"""Before CUDA starts: float32 products in float32, so that errors are the code's. One world of one rank for all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine asks for TF32, whatever torch is told.


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> Iterator[None]:
    """This process as a world of its own."""
    from parallel.launch import distributed
    from parallel.sizes import ParallelSizes

    with distributed(ParallelSizes()):
        yield
