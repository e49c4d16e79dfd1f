"""Threads that do pieces of work side by side."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from mlora.conversion.workers import Workers, one_thread


def test_results_come_in_order_and_torchs_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Workers() as workers:
            inside = list(workers.each(lambda piece: (piece, torch.get_num_threads()), range(20)))
        after: list[int] = []
        thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert inside == [(piece, 1) for piece in range(20)]
        assert torch.get_num_threads() == 2 and after == [2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_torch_uses_one_thread_and_afterwards_as_many_as_before(error: BaseException | None) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt) if error else nullcontext(), one_thread():
            assert torch.get_num_threads() == 1
            if error:
                raise error
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_ends_the_rest(error: BaseException) -> None:
    done: list[int] = []

    def work(piece: int) -> None:
        if piece == 3:
            raise error
        time.sleep(0.01)
        done.append(piece)

    with pytest.raises(type(error)), Workers() as workers:
        list(workers.each(work, range(1000)))
    assert len(done) < 100


def test_memory_belongs_to_a_thread_and_a_name() -> None:
    def places(piece: int) -> tuple[int, tuple[int, ...]]:
        first = workers.buffer("one", 8, torch.float32)
        again = workers.buffer("one", 4, torch.float64)
        other = workers.buffer("two", 8, torch.float32)
        assert first.shape == (8,) and again.shape == (4,) and first.dtype == torch.float32
        assert first.data_ptr() == again.data_ptr() != other.data_ptr()
        return threading.get_ident(), (first.data_ptr(), other.data_ptr())

    with Workers() as workers:
        found = list(workers.each(places, range(50)))
    threads = {thread for thread, _ in found}
    assert len({place for _, places in found for place in places}) == 2 * len(threads)
