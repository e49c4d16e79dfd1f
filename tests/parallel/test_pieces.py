"""Whole tensors from pieces: cut, replicated and uneven ones, over stages; and what does not make up a whole."""

import pytest
import torch
from megatron.core import parallel_state

from parallel.ledger import Ledger
from parallel.pieces import Piece, whole_tensors
from parallel.sizes import ParallelSizes
from tests.gpt import values
from tests.ranks import run_ranks


def piece(name: str, shape: tuple[int, ...], first: int, count: int, column: int = 0, columns: int = 0) -> Piece:
    """Rows (and, if ``columns``, columns) of the tensor that ``name`` stands for."""
    whole = values(name, *shape).float()
    part = whole[first : first + count]
    offset: tuple[int, ...] = (first,)
    if len(shape) == 2:
        columns = columns or shape[1]
        part, offset = part[:, column : column + columns], (first, column)
    return Piece(name, shape, offset, tuple(part.shape), torch.float32, lambda: part)


def pieces_of(stage: int, rank: int) -> list[Piece]:
    """Of two ranks: cut evenly and unevenly, by rows and columns; whole on one; the same on both, also of a single row."""
    name = f"stage{stage}"
    held = [
        piece(f"{name}.rows", (6, 5), 3 * rank, 3),
        piece(f"{name}.columns", (4, 6), 0, 4, 3 * rank, 3),
        piece(f"{name}.both", (7, 3), 0, 7),
        piece(f"{name}.vector", (5,), 0, 5),
        piece(f"{name}.single", (1, 4), 0, 1),
        piece(f"{name}.uneven", (5, 2), *((0, 4) if rank == 0 else (4, 1))),
    ]
    return [*held, piece(f"{name}.one", (3, 2), 0, 3)] if rank == 1 else held


def exchanged(rank: int, bucket_bytes: int) -> tuple[dict[str, torch.Tensor], int]:
    here = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    stream = whole_tensors(pieces_of(*here), bucket_bytes)
    with Ledger() as ledger:
        found = {name: tensor.clone() for name, tensor in stream}
    return found, len(ledger.select(kind="broadcast"))


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 14), (200, 6), (10**6, 2)])
def test_every_rank_has_every_tensor(bucket_bytes: int, buckets: int) -> None:
    for found, broadcasts in run_ranks(4, exchanged, bucket_bytes, sizes=ParallelSizes(tensor=2, pipeline=2)):
        assert broadcasts == buckets
        assert len(found) == 14
        for name, tensor in found.items():
            assert torch.equal(tensor, values(name, *tensor.shape).float()), name


def lopsided(rank: int) -> list[str]:
    """Only the last stage has tensors, and of its ranks only one."""
    here = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    held = [piece("late", (4, 3), 0, 4)] if here == (1, 1) else []
    found = dict(whole_tensors(held))
    assert torch.equal(found["late"], values("late", 4, 3).float())
    return [*found, *dict(whole_tensors([]))]


def test_stages_and_ranks_may_hold_nothing() -> None:
    assert run_ranks(4, lopsided, sizes=ParallelSizes(tensor=2, pipeline=2)) == [["late"]] * 4


def wrong(rank: int) -> list[str]:
    """What is said of pieces that do not fit; with that, no rank is left waiting."""
    cases = [
        [piece("hole", (6, 2), 4 * rank, 2)],
        [piece("shape", (4 + rank, 2), 0, 2)],
        [piece("twice", (4, 2), rank, 3)],
    ]
    messages = []
    for held in cases:
        with pytest.raises(ValueError) as error:
            whole_tensors(held)
        messages.append(str(error.value))
    return messages


def test_pieces_that_make_up_no_tensor_are_named_on_every_rank() -> None:
    for hole, shape, twice in run_ranks(2, wrong):
        assert hole == "the pieces of hole do not make up a tensor of shape [6, 2]"
        assert shape.startswith("shape is torch.float32 [4, 2] on stage 0 and torch.float32 [5, 2]")
        assert twice.startswith("the pieces of twice")
