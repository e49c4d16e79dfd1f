"""Modules that are no part of the model's ``state_dict``: a base checkpoint has the same keys with and without adapters."""

from typing import Any

import torch


class Outside(torch.nn.Module):
    """A module that a state dict neither has nor sets; one that brings keys for it has them reported as unexpected.

    Its parameters are saved and loaded by :mod:`mlora.checkpoint`.
    """

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: see the class."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        unexpected = args[3]
        unexpected.extend(key for key in state_dict if key.startswith(prefix))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: adapters are loaded by :mod:`mlora.checkpoint`."""
        raise RuntimeError("an adapter bank has no state dict; load adapters with mlora.load_adapter()")


class OutsideParameters(torch.nn.ParameterDict):
    """Parameters below an :class:`Outside`, which a state dict that is loaded into the model does not lack."""

    def _load_from_state_dict(self, *args: Any) -> None:
        pass
