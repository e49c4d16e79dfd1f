"""SIGTERM as a question that all ranks answer alike."""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class Interruption:
    """While it is entered, SIGTERM only makes a note; :meth:`requested` tells every rank whether any of them was sent one.

    A launcher may signal the ranks one by one, at different steps: only together can they stop after the same one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noted = False

    def __enter__(self) -> "Interruption":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def requested(self) -> bool:
        """Whether any rank was signalled. A collective of the world, of one number."""
        noted = torch.tensor(int(self._noted), device=self._device)
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        return bool(noted.item())
