"""The named adapters that hang below one linear, and which of them is on."""

from typing import Any

import torch

from mlora.adapter import LinearAdapter
from parallel.layout import LinearLayout


class AdapterBank(torch.nn.Module):
    """The named adapters below one linear, and which of them its forward adds.

    It is no part of the model's ``state_dict``: a base checkpoint has the same keys with and without adapters, and
    :mod:`mlora.checkpoint` saves the adapters. A state dict that does bring keys for it has them reported as unexpected.

    Attributes:
        adapters: by name.
        active: the name of the adapter that forward adds; None for none.
        merged: the name of the adapter that is in the base weight now; None for none.
        weight_before_merge: the base weight without it, on the host.
        scale_of_merge: DoRA's factor of each row in that merge.
        packed: the fused way's buffers (:mod:`mlora.packed`); None on the other ways.
    """

    def __init__(self, layout: LinearLayout) -> None:
        super().__init__()
        self.layout = layout
        self.adapters = torch.nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.weight_before_merge: torch.Tensor | None = None
        self.scale_of_merge: torch.Tensor | None = None
        self.packed: Any = None

    def adapter(self, name: str) -> LinearAdapter | None:
        """The adapter ``name`` on this linear, if it targets it."""
        found = self.adapters[name] if name in self.adapters else None  # noqa: SIM401 (no ModuleDict.get in older torch)
        return found if isinstance(found, LinearAdapter) else None

    def current(self) -> LinearAdapter | None:
        """The adapter to add in forward."""
        if self.active is None or self.merged is not None:
            return None
        return self.adapter(self.active)

    def delete(self, name: str) -> None:
        """Forget the adapter ``name``, if it is here; if it was on, none is.

        The fused way's buffer holds the base's weight too, and stays for the adapter that comes next.
        """
        if name in self.adapters:
            del self.adapters[name]
        if self.active == name:
            self.active = None

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: see the class."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        unexpected = args[3]
        unexpected.extend(key for key in state_dict if key.startswith(prefix))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: adapters are loaded by :mod:`mlora.checkpoint`."""
        raise RuntimeError("an adapter bank has no state dict; load adapters with mlora.load_adapter()")
