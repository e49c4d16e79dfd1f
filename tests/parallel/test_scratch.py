"""Memory is used again only when nothing of what was made of it is left."""

from collections.abc import Callable

import pytest
import torch

from parallel.scratch import Scratch


def _address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_what_is_gone_makes_room() -> None:
    scratch = Scratch()
    first = _address(scratch.lend(100_000))
    assert [_address(scratch.lend(size)) for size in (100_000, 8, 99_999)] == [first] * 3
    assert len(scratch.lend(8)) == 8 and len(scratch.lend(0)) == 0


USES: dict[str, Callable[[memoryview], object]] = {
    "itself": lambda view: view,
    "a part": lambda view: view[64:128],
    "tensor": lambda view: torch.frombuffer(view[64:], dtype=torch.float32),
    "view of a tensor": lambda view: torch.frombuffer(view, dtype=torch.float32).view(-1, 4)[1:].T,
    "its storage": lambda view: torch.frombuffer(view, dtype=torch.float32).untyped_storage(),
    "array": lambda view: torch.frombuffer(view, dtype=torch.float32).numpy(),
    "view of an array": lambda view: torch.frombuffer(view, dtype=torch.float32)[8:].numpy().data,
}


@pytest.mark.parametrize("use", USES)
def test_what_is_in_use_is_left_alone(use: str) -> None:
    scratch = Scratch()
    view = scratch.lend(4096)
    first = _address(view)
    used = USES[use](view)
    del view
    others = [scratch.lend(4096), scratch.lend(64)]
    addresses = [_address(other) for other in others]
    assert len({first, *addresses}) == 3
    del used, others
    assert _address(scratch.lend(64)) == addresses[1]  # Of several blocks the last is kept.


def test_more_than_there_is() -> None:
    scratch = Scratch()
    scratch.lend(16)
    view = scratch.lend(1 << 20)
    assert len(view) == 1 << 20
    view[:] = b"x" * (1 << 20)
