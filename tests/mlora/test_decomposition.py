"""Adapters that start as parts of the base weight: PEFT's parts, nothing changed at the start, nothing lost after it."""

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.attach import linear_adapters
from parallel.sizes import ParallelSizes
from tests.gpt import Pieces, whole
from tests.mlora.test_linear import (
    FC1,
    FC2,
    LAYOUTS,
    PLAIN,
    PROJ,
    QKV,
    SP,
    Case,
    build,
    cases,
    local_input,
    random,
    relative,
    run_case,
)
from tests.ranks import run_ranks

NAMES = {QKV: ("q", "k", "v"), PROJ: ("whole",), FC1: ("gate", "up"), FC2: ("whole",)}


def all_cases(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    plain = [replace(case, init="pissa") for case in cases(sizes.tensor) if not case.dropout]
    made = [
        *plain,
        Case(QKV, init="olora", shared_A=True),
        *(Case(name, init="olora", dora=True) for name in (PROJ, FC1)),
    ]
    return {f"{case}: {name}": error for case in made for name, error in run_case(rank, case, sizes).items()}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_tensor_equals_the_unsharded_one_on_every_rank(sizes: ParallelSizes) -> None:
    for rank, errors in enumerate(run_ranks(sizes.tensor, all_cases, sizes, sizes=sizes)):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-12, (rank, worst, errors[worst])


def started(rank: int, sizes: ParallelSizes, config: LoraConfig) -> tuple[Pieces, dict[str, float]]:
    """What adapters start with on this rank, and how far they then move the output of each linear, in the dtype's unit."""
    pieces: Pieces = {}
    moved = {}
    for name in NAMES:
        case = Case(name, bias=True)
        model, module, layout = build(case, sizes)
        module.lora.active = None
        x = local_input(case, sizes, layout, rank).detach()
        off = module(x)[0]
        mlora.apply([model], config, "started")
        module.lora.active = "started"
        moved[name] = relative(module(x)[0], off)
        (adapter,) = linear_adapters([model], "started")
        for factor in (*adapter.factors(), *adapter.start()):
            pieces[factor.name] = factor.shape, factor.offset, factor.parameter.detach().clone()
    return pieces, moved


def pefts(weight: torch.Tensor, config: LoraConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's A and B for a weight, float32."""
    model = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight.data = weight.float()
    theirs = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=["0"],
        init_lora_weights=config.init_lora_weights,  # type: ignore[arg-type]
    )
    layer: Any = peft.inject_adapter_in_model(theirs, model)[0]
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def weight_of(part: str, rows: int, columns: int) -> torch.Tensor:
    """The weight that ``build`` gives a projection."""
    return random(f"W{part}", rows, columns)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("sizes", [ParallelSizes(), PLAIN, SP], ids=str)
def test_the_start_is_pefts(sizes: ParallelSizes, init: str) -> None:
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init)
    ranks = run_ranks(sizes.tensor, started, sizes, config, sizes=sizes)
    found = whole([pieces for pieces, _ in ranks])
    for name, parts in NAMES.items():
        for part in parts:
            A, B = (found[f"{name}.{part}.{factor}"] for factor in ("lora_A", "lora_B"))
            assert torch.equal(A, found[f"{name}.{part}.lora_A0"]) and torch.equal(B, found[f"{name}.{part}.lora_B0"])
            theirs_A, theirs_B = pefts(weight_of(part, len(B), A.shape[1]), config)
            # Singular vectors have two signs.
            signs = torch.sign((A * theirs_A).sum(1)).double()
            assert relative(A * signs[:, None], theirs_A.double()) < 1e-4, (name, part)
            assert relative(B * signs, theirs_B.double()) < 1e-4, (name, part)
    for _, moved in ranks:
        assert max(moved.values()) < 1e-14


def test_power_iterations_come_to_the_singular_values() -> None:
    """What they leave of a weight comes down to what singular values leave, the least that a rank can."""
    left: dict[str, list[float]] = {"0": [], "2": [], "40": []}
    for iterations, found in left.items():
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=f"pissa_niter_{iterations}")
        ((pieces, moved),) = run_ranks(1, started, ParallelSizes(), config)
        assert max(moved.values()) < 1e-14
        factors = whole([pieces])
        for name, columns in ((PROJ, 72), (FC2, 36)):
            weight = weight_of("whole", 24, columns)
            rest = weight - 6 / 4 * factors[f"{name}.whole.lora_B"] @ factors[f"{name}.whole.lora_A"]
            least = torch.linalg.svdvals(weight)[4:].norm()
            found.append(float(rest.norm() / least) - 1)
    assert min(left["0"]) > max(left["2"]) > max(left["40"]) and min(left["0"]) > 0.05 and max(left["40"]) < 1e-3, left


def test_a_shared_a_is_that_of_all_rows_together() -> None:
    config = LoraConfig(r=3, init_lora_weights="pissa", shared_A=True)
    found = whole([pieces for pieces, _ in run_ranks(2, started, PLAIN, config, sizes=PLAIN)])
    weight = torch.cat([weight_of(part, 72, 24) for part in NAMES[QKV]])
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    B = torch.cat([found[f"{QKV}.{part}.lora_B"] for part in NAMES[QKV]])
    product = config.lora_alpha / 3 * B @ found[f"{QKV}.shared.lora_A"]
    assert relative(product, u[:, :3] * s[:3] @ vh[:3]) < 1e-12


def refused(rank: int, config: LoraConfig, broken: bool) -> str:
    """Rank 1's weight is not a number: it is rank 0 that decomposes."""
    model, module, _ = build(Case(PROJ), PLAIN)
    if broken and rank == 1:
        module.weight.data[0, 0] = torch.nan  # type: ignore[union-attr,operator,index]
    with pytest.raises(ValueError) as raised:
        mlora.apply([model], config, "other")
    assert list(module.lora.adapters) == ["default"]  # type: ignore[union-attr,arg-type]
    return str(raised.value)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_1", "olora"])
def test_a_weight_without_a_decomposition_is_named_on_every_rank(init: str) -> None:
    config = LoraConfig(r=2, init_lora_weights=init)
    for message in run_ranks(2, refused, config, True, sizes=PLAIN):
        assert message.startswith(f"{PROJ}: the weight of 'whole' has no decomposition for {init!r}")


def test_a_rank_beyond_the_weights_is_refused() -> None:
    config = LoraConfig(r=25, init_lora_weights="olora")
    for message in run_ranks(2, refused, config, False, sizes=PLAIN):
        assert message.startswith(f"{PROJ}: with 'olora' the rank of whole can be 24 at most, not 25")


def several_scalings(rank: int) -> str:
    model, _, _ = build(Case(QKV), ParallelSizes())
    config = LoraConfig(r=2, init_lora_weights="pissa", shared_A=True, alpha_pattern={"v_proj": 3})
    with pytest.raises(ValueError) as raised:
        mlora.apply([model], config, "other")
    return str(raised.value)


def test_one_a_with_several_scalings_is_refused() -> None:
    assert (
        "projections of one A need one scaling, not {'q': 4.0, 'k': 4.0, 'v': 1.5}" in run_ranks(1, several_scalings)[0]
    )
