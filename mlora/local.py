"""Adapted linears of Megatron's local spec: the low-rank term goes into the base's own collectives (:mod:`mlora.linear`)."""

from typing import Any

import torch

from mlora.adapter import LinearAdapter
from mlora.bank import AdapterBank
from mlora.dora import DoraLinear, Rescale, scales
from mlora.linear import Geometry, LoraLinear


class LocalLora:
    """Forward of an adapted ``ColumnParallelLinear`` or ``RowParallelLinear``; comes before it in the instance's class."""

    lora: AdapterBank
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Megatron's, and DoRA's scale where it comes behind the sum over the ranks."""
        y, later = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        adapter = self.lora.current()
        if adapter is None or not adapter.uses_dora or adapter.drops or adapter.layout.partition_dim != 1:
            return y, later
        return Rescale.apply(y, scales(adapter, self.weight), self.bias if later is None else None), later  # type: ignore[no-untyped-call]

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Megatron's seam: everything between the collectives around a linear."""
        adapter = self.lora.current()
        if adapter is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc,no-any-return]
        geometry = self._geometry(adapter, input, bool(kwargs.get("allreduce_dgrad")))
        bias, (lora_A, lora_B) = kwargs.get("bias"), adapter.fused()
        if adapter.uses_dora and geometry.dropout is not None:
            scale = scales(adapter, weight)
            return DoraLinear.apply(input, weight, bias, lora_A, lora_B, scale, geometry)  # type: ignore[no-any-return,no-untyped-call]
        y = LoraLinear.apply(input, weight, bias, lora_A, lora_B, geometry)  # type: ignore[no-untyped-call]
        if adapter.uses_dora and not geometry.row_parallel:
            return Rescale.apply(y, scales(adapter, weight), bias)  # type: ignore[no-any-return,no-untyped-call]
        return y  # type: ignore[no-any-return]

    def _geometry(self, adapter: LinearAdapter, x: torch.Tensor, reduce_dx: bool) -> Geometry:
        layout = adapter.layout
        pieces = layout.group.size() if layout.sequence_parallel and layout.partition_dim == 0 else 1
        return Geometry.of(layout, adapter.dropout(x.shape[0] * pieces), reduce_dx)
