"""Adapters between formats, in one process: no process group, no model, and no base weights unless they are merged.

:func:`open_adapter` reads any format into one :class:`AdapterState`; everything else takes that.
"""

from mlora.conversion.readers import open_adapter
from mlora.conversion.state import AdapterModule, AdapterState, Factors, LazyTensor

__all__ = ["AdapterModule", "AdapterState", "Factors", "LazyTensor", "open_adapter"]
