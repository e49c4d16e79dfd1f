"""One outcome for all ranks: what fails on one rank fails on every rank, so that none waits for a collective that never comes."""

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together(work: Callable[[], T]) -> T:
    """Do ``work`` on this rank, then learn whether it was done on all. A collective of the world.

    Args:
        work: without collectives, or with collectives that every rank ends before anything can fail.

    Raises:
        Exception: the error of the lowest rank that had one, on every rank alike; a note on it names the rank.
    """
    failure: Exception | None = None
    try:
        value = work()
    except Exception as error:
        failure = error
    everywhere: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, _portable(failure))
    for rank, found in enumerate(everywhere):
        if found is not None:
            raise_for(rank, failure if failure is not None and rank == dist.get_rank() else found)
    return value


def on_rank_zero(work: Callable[[], None]) -> None:
    """:func:`together` for work that is rank 0's alone, such as making a folder."""
    together(lambda: work() if dist.get_rank() == 0 else None)


def only_rank_zero(make: Callable[[], T]) -> T | None:
    """:func:`together` for what rank 0 alone shall have; None on the others."""
    return together(lambda: make() if dist.get_rank() == 0 else None)


def from_rank_zero(find: Callable[[], T]) -> T:
    """:func:`together` for what rank 0 finds out for all; it is pickled."""
    found = [only_rank_zero(find)]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def raise_for(rank: int, error: BaseException) -> None:
    """Raise the error of ``rank`` on this rank."""
    error.add_note(f"(on rank {rank})")
    raise error


def _portable(error: Exception | None) -> Exception | None:
    """The error itself if other ranks can unpickle it, or its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
