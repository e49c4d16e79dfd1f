"""One weight buffer for a base linear and its adapter, so that a single GEMM does both.

    P = [[W, B], [A, 0]]  [out + p, in + p],   σ folded into A,   p = R rounded up to a multiple of 64

``[x | x Aᵀ] [W | B]ᵀ`` is the adapted output, and dy [W | B] is ``[dy W | dy B]``: the base's input gradient and d, unless B is
folded (:attr:`Packed.fold`), which takes a product for each half. Where d is known, ``[dy | d] [W; A]`` is the adapted input
gradient. The base's ``weight`` becomes a view of P under its own name; A and B are copied in again at every forward.
"""

import torch

from mlora.adapter import LinearAdapter
from mlora.kernels.packing import RowTables, pack, sums
from mlora.kernels.tile import cdiv

_ALIGNMENT = 64  # elements: a GEMM's K that is no multiple of this costs more than the columns themselves
_FEW = 128  # columns of B: with no more, two GEMMs in place of one cost more than its zeros


class Buffer:
    """P of one linear, shared by its adapters: as wide as the widest of those that have run needs it.

    Attributes:
        whole: P [out + p, in + p].
        tail: p.
        filled_by: the adapter whose A and B are in it; None before the first, and if it is deleted.
        packed: what each adapter has made of it.
        captured: a CUDA graph was captured that reads it.
    """

    def __init__(self, weight: torch.nn.Parameter, tail: int) -> None:
        rows, features = weight.shape
        self.whole = weight.detach().new_zeros(rows + tail, features + tail)
        self.whole[:rows, :features] = weight.detach()
        weight.data = self.whole[:rows, :features]
        self.tail = tail
        self.filled_by: LinearAdapter | None = None
        self.packed: dict[LinearAdapter, Packed] = {}
        self.captured = False


class Packed:
    """The buffer of one linear as one adapter uses it: no more of its columns and rows than the adapter's own p.

    Attributes:
        adapter: None once it is deleted.
        buffer: with P.
        base: W [out, in].
        weight: [W | B] [out, in + p].
        upright: [W; A] [out + p, in].
        padded_A, lora_A: [p, in], zero past R, and its first R rows.
        ranks, tail: R and p.
        halves: of a gated linear, (first, number) of the ranks of gate, the first half of its rows, and of up.
        fold: if the halves have many ranks each, the columns that B has in place of p: both halves' begin at the first, so that a
            GEMM for each half multiplies no zeros. Else 0.
    """

    def __init__(self, weight: torch.nn.Parameter, adapter: LinearAdapter, buffer: Buffer | None) -> None:
        self.adapter: LinearAdapter | None = adapter
        self.dtype = adapter.dtype
        self._starts = _starts(adapter)
        self.ranks = max(start + adapter.ranks[part] for part, start in self._starts.items())
        self.tail = _aligned(self.ranks)
        rows, features = weight.shape
        self.buffer = buffer if buffer is not None and buffer.tail >= self.tail else Buffer(weight, self.tail)
        self.buffer.packed[adapter] = self
        self._parameter = weight
        self.base = self.buffer.whole[:rows, :features]
        self.weight = self.buffer.whole[:rows, : features + self.tail]
        self.upright = self.buffer.whole[: rows + self.tail, :features]
        self.padded_A = self.upright[rows:]
        self.lora_A = self.padded_A[: self.ranks]
        self._make_tables(rows, adapter)

    @classmethod
    def of(cls, weight: torch.nn.Parameter, adapter: LinearAdapter, previous: "Packed | None") -> "Packed":
        """What ``adapter`` has made of the buffer that ``previous`` uses, or makes now, of a new buffer if it must be wider."""
        buffer = previous.buffer if previous is not None else None
        found = buffer.packed.get(adapter) if buffer is not None else None
        return found if found is not None else cls(weight, adapter, buffer)

    @property
    def version(self) -> int:
        """Changes when the base weight does."""
        return self._parameter._version

    def check(self, version: int) -> None:
        """Before backward.

        Raises:
            RuntimeError: the base weight was changed since forward, by a merge, say.
        """
        if self.version != version:
            raise RuntimeError("a base weight was changed between forward and backward: the gradients would be wrong")

    def is_of(self, weight: torch.nn.Parameter) -> bool:
        """Whether ``weight`` is a view of P: a model that was moved or cast has another one."""
        return weight.data_ptr() == self.weight.data_ptr()

    def is_used_by(self, adapter: LinearAdapter | None) -> bool:
        """Whether an adapter's A and B ride in it: False for None."""
        return adapter is not None and adapter is self.adapter

    def parameters(self) -> list[torch.nn.Parameter]:
        """A's and then B's, in the order of :meth:`gradients`.

        Raises:
            RuntimeError: the adapter was deleted, after a forward whose backward wants it.
        """
        return [*self._adapter.lora_A.values(), *self._adapter.lora_B.values()]

    @property
    def _adapter(self) -> LinearAdapter:
        if self.adapter is None:
            raise RuntimeError("an adapter was deleted between forward and backward")
        return self.adapter

    def release(self, adapter: LinearAdapter) -> None:
        """Forget an adapter that is deleted; the buffer stays for the next one."""
        if self.buffer.filled_by is adapter:
            self.buffer.filled_by = None
        if (packed := self.buffer.packed.pop(adapter, None)) is not None:
            packed.adapter = None

    def note_capture(self) -> None:
        """At every forward: a CUDA graph that is being captured reads the buffer for as long as it lives."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self.buffer.captured = True

    @torch.no_grad()
    def fill(self) -> None:
        """Copy A and B in: at every forward, because a distributed optimizer changes parameters behind autograd's back, and a
        replayed CUDA graph must see what it made of them."""
        A = [parameter.detach() for parameter in self._adapter.lora_A.values()]
        B = [parameter.detach() for parameter in self._adapter.lora_B.values()]
        pack(A, B, self._scaling, self._tables, self.padded_A, self.weight[:, self.base.shape[1] :])
        self.buffer.filled_by = self._adapter

    def refill(self) -> None:
        """Before backward: copy in again if another adapter has run since forward."""
        if self.buffer.filled_by is not self.adapter:
            self.fill()

    def gradients(self, dA: torch.Tensor, dB: torch.Tensor, factor: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The parameters' gradients from partial sums: dA [splits, R, in], each column of it times ``factor`` [in], and dB [splits,
        R, out]."""
        whole_A, whole_B = sums(dA, dB, self._scaling, self._tables, self._elements, self.dtype, factor)
        result, row, at = [], 0, 0
        for parameter in self._adapter.lora_A.values():
            result.append(whole_A[row : row + parameter.shape[0]])
            row += parameter.shape[0]
        for parameter in self._adapter.lora_B.values():
            result.append(whole_B[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()
        return result

    def _make_tables(self, rows: int, adapter: LinearAdapter) -> None:
        tables = torch.zeros(6, rows, dtype=torch.int32)
        part, place, start, count, offset, column = tables
        scaling, at = torch.empty(self.ranks), 0
        for name, first in self._starts.items():
            scaling[first : first + adapter.ranks[name]] = adapter.scaling[name]
        for number, (name, parameter) in enumerate(adapter.lora_B.items()):
            index, (length, rank) = adapter.index(name).cpu(), parameter.shape
            own = torch.arange(length, dtype=torch.int32)
            part[index], place[index], offset[index] = number, own, at + own * rank
            start[index], count[index] = self._starts[name], rank
            at += length * rank
        self.halves = [(int(start[row]), int(count[row])) for row in (0, rows // 2)]
        self.fold = _fold(self.halves, start, count, self.tail)
        if not self.fold:
            column.copy_(start)
        self._elements = at
        self._scaling = scaling.to(self.weight.device)
        self._tables = RowTables(*tables.to(self.weight.device))


def _fold(halves: list[tuple[int, int]], start: torch.Tensor, count: torch.Tensor, tail: int) -> int:
    """:attr:`Packed.fold`, if all rows of each half have its (first, number) of ranks."""
    (gate, gate_ranks), (up, up_ranks) = halves
    if tail <= _FEW or gate_ranks == 0 or up_ranks == 0 or gate == up:
        return 0
    gated = torch.tensor(halves, dtype=start.dtype).repeat_interleave(len(start) // 2, dim=0)
    return _aligned(max(gate_ranks, up_ranks)) if torch.equal(torch.stack([start, count], 1), gated) else 0


def _aligned(ranks: int) -> int:
    return cdiv(ranks, _ALIGNMENT) * _ALIGNMENT


def _starts(adapter: LinearAdapter) -> dict[str, int]:
    """Where each projection's ranks begin among the R."""
    starts, at = {}, 0
    for part in adapter.parts:
        starts[part] = at
        at += 0 if adapter.shares_A else adapter.ranks[part]
    return starts
