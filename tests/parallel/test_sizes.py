"""Sizes that fit and sizes that do not."""

from typing import Any

import pytest

from parallel.sizes import ParallelSizes


@pytest.mark.parametrize(
    ("sizes", "world", "data"),
    [
        (ParallelSizes(), 1, 1),
        (ParallelSizes(), 3, 3),
        (ParallelSizes(tensor=2, pipeline=2), 4, 1),
        (ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True), 12, 3),
        (ParallelSizes(pipeline=3, virtual_pipeline=2), 6, 2),
    ],
)
def test_data_parallelism_takes_what_is_left(sizes: ParallelSizes, world: int, data: int) -> None:
    assert sizes.data(world) == data


@pytest.mark.parametrize("world", [1, 2, 6])
def test_a_world_that_does_not_fit_is_told_what_would(world: int) -> None:
    with pytest.raises(ValueError, match=rf"world size {world} .*tensor 2 x pipeline 2 = 4 ranks .*multiple of 4"):
        ParallelSizes(tensor=2, pipeline=2).data(world)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 0}, "tensor parallel size is 0"),
        ({"pipeline": -1}, "pipeline parallel size is -1"),
        ({"pipeline": 2, "virtual_pipeline": 1}, "virtual pipeline size is 1"),
        ({"virtual_pipeline": 2}, "needs pipeline parallel size 2"),
        ({"sequence_parallel": True}, "needs tensor parallel size 2"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelSizes(**fields)
