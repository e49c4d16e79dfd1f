"""One weight buffer for a base linear and its adapter, so that a single GEMM does both.

    P = [W | B]  [out, in + p],   A  [R, in] with σ folded in,   p = R rounded up to a multiple of 64

``[x | x Aᵀ] Pᵀ`` is the adapted output, and dy P is ``[dy W | dy B]``: the base's input gradient and d. The base's ``weight``
becomes a view of P under its own name; A and B are copied in again when a parameter has changed.
"""

import torch

from mlora.adapter import SHARED, LinearAdapter
from mlora.kernels.packing import sum_A, sum_B

_ALIGNMENT = 64  # elements: a GEMM's K that is no multiple of this costs more than the columns themselves


class Packed:
    """The buffers of one linear and one adapter.

    Attributes:
        weight: P [out, in + p].
        lora_A: [R, in].
        zero_A: in place of lora_A while the adapter is off: the GEMM then adds nothing.
        ranks, tail: R and p.
    """

    def __init__(self, weight: torch.nn.Parameter, adapter: LinearAdapter) -> None:
        self.adapter = adapter
        self._starts = _starts(adapter)
        self.ranks = max(start + adapter.ranks[part] for part, start in self._starts.items())
        self.tail = -(-self.ranks // _ALIGNMENT) * _ALIGNMENT
        rows, features = weight.shape
        self.weight = weight.new_zeros(rows, features + self.tail).detach()
        self.weight[:, :features] = weight.detach()
        weight.data = self.weight[:, :features]
        self.lora_A = self.weight.new_zeros(self.ranks, features)
        self.zero_A = torch.zeros_like(self.lora_A)
        self._versions: tuple[int, ...] = ()
        self._make_tables(rows)

    def holds(self, weight: torch.nn.Parameter, adapter: LinearAdapter) -> bool:
        """Whether it still belongs to this weight and adapter: a model that was moved or cast has another weight."""
        return adapter is self.adapter and weight.data_ptr() == self.weight.data_ptr()

    def parameters(self) -> list[torch.nn.Parameter]:
        """A's and then B's, in the order of :meth:`gradients`."""
        return [*self.adapter.lora_A.values(), *self.adapter.lora_B.values()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy A and B in, if one of them has changed since the last time."""
        versions = tuple(parameter._version for parameter in self.parameters())
        if versions == self._versions:
            return
        features = self.lora_A.shape[1]
        for part, parameter in self.adapter.lora_A.items():
            start, scaling = self._place(part)
            torch.mul(parameter, scaling, out=self.lora_A[start : start + parameter.shape[0]])
        for part, parameter in self.adapter.lora_B.items():
            start = features + self._starts[part]
            self.weight[:, start : start + parameter.shape[1]][self.adapter.index(part)] = parameter
        self._versions = versions

    def gradients(self, dA: torch.Tensor, dB: torch.Tensor) -> list[torch.Tensor]:
        """The parameters' gradients from partial sums: dA [splits, R, in] and dB [splits, R, out], float32."""
        whole_A = sum_A(dA, self._scaling, self.adapter.dtype)
        whole_B = sum_B(dB, *self._tables, self._elements, self.adapter.dtype)
        result, at = [], 0
        for part, parameter in self.adapter.lora_A.items():
            start, _ = self._place(part)
            result.append(whole_A[start : start + parameter.shape[0]])
        for parameter in self.adapter.lora_B.values():
            result.append(whole_B[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()
        return result

    def _place(self, part: str) -> tuple[int, float]:
        """(first of its ranks, σ) of a lora_A."""
        return (
            (0, next(iter(self.adapter.scaling.values())))
            if part == SHARED
            else (
                self._starts[part],
                self.adapter.scaling[part],
            )
        )

    def _make_tables(self, rows: int) -> None:
        """For each fused row: its place in B's flat gradient, the first and the number of its ranks; for each rank: σ."""
        offset, start, count = (torch.zeros(rows, dtype=torch.int32) for _ in range(3))
        scaling, at = torch.empty(self.ranks), 0
        for part, first in self._starts.items():
            scaling[first : first + self.adapter.ranks[part]] = self.adapter.scaling[part]
        for part, parameter in self.adapter.lora_B.items():
            index, (length, rank) = self.adapter.index(part).cpu(), parameter.shape
            offset[index] = torch.arange(at, at + length * rank, rank, dtype=torch.int32)
            start[index], count[index] = self._starts[part], rank
            at += length * rank
        self._elements = at
        self._scaling = scaling.to(self.weight.device)
        device = self.weight.device
        self._tables = offset.to(device), start.to(device), count.to(device)


def _starts(adapter: LinearAdapter) -> dict[str, int]:
    """Where each projection's ranks begin among the R."""
    starts, at = {}, 0
    for part in adapter.parts:
        starts[part] = at
        at += 0 if adapter.config.shared_A else adapter.ranks[part]
    return starts
