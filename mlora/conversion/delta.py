"""What low-rank terms do to one base weight, and norms of it, without the product where it is not needed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mlora.conversion.state import AdapterModule, Factors


@dataclass(frozen=True)
class Term:
    """A low-rank term that is added to a weight, ``weight`` times."""

    weight: float
    module: AdapterModule


class Delta:
    """Σ weight · scaling · B A over ``terms``, for one base weight [rows, columns]; factored as ``left @ right``.

    Args:
        terms: all for the same weight. DoRA's magnitude only with a single one.
        dtype: of the arithmetic; float64 if a factor is.
        device: of the arithmetic.

    Attributes:
        left: [rows, Σ r]; the scaling is in it.
        right: [Σ r, columns].
        magnitude: DoRA's m; None without.
        by_column: m belongs to the columns of the weight (an embedding), not to its rows.
    """

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype, device: torch.device | str) -> None:
        loaded = [(term, term.module.load()) for term in terms]
        for _, factors in loaded:
            dtype = torch.promote_types(dtype, torch.promote_types(factors.A.dtype, factors.B.dtype))
        pairs = [_oriented(term.module, factors) for term, factors in loaded]
        scales = [term.weight * term.module.scaling for term in terms]
        self.left = torch.cat(
            [left.to(device, dtype) * scale for (left, _), scale in zip(pairs, scales, strict=True)], 1
        )
        self.right = torch.cat([right.to(device, dtype) for _, right in pairs])
        magnitude = loaded[0][1].magnitude
        self.magnitude = None if magnitude is None else magnitude.to(device, dtype)
        self.by_column = terms[0].module.embedding

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing because a factor is zero, as before training; False with DoRA."""
        return self.magnitude is None and not (bool(self.left.any()) and bool(self.right.any()))

    def add_to(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """W + delta in place of W, for the rows from ``first`` on."""
        return rows.addmm_(self.left[first : first + rows.shape[0]], self.right)

    def column_norms(self, blocks: Iterable[tuple[int, torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """||W + delta|| of each column over all rows, [columns]: what DoRA on an embedding divides by; None if it does not.

        Args:
            blocks: of W, as :meth:`~mlora.conversion.plan.Change.blocks` gives them.
        """
        if self.magnitude is None or not self.by_column:
            return None
        squares = torch.zeros(self.right.shape[1], dtype=torch.float64, device=self.right.device)
        for first, _, rows in blocks:
            wide = rows.to(self.right.device, self.right.dtype, copy=True)
            squares += self.add_to(wide, first).square_().sum(0, dtype=torch.float64)
        return squares.sqrt().to(self.right.dtype)

    def normalise(self, rows: torch.Tensor, first: int, column_norms: torch.Tensor | None = None) -> torch.Tensor:
        """DoRA's m / ||W + delta|| · (W + delta) in place of W + delta (Liu et al. 2024, eq. 5); without DoRA, nothing.

        Args:
            column_norms: from :meth:`column_norms`.
        """
        if self.magnitude is None:
            return rows
        if column_norms is not None:
            return rows.mul_(self.magnitude / column_norms)
        norms = torch.linalg.vector_norm(rows, dim=1)
        return rows.mul_((self.magnitude[first : first + rows.shape[0]] / norms)[:, None])


def _oriented(module: AdapterModule, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    return (factors.A.T, factors.B.T) if module.embedding else (factors.B, factors.A)


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """||left right||_F in float64, from two triangular matrices of the rank's size.

    Of a difference too: with [B1, -B2] and [A1; A2] the error is about 1e-16 of the parts, where Gram matrices give 1e-8.
    """
    outer = torch.linalg.qr(left.double(), mode="r").R
    inner = torch.linalg.qr(right.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(outer @ inner.T))
