"""What a rank of a real run sends: every collective inside the context, without touching what is computed.

:class:`parallel.ledger.Ledger` sees every operator, at a price: ``torch.compile`` steps aside for it, so that a step under it may
round otherwise. Here only the methods of torch's process groups are replaced, while the context is open. That is below the
functions of ``torch.distributed``, also those that Megatron bound at import, and above collectives that C++ code starts itself,
as compiled code and Transformer Engine's overlapped communication do: those are not seen.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel.ledger import Entry, entry_of, kind_of_method


@dataclass(frozen=True)
class Flow:
    """Collectives of one kind along one axis.

    Attributes:
        kind, direction: as in :class:`parallel.ledger.Entry`.
        axis: Megatron's name of the group, such as "tensor model parallel"; "world" for all ranks.
        size: ranks in the group.
        count: collectives.
        bytes: of their whole tensors together.
    """

    kind: str
    axis: str
    size: int
    direction: str
    count: int
    bytes: int


class Traffic(contextlib.ExitStack):
    """Context that records the collectives of groups of several ranks in :attr:`entries`, in the order of their issue."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self._groups: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> "Traffic":
        super().__enter__()
        for name, method in list(vars(dist.ProcessGroup).items()):
            kind = kind_of_method(name)
            if kind is not None:
                setattr(dist.ProcessGroup, name, self._recording(kind, method))
                self.callback(setattr, dist.ProcessGroup, name, method)
        return self

    def _recording(self, kind: str, method: Any) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                self._groups[group.group_name] = _axis(group), group.size()
                self.entries.append(entry_of(kind, [group, *args, *kwargs.values()]))
            return method.__get__(group)(*args, **kwargs)

        return call

    def flows(self) -> Iterator[Flow]:
        """The entries summed, the greatest flow first."""
        counts: Counter[tuple[str, str, int, str]] = Counter()
        sizes: Counter[tuple[str, str, int, str]] = Counter()
        for entry in self.entries:
            key = (entry.kind, *self._groups[entry.group], entry.direction)
            counts[key] += 1
            sizes[key] += entry.bytes
        for key in sorted(counts, key=lambda key: (-sizes[key], key)):
            yield Flow(*key, counts[key], sizes[key])


def _axis(group: dist.ProcessGroup) -> str:
    words = str(group.group_desc).lower().removesuffix("_group").replace("_", " ")
    return "world" if words in ("default pg", "undefined", "") else words
