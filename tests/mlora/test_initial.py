"""Initial weights: PEFT's distributions, one independent stream per parameter, the same at every layout."""

import hashlib
import math
from typing import Any

import peft
import pytest
import torch

import mlora
from mlora.attach import linear_adapters
from mlora.config import LoraConfig
from mlora.initial import draw
from parallel.sizes import ParallelSizes
from tests.gpt import place
from tests.mlora.test_linear import FC1, PROJ, QKV, Case, build
from tests.philox import words
from tests.ranks import run_ranks

RANK, INPUTS, OUTPUTS = 64, 1000, 96


def ours(kind: bool | str, factor: str, name: str = "x.lora", seed: int = 0) -> torch.Tensor:
    rows, columns = (RANK, INPUTS) if factor == "A" else (OUTPUTS, RANK)
    return draw(seed, name, kind, factor, rows, columns, RANK)


def pefts(kind: bool | str, factor: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS))
    config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=kind)  # type: ignore[arg-type]
    layer: Any = peft.inject_adapter_in_model(config, model)[0]
    return (layer.lora_A if factor == "A" else layer.lora_B)["default"].weight.detach()


def normal_tail(values: torch.Tensor) -> float:
    """Share of the values beyond two standard deviations; 0.0455 of a normal distribution, 0 of a uniform one."""
    return float((values.abs() > 2 * values.std()).float().mean())


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_the_distribution_is_pefts(kind: bool | str, factor: str) -> None:
    mine, theirs = ours(kind, factor), pefts(kind, factor)
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == torch.float32
    if factor == "B" and kind is not False:
        assert not mine.any() and not theirs.any()
        return
    spread, deviation = 1 / math.sqrt(mine.numel()), float(mine.std())
    assert deviation == pytest.approx(float(theirs.std()), rel=6 * spread)
    assert abs(float(mine.mean())) < 5 * spread * deviation
    if kind == "gaussian":
        assert deviation == pytest.approx(1 / RANK, rel=4 * spread)
        assert normal_tail(mine) == pytest.approx(0.0455, abs=0.005) and normal_tail(theirs) == pytest.approx(
            0.0455, abs=0.005
        )
        assert mine.abs().max() > 3.5 / RANK
    else:
        bound = 1 / math.sqrt(mine.shape[1])
        for values in (mine, theirs):
            assert 0.999 * bound < values.max() <= bound * (1 + 1e-7) and -0.999 * bound > values.min() >= -bound * (
                1 + 1e-7
            )
        histogram = torch.histc(mine, bins=16, min=-bound, max=bound) / mine.numel() * 16
        assert (histogram - 1).abs().max() < 5 * 4 * spread


@pytest.mark.parametrize("kind", [True, "gaussian"])
def test_streams_of_names_and_seeds_are_independent(kind: bool | str) -> None:
    drawn = [ours(kind, "A", f"decoder.layers.{layer}.q.lora_A") for layer in range(12)]
    drawn += [ours(kind, "A", "decoder.layers.0.q.lora_A", seed=1), ours(kind, "A", "1/decoder.layers.0.q.lora_A")]
    correlation = torch.corrcoef(torch.stack([one.flatten() for one in drawn]).double())
    assert (correlation - torch.eye(len(drawn))).abs().max() < 5 / math.sqrt(RANK * INPUTS)
    within = torch.corrcoef(drawn[0].double())  # rows, too, and neighbours within a row
    assert (within - torch.eye(RANK)).abs().max() < 5 / math.sqrt(INPUTS)
    shifted = torch.corrcoef(torch.stack([drawn[0].flatten()[:-1], drawn[0].flatten()[1:]]).double())[0, 1]
    assert abs(shifted) < 5 / math.sqrt(RANK * INPUTS)


def test_the_same_name_and_seed_give_the_same_bits() -> None:
    assert torch.equal(ours(True, "A", "a"), ours(True, "A", "a"))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(ours("gaussian", "A", "a"), ours("gaussian", "A", "a"))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is taken from torch's generator
    assert draw(0, "odd", "gaussian", "A", 3, 5, 3).shape == (3, 5)


def test_the_bits_are_those_of_philox_under_the_name() -> None:
    """So that a run can be repeated under another NumPy or torch."""
    digest = hashlib.sha256(b"7/decoder.q.lora_A").digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    halves = [half for word in words(key, 6) for half in (word & 0xFFFFFFFF, word >> 32)]
    uniform = draw(7, "decoder.q.lora_A", True, "A", 3, 4, 3).flatten().double() * math.sqrt(4)
    assert uniform.tolist() == pytest.approx([(half + 0.5) / 2**31 - 1 for half in halves], abs=1e-7)
    normal = draw(7, "decoder.q.lora_A", "gaussian", "A", 3, 4, 3).flatten().double() * 3
    pairs = [
        ((one + 0.5) / 2**32, math.tau * (other + 0.5) / 2**32)
        for one, other in zip(halves[:6], halves[6:], strict=True)
    ]
    expected = [math.sqrt(-2 * math.log(u)) * turn(v) for turn in (math.cos, math.sin) for u, v in pairs]
    assert normal.tolist() == pytest.approx(expected, abs=1e-6)


def test_orthogonal_matrices_have_pefts_size_and_no_product() -> None:
    mine = {factor: ours("orthogonal", factor, f"x.lora_{factor}") for factor in "AB"}
    # Each element is a sum of r/2 products of a normal number with one of a row of an orthogonal matrix, over 10.
    for factor, matrix in mine.items():
        theirs, spread = pefts("orthogonal", factor), 1 / math.sqrt(matrix.numel())
        assert matrix.shape == theirs.shape and matrix.dtype == theirs.dtype and matrix.std() > 0.05
        assert float(matrix.std()) == pytest.approx(float(theirs.std()), rel=10 * spread)
        assert torch.linalg.matrix_rank(matrix) == torch.linalg.matrix_rank(theirs) == RANK // 2
    assert (mine["B"] @ mine["A"]).abs().max() < 1e-5 * mine["B"].norm() * mine["A"].norm()
    assert (mine["B"] @ ours("orthogonal", "A", "y.lora_A")).norm() < 1e-5 * mine["B"].norm() * mine["A"].norm()
    other = draw(0, "x.lora_A", "orthogonal", "A", RANK, INPUTS, RANK, "another module")
    assert (mine["B"] @ other).abs().max() > 1e-2


Piece = tuple[str, tuple[int, ...], torch.Tensor]


def pieces(rank: int, sizes: ParallelSizes, kind: bool | str) -> list[Piece]:
    """(name, offset, piece) of the adapter's parameters and of the start that it keeps, as ``apply`` makes them on this rank."""
    found = []
    for name in (QKV, PROJ, FC1):
        model, _, _ = build(Case(name), sizes)
        mlora.apply([model], LoraConfig(r=4, init_lora_weights=kind, use_dora=True, seed=3), "drawn")
        (adapter,) = linear_adapters([model], "drawn")
        found += [(f.name, f.offset, f.parameter.detach().clone()) for f in (*adapter.factors(), *adapter.start())]
    return found


@pytest.mark.parametrize("kind", [True, "gaussian", False, "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_every_layout_draws_the_same_adapter(kind: bool | str) -> None:
    (whole,) = run_ranks(1, pieces, ParallelSizes(), kind)
    reference = {name: tensor for name, _, tensor in whole}
    drawn = [tensor for name, tensor in reference.items() if name.endswith("lora_B")]
    assert all(bool(tensor.any()) == (kind not in (True, "gaussian")) for tensor in drawn)
    for size, sequence_parallel in ((2, True), (3, False)):
        sizes = ParallelSizes(tensor=size, sequence_parallel=sequence_parallel)
        for rank in run_ranks(size, pieces, sizes, kind, sizes=sizes):
            assert {name for name, _, _ in rank} == set(reference)
            for name, offset, piece in rank:
                # Lengths are sums over ranks, here in the float64 that the parameters have.
                limit = 1e-14 if name.endswith("magnitude_vector") else 0
                torch.testing.assert_close(piece, reference[name][place(offset, piece)], rtol=limit, atol=0, msg=name)
