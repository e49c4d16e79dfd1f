"""Each kernel at a large model's shapes, against float64, twice: a race shows as another result, or as a few elements far off."""

from collections.abc import Callable

import pytest
import torch

from mlora.dropout import Dropout
from mlora.kernels.mask import Mask
from mlora.kernels.norm import norm_gradient, norm_products
from mlora.kernels.operand import COPY, RMSNORM, SWIGLU, make_operand
from mlora.kernels.products import add_low_rank, token_product
from mlora.kernels.swiglu import swiglu_backward

TOKENS, EPS = 1536, 1e-5
SHAPES = [(4096, 16), (4096, 48), (4096, 96), (14336, 16), (14336, 80), (4096, 300), (1000, 7)]  # features, ranks
DROPOUT = Dropout(0.1, key=0x1234_5678_9ABC_DEF0, first_row=3, length=TOKENS)
Results = tuple[torch.Tensor, ...]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def check(kernel: Callable[[], Results], exact: Results, slack: float = 5e-3) -> None:
    """Twice the same bits, everywhere within bfloat16's rounding of the operands and the result, and nowhere far off."""
    first, second = kernel(), kernel()
    for ours, again, expected in zip(first, second, exact, strict=True):
        assert torch.equal(ours, again)
        error = (ours.double() - expected).abs()
        assert error.norm() < slack * expected.norm()
        assert error.max() < 0.03 * expected.abs().max()


def dropped(v: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    return v if dropout is None else dropout(v[:, None])[:, 0]


def mask_of(dropout: Dropout | None) -> Mask | None:
    return None if dropout is None else Mask.of(dropout, 1, 0, 0)


def padded(A: torch.Tensor) -> tuple[torch.Tensor, int]:
    tail = -(-A.shape[0] // 64) * 64
    return torch.nn.functional.pad(A, (0, 0, 0, tail - A.shape[0])), tail


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize(("features", "ranks"), SHAPES)
@pytest.mark.parametrize("kind", [COPY, RMSNORM, SWIGLU])
def test_operands(kind: int, features: int, ranks: int, dropout: Dropout | None) -> None:
    x, w = random(TOKENS, features * (2 if kind == SWIGLU else 1)), random(features)
    A, tail = padded(random(ranks, features, scale=0.02))
    wide = x.double()
    if kind == RMSNORM:
        wide = torch.nn.functional.rms_norm(wide, (features,), w.double(), EPS)
    if kind == SWIGLU:
        wide = torch.nn.functional.silu(wide[:, :features]) * wide[:, features:]
    # v Aᵀ is of the v that was written.
    v = make_operand(x, A, tail, kind=kind, norm_weight=w, eps=EPS)[0][:, :features].double()
    low = dropped(v, dropout) @ A.double().T

    def kernel() -> Results:
        out, columns, _ = make_operand(x, A, tail, kind=kind, norm_weight=w, eps=EPS, mask=mask_of(dropout))
        assert torch.equal(out[:, features:], columns) and not columns[:, ranks:].any()
        return out[:, :features], columns

    check(kernel, (wide, low))


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize(("features", "ranks"), SHAPES)
def test_gradients_of_the_input_and_of_A(features: int, ranks: int, dropout: Dropout | None) -> None:
    A, tail = padded(random(ranks, features, scale=0.02))
    g, x, w = random(TOKENS, features + tail), random(TOKENS, features), random(features)
    d, wide = g[:, features : features + ranks].double(), x.double()
    dv = g[:, :features].double() + dropped(d @ A[:ranks].double(), dropout)
    mask = mask_of(dropout)
    check(lambda: (add_low_rank(g, A[:ranks], mask),), (dv,))
    check(
        lambda: (token_product(g[:, features:], x, ranks, mask=mask).sum(0),),
        (d.T @ dropped(wide, dropout),),
    )

    rstd = torch.rsqrt(wide.square().mean(1) + EPS)
    v = wide * rstd[:, None] * w.double()
    low = torch.nn.functional.pad(dropped(v, dropout) @ A[:ranks].double().T, (0, tail - ranks)).bfloat16()
    correlation = (g[:, :features].double() * v).sum(1) + (d * low[:, :ranks].double()).sum(1)
    dx = rstd[:, None] * (
        dv * w.double() - wide * rstd[:, None] * (correlation / features)[:, None]
    )  # fmt: skip

    def kernel() -> Results:
        dA, ours = norm_products(g, x, w, rstd.float(), low, ranks, mask)
        return dA.sum(0) * w, ours, norm_gradient(g, x, w, rstd.float(), A[:ranks], ours, mask)

    check(kernel, (d.T @ dropped(v, dropout), correlation, dx))


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("complete", [False, True], ids=["g", "g + d A"])
@pytest.mark.parametrize(("features", "ranks"), SHAPES)
def test_backward_of_swiglu(features: int, ranks: int, complete: bool, dropout: Dropout | None) -> None:
    A, tail = padded(random(ranks, features, scale=0.02))
    low_ranks, halves = 2 * ranks, ((0, ranks), (ranks, ranks))
    low = random(TOKENS, -(-low_ranks // 64) * 64)
    both, y = random(TOKENS, features + tail), random(TOKENS, 2 * features)
    g, d = both[:, :features], both[:, features : features + ranks]
    wide = y.double().requires_grad_()
    v = torch.nn.functional.silu(wide[:, :features]) * wide[:, features:]
    dv = g.double() if complete else g.double() + dropped(d.double() @ A[:ranks].double(), dropout)
    (dy,) = torch.autograd.grad(v, wide, dv)
    dA = d.double().T @ dropped(v.detach(), dropout)
    dB_gate = low[:, :ranks].double().T @ dy[:, :features]
    dB_up = low[:, ranks:low_ranks].double().T @ dy[:, features:]

    def kernel() -> Results:
        out, dA, dB, correlation = swiglu_backward(
            g, d, y, None if complete else A[:ranks], low, halves, mask_of(dropout)
        )
        sums = dB.sum(0)
        return out, dA.sum(0), sums[:ranks, :features], sums[ranks:, features:], correlation

    check(kernel, (dy, dA, dB_gate, dB_up, (dy * y.double()).sum(1)))
