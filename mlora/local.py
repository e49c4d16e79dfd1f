"""Adapted linears of Megatron's local spec: the low-rank term goes into the base's own collectives (:mod:`mlora.linear`)."""

from typing import Any

import torch

from mlora.adapter import AdapterBank, LinearAdapter
from mlora.linear import Geometry, LoraLinear


class LocalLora:
    """Forward of an adapted ``ColumnParallelLinear`` or ``RowParallelLinear``; comes before it in the instance's class."""

    lora: AdapterBank

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Megatron's seam: everything between the collectives around a linear."""
        adapter = self.lora.current()
        if adapter is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc,no-any-return]
        geometry = self._geometry(adapter, input, bool(kwargs.get("allreduce_dgrad")))
        bias = kwargs.get("bias")
        return LoraLinear.apply(input, weight, bias, *adapter.fused(), geometry)  # type: ignore[no-any-return,no-untyped-call]

    def _geometry(self, adapter: LinearAdapter, x: torch.Tensor, reduce_dx: bool) -> Geometry:
        layout = adapter.layout
        pieces = layout.group.size() if layout.sequence_parallel and layout.partition_dim == 0 else 1
        return Geometry.of(layout, adapter.dropout(x.shape[0] * pieces), reduce_dx)
