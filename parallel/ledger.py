"""A ledger of collectives: every one that runs inside the context, with bytes, group and direction.

It listens below ``torch.distributed``, where each process group's call passes the dispatcher, so it also sees functions that
Megatron bound to other names at import. An asynchronous one counts where it is issued. Overhead is a Python call per operator:
for tests and benchmarks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Where collectives are operators: torch.distributed's own, and the functional ones that DTensor and compiled code call.
_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")
# How the dispatcher or a method of a process group names a collective, without underscores at its ends -> the field's word.
_NAMES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_to_all_single": "all_to_all",
    "allgather": "all_gather",
    "allgather_base": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "barrier": "barrier",
    "batch_p2p_ops": "batch_p2p",
    "broadcast": "broadcast",
    "gather": "gather",
    "gather_into_tensor": "gather",
    "irecv": "recv",
    "isend": "send",
    "monitored_barrier": "barrier",
    "recv": "recv",
    "recv_any_source": "recv",
    "recv_anysource": "recv",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "scatter": "scatter",
    "send": "send",
}


@dataclass(frozen=True)
class Entry:
    """One collective.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", ...
        shape: of the whole tensor: the result of a gather, the input of a scatter, the tensor itself otherwise; (elements,) where
            that is a list of tensors. Where only the root has the whole (gather, scatter), the other ranks give their piece.
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
        kind = _kind(func._schema.name)  # type: ignore[attr-defined]
        if kind is not None:
            self.entries.append(entry_of(kind, [*args, *kwargs.values(), result]))
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


def _kind(operator: str) -> str | None:
    """The kind of collective that an operator ("c10d::allreduce_") is; None if it is none."""
    namespace, _, name = operator.partition("::")
    return _NAMES.get(name.strip("_")) if namespace in _NAMESPACES else None


def kind_of_method(name: str) -> str | None:
    """The kind of collective that a method of a process group ("_allgather_base") is; None if it is none."""
    return _NAMES.get(name.strip("_"))


def entry_of(kind: str, values: Sequence[Any]) -> Entry:
    """The entry of a call with these arguments and, if it gives tensors, its result."""
    whole = max((list(_tensors(value)) for value in values), key=_elements)
    shape = tuple(whole[0].shape) if len(whole) == 1 else (_elements(whole),)
    direction = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
    size = sum(tensor.numel() * tensor.element_size() for tensor in whole)
    return Entry(kind, shape, size, _group_name(values), direction)


def _elements(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _group_name(values: Sequence[Any]) -> str:
    """Of the group among a call's arguments: a group, a boxed group, or (functional collectives) its name, as the last string."""
    name = ""
    for value in values:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return str(torch.distributed.ProcessGroup.unbox(value).group_name)
        if isinstance(value, torch.distributed.ProcessGroup):
            return str(value.group_name)
        if isinstance(value, str):
            name = value
    return name
