"""The parameters of an adapter on one linear.

| base | lora_A[p] | lora_B[p] | lora_magnitude_vector[p] (DoRA) |
|---|---|---|---|
| column-parallel | [r_p, in], replicated | [rows of p on this rank, r_p] | [rows of p on this rank] |
| row-parallel | [r, in/t] | [out, r], replicated | [out], replicated |
| replicated | [r, in], replicated | [out, r], replicated | [out], replicated |

p runs over the projections that the linear fuses (q, k, v; gate, up; whole). A rank that holds no row of p (fewer query groups
than ranks) has no lora_B[p] and no magnitudes of p. With ``shared_A``, or if Hugging Face's module is fused too (Phi 3's
``qkv_proj``), there is one lora_A, named "shared". An adapter that starts as a part of the base weight (:mod:`mlora.decomposition`)
keeps that start: lora_A0 and lora_B0 lie as lora_A and lora_B do, and are no parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mlora.config import LoraConfig
from mlora.dropout import Dropout
from mlora.factor import Factor, cut
from mlora.initial import draw
from mlora.names import SHARED
from mlora.outside import OutsideParameters
from mlora.targets import Target
from parallel.layout import LinearLayout


class _Start(torch.nn.Module):
    """The matrices by projection that an adapter started with."""

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of each projection."""
        yield from self.named_buffers(recurse=False)

    def keep(self, part: str, value: torch.Tensor) -> None:
        """A copy of a projection's matrix."""
        self.register_buffer(part, value.detach().clone(), persistent=False)


class LinearAdapter(torch.nn.Module):
    """A LoRA adapter on one linear.

    Args:
        layout: of the base.
        targets: the projections of this linear that get a low-rank term.
        config: of the adapter.
        base: the base's weight; device and default dtype are taken from it.
        vocabulary: real rows of an output layer; None if none of its rows are padding. Padding's factors are zero.

    Attributes:
        parts: the projections, in the layout's order.
        rows: of each projection of the base, without padding.
        columns: of the base's weight, without padding.
        hf_names: of each projection, its full path in Hugging Face's model.
        hf_rows: of each projection, its first row in that module: 0 unless several projections are one module.
        shares_A: one A stands for all projections.
        ranks, scaling: of each projection.

    Raises:
        ValueError: ``shared_A`` with different ranks within one linear; an adapter that starts as a part of the base weight with
            a rank beyond the weight's, or with one A and several scalings.
    """

    def __init__(
        self,
        layout: LinearLayout,
        targets: Sequence[Target],
        config: LoraConfig,
        base: torch.Tensor,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.config = config
        self.rows, self.columns = self._real_sizes(vocabulary)
        self.dtype = config.adapter_dtype or base.dtype
        by_part = {target.projection.part: target for target in targets}
        self.parts = [part for part, _ in layout.parts if part in by_part]
        self.hf_names = {part: by_part[part].projection.hf_name for part in self.parts}
        is_one_module = len(self.parts) > 1 and len(set(self.hf_names.values())) == 1
        self.shares_A = config.shared_A or is_one_module
        self.hf_rows = _starts(layout) if is_one_module else dict.fromkeys(self.parts, 0)
        self.ranks = {part: by_part[part].rank for part in self.parts}
        self.scaling = {part: config.scaling(by_part[part].rank, by_part[part].alpha) for part in self.parts}
        if self.shares_A and len(set(self.ranks.values())) > 1:
            raise ValueError(f"{layout.name}: shared_A needs one rank for all its projections, not {self.ranks}")
        if config.decomposes:
            self._check_decomposition()
        self.lora_A0, self.lora_B0 = _Start(), _Start()
        self.lora_A = OutsideParameters()
        self.lora_B = OutsideParameters()
        self.lora_magnitude_vector = OutsideParameters()
        for part in [SHARED] if self.shares_A else self.parts:
            self.lora_A[part] = self._new_A(part, base.device)
        for part in self.parts:
            if layout.part_rows(part)[1]:
                self.lora_B[part] = self._new_B(part, base.device)
                self.register_buffer(f"_index_{part}", layout.output_index(part).to(base.device), persistent=False)
                if self.uses_dora:
                    self.lora_magnitude_vector[part] = self._new_magnitude(part, base.device)
        if config.decomposes:
            # mlora.decomposition.start_from_weight() fills them, which takes the whole group.
            for part, parameter in self.lora_A.items():
                self.lora_A0.keep(part, parameter)
            for part, parameter in self.lora_B.items():
                self.lora_B0.keep(part, parameter)

    def _check_decomposition(self) -> None:
        init = self.config.init_lora_weights
        for parts in [self.parts] if self.shares_A else [[part] for part in self.parts]:
            most, rank = min(sum(self.rows[part] for part in parts), self.columns), self.ranks[parts[0]]
            if rank > most:
                raise ValueError(
                    f"{self.layout.name}: with {init!r} the rank of {', '.join(parts)} can be {most} at most, not {rank}"
                )
            if len({self.scaling[part] for part in parts}) > 1:
                raise ValueError(
                    f"{self.layout.name}: with {init!r} projections of one A need one scaling, not {self.scaling}"
                )

    def _real_sizes(self, vocabulary: int | None) -> tuple[dict[str, int], int]:
        rows = dict(self.layout.parts)
        return ({part: vocabulary for part in rows} if vocabulary else rows), self.layout.in_features

    def _new_A(self, part: str, device: torch.device) -> torch.nn.Parameter:
        layout, rank = self.layout, self.ranks[self.parts[0] if part == SHARED else part]
        first, count = layout.columns
        whole = self._draw(part, "A", rank, self.columns, rank)
        return self._parameter(cut(whole, 1, first, count), 1, layout.partition_dim == 1, device)

    def _new_B(self, part: str, device: torch.device) -> torch.nn.Parameter:
        layout, rank = self.layout, self.ranks[part]
        first, count = layout.part_rows(part)
        whole = self._draw(part, "B", self.rows[part], rank, rank)
        return self._parameter(cut(whole, 0, first, count), 0, layout.partition_dim == 0, device)

    def _new_magnitude(self, part: str, device: torch.device) -> torch.nn.Parameter:
        # mlora.dora.reset_magnitudes() computes them, which takes the whole group.
        return self._parameter(torch.ones(self.layout.part_rows(part)[1]), 0, self.layout.partition_dim == 0, device)

    def _draw(self, part: str, factor: str, rows: int, columns: int, rank: int) -> torch.Tensor:
        if self.config.decomposes:
            return torch.zeros(rows, columns)
        name = f"{self.layout.name}.{part}.lora_{factor}"
        pair = f"{self.layout.name}.{SHARED if self.shares_A else part}"
        return draw(self.config.seed, name, self.config.init_lora_weights, factor, rows, columns, rank, pair)

    def _parameter(self, value: torch.Tensor, dim: int, split: bool, device: torch.device) -> torch.nn.Parameter:
        """A parameter with the marks by which Megatron counts its norm and completes its gradient."""
        parameter: Any = torch.nn.Parameter(value.to(device=device, dtype=self.dtype, copy=True).contiguous())
        parameter.tensor_model_parallel = split
        parameter.partition_dim = dim if split else -1
        parameter.partition_stride = 1
        parameter.allreduce = True
        parameter.sequence_parallel = self.layout.sequence_parallel and not split
        return parameter  # type: ignore[no-any-return]

    @torch.no_grad()
    def start_A(self, part: str, value: torch.Tensor) -> None:
        """Set lora_A of a projection (or the shared one) to this rank's piece of what it starts as, and keep that."""
        self.lora_A[part].copy_(value)
        self.lora_A0.keep(part, self.lora_A[part])

    @torch.no_grad()
    def start_B(self, part: str, value: torch.Tensor) -> None:
        """Likewise of lora_B."""
        self.lora_B[part].copy_(value)
        self.lora_B0.keep(part, self.lora_B[part])

    def factors(self) -> Iterator[Factor]:
        """This rank's parameters and where they stand."""
        yield from self._matrices("lora_A", self.lora_A.items(), "lora_B", self.lora_B.items())
        layout = self.layout
        for part, parameter in self.lora_magnitude_vector.items():
            name, first = f"{layout.name}.{part}.lora_magnitude_vector", layout.part_rows(part)[0]
            yield Factor(name, parameter, (self.rows[part],), (first,), layout.partition_dim != 0)

    def start(self) -> Iterator[Factor]:
        """What the adapter started as and keeps, as :meth:`factors`."""
        yield from self._matrices("lora_A0", self.lora_A0.items(), "lora_B0", self.lora_B0.items())

    def _matrices(
        self, a_name: str, A: Iterable[tuple[str, torch.Tensor]], b_name: str, B: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[Factor]:
        layout = self.layout
        for part, matrix in A:
            shape, offset = (matrix.shape[0], self.columns), (0, layout.columns[0])
            yield Factor(f"{layout.name}.{part}.{a_name}", matrix, shape, offset, layout.partition_dim != 1)
        for part, matrix in B:
            shape, offset = (self.rows[part], matrix.shape[1]), (layout.part_rows(part)[0], 0)
            yield Factor(f"{layout.name}.{part}.{b_name}", matrix, shape, offset, layout.partition_dim != 0)

    def index(self, part: str) -> torch.Tensor:
        """Where the rows of ``lora_B[part]`` stand among this rank's output rows, int64 [rows]."""
        index: torch.Tensor = getattr(self, f"_index_{part}")
        return index

    @property
    def uses_dora(self) -> bool:
        """The rows of the adapted weight have the lengths ``lora_magnitude_vector``."""
        return self.config.use_dora

    @property
    def drops(self) -> bool:
        """Dropout is on."""
        return self.training and self.config.lora_dropout > 0

    def dropout(self, length: int) -> Dropout | None:
        """The mask of the current micro batch's input, of sequences of ``length`` tokens; None outside of training."""
        if not self.drops:
            return None
        return Dropout.of(self.config.lora_dropout, self.config.seed, self.layout.name, length)

    def fused(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of the whole fused linear on this rank: [R, in_l] with the scaling in it, and [out_l, R] with zeros between parts.

        R is the sum of the projections' ranks, or the one rank of a shared A; twice as much with [A; A₀] and [B, -B₀].
        """
        A, B = self._fused(dict(self.lora_A.items()), dict(self.lora_B.items()))
        if not self.config.decomposes:
            return A, B
        A0, B0 = self._fused(dict(self.lora_A0.items()), dict(self.lora_B0.items()))
        return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)

    def _fused(
        self, lora_A: Mapping[str, torch.Tensor], lora_B: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.shares_A:
            # Scalings may differ between the projections, so here they go into B.
            return lora_A[SHARED], self._fused_B(lora_B, {part: (0, self.scaling[part]) for part in self.parts})
        A = [lora_A[part] * self.scaling[part] for part in self.parts]
        starts, at = {}, 0
        for part in self.parts:
            starts[part] = (at, 1.0)
            at += self.ranks[part]
        return (A[0] if len(A) == 1 else torch.cat(A)), self._fused_B(lora_B, starts)

    def _fused_B(self, lora_B: Mapping[str, torch.Tensor], places: dict[str, tuple[int, float]]) -> torch.Tensor:
        rows = sum(segment.length for segment in self.layout.segments)
        if len(self.layout.parts) == 1:
            part = self.parts[0]
            only = lora_B[part]
            return only if places[part][1] == 1.0 else only * places[part][1]
        width = max(start + self.ranks[part] for part, (start, _) in places.items())
        device = next(iter(self.lora_A.values())).device
        B = torch.zeros(rows, width, dtype=self.dtype, device=device)
        for part, matrix in lora_B.items():
            start, scale = places[part]
            B[self.index(part), start : start + self.ranks[part]] = matrix if scale == 1.0 else matrix * scale
        return B

    def delta(self) -> torch.Tensor:
        """This rank's piece of σ B A, or of σ (B A - B₀ A₀), float32 [out_l, in_l] (float64 for float64 parameters)."""
        wide = torch.promote_types(self.dtype, torch.float32)
        device = next(iter(self.lora_A.values())).device
        rows = sum(segment.length for segment in self.layout.segments)
        whole = torch.zeros(rows, self.layout.columns[1], dtype=wide, device=device)
        for part in self.lora_B:
            whole[self.index(part)] = self.delta_of(part)
        return whole

    def delta_of(self, part: str) -> torch.Tensor:
        """The rows of :meth:`delta` that belong to one projection, in their order [rows, in_l]; it must have some on this rank."""
        wide = torch.promote_types(self.dtype, torch.float32)
        key = SHARED if self.shares_A else part
        product: torch.Tensor = self.lora_B[part].detach().to(wide) @ self.lora_A[key].detach().to(wide)
        if self.config.decomposes:
            product -= self.lora_B0.get_buffer(part).to(wide) @ self.lora_A0.get_buffer(key).to(wide)
        # σ after widening: in bfloat16 it would round A once more.
        product *= self.scaling[part]
        return product

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "LinearAdapter":
        """Moves with the model but keeps the adapter's dtype: ``Float16Module`` casts whatever it wraps."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return,no-untyped-call]


def _starts(layout: LinearLayout) -> dict[str, int]:
    """First row of each projection where they lie one after the other."""
    starts, at = {}, 0
    for part, rows in layout.parts:
        starts[part] = at
        at += rows
    return starts
