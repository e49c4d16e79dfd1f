"""What fails on one rank fails on all of them with the same words."""

import pytest

from parallel.sizes import ParallelSizes
from parallel.together import from_rank_zero, on_rank_zero, only_rank_zero, together
from tests.ranks import run_ranks


class Unpicklable(Exception):
    """An error that no other rank can build."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise(error: Exception) -> None:
    raise error


def _outcomes(rank: int) -> list[tuple[str, str, list[str]]]:
    found = []
    for failing, error in [(1, OSError(28, "No space left", "/x")), (0, ValueError("zero")), (2, Unpicklable(3, 4))]:
        with pytest.raises(Exception) as caught:
            together(lambda failing=failing, error=error: _raise(error) if rank == failing else None)
        found.append((caught.type.__name__, str(caught.value), caught.value.__notes__))
    with pytest.raises(KeyError) as caught:
        together(lambda: _raise(KeyError(rank)) if rank else None)  # two ranks fail: the lower one's error
    found.append((caught.type.__name__, str(caught.value), caught.value.__notes__))
    assert together(lambda: rank) == rank  # and the ranks still agree on what comes next
    done: list[int] = []
    on_rank_zero(lambda: done.append(rank))
    assert done == [0][rank:]
    assert only_rank_zero(lambda: [*done, 5]) == ([0, 5] if rank == 0 else None)
    assert from_rank_zero(lambda: [*done, rank]) == [0, 0]
    with pytest.raises(KeyError):
        from_rank_zero(lambda: _raise(KeyError("nothing")))
    return found


def test_an_error_on_one_rank_is_every_ranks() -> None:
    outcomes = run_ranks(3, _outcomes, sizes=ParallelSizes())
    common = [
        ("OSError", "[Errno 28] No space left: '/x'", ["(on rank 1)"]),
        ("ValueError", "zero", ["(on rank 0)"]),
        ("RuntimeError", "Unpicklable: 3 and 4", ["(on rank 2)"]),
        ("KeyError", "1", ["(on rank 1)"]),
    ]
    assert outcomes[:2] == [common, common]
    # The rank that failed has its own error.
    assert outcomes[2] == [*common[:2], ("Unpicklable", "3 and 4", ["(on rank 2)"]), common[3]]
