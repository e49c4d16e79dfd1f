"""The named adapters that hang below one module, and which of them is on."""

from typing import Any

import torch

from mlora.adapter import LinearAdapter
from mlora.outside import Outside, OutsideParameters
from parallel.layout import LinearLayout


class Bank(Outside):
    """What the named adapters have for one module.

    Attributes:
        adapters: by name.
        active: the name of the adapter that is on; None for none. It need not have anything here.
    """

    adapters: torch.nn.ModuleDict | OutsideParameters
    active: str | None = None

    def parameters_of(self, name: str) -> list[torch.nn.Parameter]:
        """All that the adapter ``name`` has here."""
        held = self.adapters[name] if name in self.adapters else None  # noqa: SIM401 (no ModuleDict.get in older torch)
        return [held] if isinstance(held, torch.nn.Parameter) else list(held.parameters()) if held is not None else []

    def delete(self, name: str) -> None:
        """Forget the adapter ``name``, if it is here; if it was on, none is."""
        if name in self.adapters:
            del self.adapters[name]
        if self.active == name:
            self.active = None


class AdapterBank(Bank):
    """The named adapters below one linear, and which of them its forward adds.

    One that is deleted leaves the fused way's buffer, which holds the base's weight too, for the adapter that comes next.

    Attributes:
        merged: the name of the adapter that is in the base weight now; None for none.
        weight_before_merge: the base weight without it, on the host.
        scale_of_merge: DoRA's factor of each row in that merge.
        packed: the fused way's buffers (:mod:`mlora.packed`); None on the other ways.
        captured: the fused way's buffers that no forward uses any more, but CUDA graphs do, which know addresses only.
    """

    adapters: torch.nn.ModuleDict

    def __init__(self, layout: LinearLayout) -> None:
        super().__init__()
        self.layout = layout
        self.adapters = torch.nn.ModuleDict()
        self.merged: str | None = None
        self.weight_before_merge: torch.Tensor | None = None
        self.scale_of_merge: torch.Tensor | None = None
        self.packed: Any = None
        self.captured: list[Any] = []

    def delete(self, name: str) -> None:
        """See :class:`Bank`."""
        adapter = self.adapter(name)
        super().delete(name)
        if self.packed is not None and adapter is not None:
            self.packed.release(adapter)

    def adapter(self, name: str) -> LinearAdapter | None:
        """The adapter ``name`` on this linear, if it targets it."""
        found = self.adapters[name] if name in self.adapters else None  # noqa: SIM401 (no ModuleDict.get in older torch)
        return found if isinstance(found, LinearAdapter) else None

    def current(self) -> LinearAdapter | None:
        """The adapter to add in forward."""
        if self.active is None or self.merged is not None:
            return None
        return self.adapter(self.active)
