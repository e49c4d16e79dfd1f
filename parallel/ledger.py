"""A ledger of collectives: every one that runs inside the context, with bytes, group and direction.

It listens below ``torch.distributed``, where each process group's call passes the dispatcher, so it also sees functions that
Megatron bound to other names at import. Overhead is a Python call per operator: for tests and benchmarks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# How the dispatcher names a collective -> the field's word for it.
_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
}


@dataclass(frozen=True)
class Entry:
    """One collective.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", ...
        shape: of the whole tensor: the result of a gather, the input of a scatter, the tensor itself otherwise.
        bytes: of that tensor.
        group: the name of the process group.
        direction: "forward", or "backward" when the autograd engine made the call (recomputation counts as backward).
    """

    kind: str
    shape: tuple[int, ...]
    bytes: int
    group: str
    direction: str

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return int(torch.Size(self.shape).numel())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that records collectives in :attr:`entries`, in the order in which they were issued."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[Entry] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, _, name = getattr(func, "_schema", None).name.partition("::")  # type: ignore[union-attr]
        if namespace == "c10d" and name in _NAMES:
            self.entries.append(_entry(_NAMES[name], args, kwargs))
        return result

    def select(
        self,
        *,
        kind: str | None = None,
        direction: str | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> list[Entry]:
        """Entries of a kind, direction and group (None: any)."""
        wanted = group.group_name if group is not None else None
        return [
            entry
            for entry in self.entries
            if (kind is None or entry.kind == kind)
            and (direction is None or entry.direction == direction)
            and (wanted is None or entry.group == wanted)
        ]


def _entry(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
    largest = max(_tensors([*args, *kwargs.values()]), key=lambda tensor: tensor.numel(), default=None)
    direction = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
    shape = tuple(largest.shape) if largest is not None else ()
    size = largest.numel() * largest.element_size() if largest is not None else 0
    return Entry(kind, shape, size, _group_name([*args, *kwargs.values()]), direction)


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _group_name(values: Iterable[Any]) -> str:
    for value in values:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return str(torch.distributed.ProcessGroup.unbox(value).group_name)
        if isinstance(value, torch.distributed.ProcessGroup):
            return str(value.group_name)
    return ""
