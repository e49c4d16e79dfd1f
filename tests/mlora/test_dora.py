"""DoRA on one adapted linear: 1 to 4 ranks against the same mathematics unsharded, in float64, per tensor; its start and faults."""

import ast
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from mlora import dora
from mlora.attach import factors
from mlora.dropout import set_micro_batch
from mlora.te import TeLora
from parallel import collectives
from parallel.sizes import ParallelSizes
from tests.mlora import test_linear
from tests.mlora.test_linear import (
    FC1,
    FC2,
    LAYOUTS,
    PLAIN,
    PROJ,
    QKV,
    SP,
    STEP,
    TOKENS,
    Case,
    build,
    cases,
    doubled,
    doubled_all_gather,
    features,
    local_input,
    missing_all_gather,
    missing_all_reduce,
    random,
    relative,
    run_case,
)
from tests.mlora.test_linear import ROWS as BATCH
from tests.ranks import run_ranks

EXTRA = [Case(PROJ, dora=True, bias=True, dropout=0.3), Case(FC2, dora=True, dropout=0.2, rank=1)]


def all_cases(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    made = [*(replace(case, dora=True) for case in cases(sizes.tensor)), *EXTRA]
    return {f"{case}: {name}": error for case in made for name, error in run_case(rank, case, sizes).items()}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_tensor_equals_the_unsharded_one_on_every_rank(sizes: ParallelSizes) -> None:
    for rank, errors in enumerate(run_ranks(sizes.tensor, all_cases, sizes, sizes=sizes)):
        assert sum("magnitude" in name for name in errors) >= 12
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-12, (rank, worst, errors[worst])


def beside(case: Case, sizes: ParallelSizes) -> Any:
    """What :func:`build` gives, with the term beside the linear and not inside, as with Transformer Engine's linears."""
    model, module, layout = build(case, sizes)
    base = RowParallelLinear if layout.partition_dim == 1 else ColumnParallelLinear
    module.__class__ = type("Beside", (TeLora, base), {"use_bias": case.bias})
    return model, module, layout


def cases_beside(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    test_linear.build = beside
    made = [replace(case, dora=True) for case in cases(sizes.tensor) if not case.dropout]
    return {f"{case}: {name}": error for case in made for name, error in run_case(rank, case, sizes).items()}


@pytest.mark.parametrize("sizes", [ParallelSizes(), PLAIN, SP], ids=str)
def test_the_term_may_be_beside_the_linear(sizes: ParallelSizes) -> None:
    for errors in run_ranks(sizes.tensor, cases_beside, sizes, sizes=sizes):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-12, (worst, errors[worst])


def broken_errors(rank: int, case: Case, sizes: ParallelSizes, site: str, name: str, fault: Any) -> float:
    """The worst error with one collective broken at one place of the module (``site`` is the function that calls it)."""
    owner: Any = dora.DoraLinear if site == "forward" else dora
    original = getattr(owner, site)

    def broken_site(*args: Any) -> Any:
        whole = getattr(collectives, name)
        setattr(collectives, name, fault(whole) if fault is doubled else fault)
        try:
            return original(*args)
        finally:
            setattr(collectives, name, whole)

    setattr(owner, site, broken_site)
    return max(run_case(rank, case, sizes).values())


DROPS = {"dora": True, "dropout": 0.3}
FAULTS = [
    (Case(PROJ, dora=True), PLAIN, "row_norms", "all_reduce_", missing_all_reduce),
    (Case(PROJ, dora=True), SP, "row_norms", "all_reduce_", missing_all_reduce),
    (Case(FC2, **DROPS), SP, "row_norms", "all_reduce_", doubled),
    (Case(QKV, **DROPS), SP, "forward", "all_gather", missing_all_gather),
    (Case(QKV, **DROPS), SP, "forward", "all_gather", doubled_all_gather),
    (Case(PROJ, **DROPS), PLAIN, "_gradient_of_scale", "all_reduce_", missing_all_reduce),
    (Case(PROJ, **DROPS), PLAIN, "_gradient_of_scale", "all_reduce_", doubled),
]


def test_every_collective_of_the_module_has_its_faults() -> None:
    called = {
        (function.name, node.func.attr)
        for function in ast.walk(ast.parse(inspect.getsource(dora)))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "collectives"
    }
    assert {(site, name) for _, _, site, name, _ in FAULTS} == called


@pytest.mark.parametrize(("case", "sizes", "site", "name", "fault"), FAULTS)
def test_a_collective_removed_or_doubled_is_seen(
    case: Case, sizes: ParallelSizes, site: str, name: str, fault: Any
) -> None:
    assert min(run_ranks(2, broken_errors, case, sizes, site, name, fault, sizes=sizes)) > 1e-3


def unmarked_errors(rank: int, case: Case) -> dict[str, float]:
    """Of the magnitudes, whose gradients Megatron's finalize step is not asked to complete."""
    model, module, layout = build(case, SP)
    del model, layout
    assert {parameter.sequence_parallel for parameter in module.lora.current().lora_magnitude_vector.values()} == {True}
    original = factors

    def factors_without_marks(model: Any) -> Any:
        for factor in original(model):
            if "magnitude" in factor.name:
                factor.parameter.sequence_parallel = False  # type: ignore[attr-defined]
            yield factor

    test_linear.factors = factors_without_marks  # type: ignore[attr-defined]
    return run_case(rank, case, SP)


@pytest.mark.parametrize("case", [Case(PROJ, dora=True), Case(PROJ, **DROPS)])
def test_a_gradient_sum_that_megatron_is_not_asked_for_is_seen(case: Case) -> None:
    for errors in run_ranks(2, unmarked_errors, case, sizes=SP):
        assert {name for name, error in errors.items() if error > 1e-3} == {f"{PROJ}.whole.lora_magnitude_vector"}


def norms_of(rank: int, sizes: ParallelSizes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(n of this rank's rows, those of W + σ B A by their definition)."""
    found = []
    for case in (
        Case(QKV, dora=True, rank_pattern={"k_proj": 2}),
        Case(FC1, dora=True, targets=["up_proj"]),
        Case(FC2, dora=True),
    ):
        _, module, layout = build(case, sizes)
        adapter, weight = module.lora.current(), module.weight.detach()
        squares = (weight + adapter.delta()).square().sum(1)
        if layout.partition_dim == 1:
            torch.distributed.all_reduce(squares, group=layout.group)
        found.append((dora.row_norms(adapter, weight, torch.float64), squares.sqrt()))
    return found


def test_norms_are_those_of_the_adapted_rows() -> None:
    for found in run_ranks(2, norms_of, PLAIN, sizes=PLAIN):
        for ours, exact in found:
            torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)


def starts(rank: int, sizes: ParallelSizes, dtype: torch.dtype) -> dict[str, bool]:
    """Case -> whether an adapter whose magnitudes are reset changes nothing: a scale of exactly 1, also where a row is zero."""
    found = {}
    for name in (QKV, PROJ, FC1, FC2):
        _, module, _ = build(Case(name, dora=True), sizes)
        module.to(dtype)
        adapter = module.lora.current()
        adapter.dtype = dtype
        for parameter in adapter.parameters():
            parameter.data = parameter.data.to(dtype)
        with torch.no_grad():
            module.weight[1] = 0
            for B in adapter.lora_B.values():
                B.zero_()
        dora.reset_magnitudes(adapter, module.weight)
        scale = dora.scales(adapter, module.weight)
        # A row of zeros has no length, and is zero again.
        assert scale[1].item() in (0.0, 1.0) and scale.isfinite().all()
        found[name] = bool((scale[2:] == 1).all()) and bool(scale[0] == 1)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_new_adapter_scales_by_exactly_one(dtype: torch.dtype) -> None:
    for found in run_ranks(2, starts, PLAIN, dtype, sizes=PLAIN):
        assert all(found.values()), found


def kept_activations(rank: int, case: Case, sizes: ParallelSizes) -> list[tuple[int, ...]]:
    """Shapes of the activations that one linear keeps for backward, without those of the rank's size."""
    _, module, layout = build(case, sizes)
    set_micro_batch(STEP)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)), lambda _: None):
        module(local_input(case, sizes, layout, rank))
    return [shape for shape in shapes if len(shape) == 3]


def test_behind_a_row_parallel_linear_only_the_piece_of_the_sequence_is_kept() -> None:
    case = Case(PROJ, dora=True)
    n_in, n_out = features(case)
    for shapes in run_ranks(2, kept_activations, case, SP, sizes=SP):
        assert shapes == [(TOKENS, BATCH, n_in // 2), (TOKENS // 2, BATCH, n_out)]


def in_precision(rank: int, base: torch.dtype, adapter: torch.dtype, case: Case) -> dict[str, float]:
    """Greatest error of each tensor against float64, relative to the largest."""
    _, module, layout = build(case, PLAIN)
    set_micro_batch(STEP)
    x, n_out = local_input(case, PLAIN, layout, rank).detach(), features(case)[1]
    dy = random("g", TOKENS, BATCH, n_out if case.name in (PROJ, FC2) else n_out // 2)
    exact = tensors(module, x, dy)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(adapter if name.startswith("lora.") else base)
    module.lora.current().dtype = adapter
    ours = tensors(module, x.to(base), dy.to(base))
    assert ours["y"].dtype == ours["dx"].dtype == base
    return {name: relative(ours[name].double(), exact[name]) for name in exact}


def tensors(module: Any, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    y, _ = module(x)
    y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in module.lora.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("base", "adapter", "limit"),
    [
        (torch.bfloat16, torch.bfloat16, 5e-2),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.float32, torch.float32, 1e-5),
    ],
)
def test_lower_precision(base: torch.dtype, adapter: torch.dtype, limit: float) -> None:
    for case in (Case(FC1, dora=True, bias=True), Case(PROJ, dora=True, bias=True), Case(PROJ, **DROPS)):
        for errors in run_ranks(2, in_precision, base, adapter, case, sizes=PLAIN):
            assert max(errors.values()) < limit, (case, errors)


def thawed(rank: int, dropout: float) -> str:
    _, module, layout = build(Case(FC1, dora=True, dropout=dropout), PLAIN)
    set_micro_batch(STEP)
    module.weight.requires_grad_(True)
    with pytest.raises(RuntimeError) as raised:
        module(random("x", TOKENS, BATCH, layout.in_features))
    return str(raised.value)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_base_that_is_not_frozen_is_refused(dropout: float) -> None:
    assert "must stay frozen" in run_ranks(2, thawed, dropout, sizes=PLAIN)[0]
