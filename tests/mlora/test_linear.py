"""One adapted linear on 1 to 4 ranks against the same mathematics unsharded, in float64, per tensor."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

import mlora
from mlora import LoraConfig, linear
from mlora.attach import banks, factors, linear_adapters
from mlora.config import decomposes
from mlora.dropout import Dropout, MicroBatch, set_micro_batch
from mlora.names import SHARED
from parallel import collectives, shards
from parallel.layout import LinearLayout, read_layout
from parallel.sizes import ParallelSizes
from tests.gpt import piece
from tests.ranks import run_ranks

TOKENS, ROWS, HIDDEN = 12, 2, 24
HEADS, WIDTH = 12, 6
SEED = 5
STEP = MicroBatch(step=3, first_row=4)


@dataclass(frozen=True)
class Case:
    """A linear and its adapter."""

    name: str
    groups: int = 12
    gated: bool = False
    bias: bool = False
    rank: int = 5
    dropout: float = 0.0
    shared_A: bool = False
    targets: Any = "all-linear"
    rank_pattern: Any = None
    dora: bool = False
    init: Any = True


QKV, PROJ, FC1, FC2 = "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"

CASES = [
    Case(QKV),
    Case(QKV, bias=True, dropout=0.3),
    Case(QKV, targets=["q_proj", "v_proj"], rank=1),
    Case(QKV, shared_A=True, rank=3, dropout=0.2),
    Case(QKV, rank_pattern={"k_proj": 2}),
    Case(PROJ),
    Case(PROJ, dropout=0.3, rank=1),
    Case(PROJ, bias=True),
    Case(FC1, dropout=0.3),
    Case(FC1, bias=True, targets=["up_proj"]),
    Case(FC2, rank=7, dropout=0.1),
]


def cases(size: int) -> list[Case]:
    """The cases that t ranks can hold: grouped-query attention with more groups than ranks, as many, and fewer."""
    grouped = {1: [2, 1], 2: [2, 1], 3: [3, 1], 4: [4, 2, 1]}[size]
    extra = [Case(QKV, groups=groups, bias=True, dropout=0.2) for groups in grouped]
    extra += [Case(QKV, groups=1, targets=["k_proj"])]  # Ranks without a row of k have an A and no B.
    gates = [Case(QKV, groups=groups, gated=True) for groups in grouped if groups >= size]
    return CASES + extra + gates


def config_of(case: Case, sizes: ParallelSizes) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=36,
        num_attention_heads=HEADS,
        num_query_groups=case.groups,
        kv_channels=WIDTH,
        attention_output_gate=case.gated,
        gated_linear_unit=True,
        add_bias_linear=case.bias,
        tensor_model_parallel_size=sizes.tensor,
        sequence_parallel=sizes.sequence_parallel,
        params_dtype=torch.float64,
        perform_initialization=False,
        use_cpu_initialization=True,
    )


def features(case: Case) -> tuple[int, int]:
    """(in, out) of the whole linear."""
    heads_out = HEADS * WIDTH * (2 if case.gated else 1) + 2 * case.groups * WIDTH
    return {QKV: (HIDDEN, heads_out), PROJ: (HEADS * WIDTH, HIDDEN), FC1: (HIDDEN, 72), FC2: (36, HIDDEN)}[case.name]


def is_row(case: Case) -> bool:
    return case.name in (PROJ, FC2)


def random(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def build(case: Case, sizes: ParallelSizes) -> tuple[torch.nn.Module, torch.nn.Module, LinearLayout]:
    """(model, linear, layout) of a model that holds one linear under Megatron's name, with the oracle's weights in it."""
    config, (n_in, n_out) = config_of(case, sizes), features(case)
    common: dict[str, Any] = {
        "config": config,
        "init_method": torch.nn.init.zeros_,
        "bias": case.bias,
        "skip_bias_add": False,
    }
    module: torch.nn.Module
    if is_row(case):
        module = RowParallelLinear(n_in, n_out, input_is_parallel=True, **common)
    else:
        module = ColumnParallelLinear(n_in, n_out, gather_output=False, **common)
    parent, leaf = case.name.split(".")
    model, inner = torch.nn.Module(), torch.nn.Module()
    inner.add_module(leaf, module)
    model.add_module(parent, inner)
    layout = read_layout(case.name, module)
    assert layout is not None

    def weight(part: str, first: int, count: int, column: int, columns: int) -> torch.Tensor:
        return random(f"W{part}", dict(layout.parts)[part], n_in)[first : first + count, column : column + columns]

    def bias(part: str, first: int, count: int) -> torch.Tensor:
        return random(f"b{part}", dict(layout.parts)[part])[first : first + count]

    with torch.no_grad():
        shards.cut(layout, weight, module.weight)  # type: ignore[arg-type]
        if case.bias:
            shards.cut_bias(layout, bias, module.bias)  # type: ignore[arg-type]
    lora = LoraConfig(
        r=case.rank,
        lora_alpha=3,
        lora_dropout=case.dropout,
        target_modules=case.targets,
        rank_pattern=case.rank_pattern or {},
        shared_A=case.shared_A,
        use_dora=case.dora,
        init_lora_weights=case.init,
        seed=SEED,
    )
    mlora.apply([model], lora)
    with torch.no_grad():
        for adapter in linear_adapters([model]):
            for factor in (*adapter.factors(), *adapter.start()):
                factor.parameter.copy_(piece(random(factor.name, *factor.shape), factor))
    return model, module, layout


@dataclass
class Unsharded:
    """The oracle: every projection as a linear of its own, with autograd."""

    y: dict[str, torch.Tensor]
    dx: torch.Tensor
    gradients: dict[str, torch.Tensor]


def unsharded(case: Case, layout: LinearLayout) -> Unsharded:
    n_in = layout.in_features
    x = random("x", TOKENS, ROWS, n_in).requires_grad_()
    dropped = x
    if case.dropout:
        set_micro_batch(STEP)
        dropped = Dropout.of(case.dropout, SEED, case.name, TOKENS)(x)
    hf = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}
    ranks = {part: (case.rank_pattern or {}).get(hf.get(part, ""), case.rank) for part, _ in layout.parts}
    A: dict[str, torch.Tensor] = {}
    B: dict[str, torch.Tensor] = {}
    m: dict[str, torch.Tensor] = {}
    outputs = {}
    for part, rows in layout.parts:
        y = x @ random(f"W{part}", rows, n_in).T
        if case.bias:
            y = y + random(f"b{part}", rows)
        if case.targets == "all-linear" or hf[part] in case.targets:
            key = SHARED if case.shared_A else part
            if key not in A:
                A[key] = random(f"{case.name}.{key}.lora_A", ranks[part], n_in).requires_grad_()
            B[part] = random(f"{case.name}.{part}.lora_B", rows, ranks[part]).requires_grad_()
            product = B[part] @ A[key]
            if decomposes(case.init):
                A0 = random(f"{case.name}.{key}.lora_A0", *A[key].shape)
                B0 = random(f"{case.name}.{part}.lora_B0", *B[part].shape)
                product = product - B0 @ A0
            delta = 3 / ranks[part] * product
            if case.dora:
                m[part] = random(f"{case.name}.{part}.lora_magnitude_vector", rows).requires_grad_()
                weight = random(f"W{part}", rows, n_in)
                # The length is a constant to backward.
                delta = (m[part] / (weight + delta.detach()).norm(dim=1))[:, None] * (weight + delta) - weight
            y = y + dropped @ delta.T
        outputs[part] = y
    sum((y * random(f"g{part}", TOKENS, ROWS, y.shape[-1])).sum() for part, y in outputs.items()).backward()  # type: ignore[union-attr]
    gradients = {f"{case.name}.{part}.lora_A": factor.grad for part, factor in A.items()}
    gradients |= {f"{case.name}.{part}.lora_B": factor.grad for part, factor in B.items()}
    gradients |= {f"{case.name}.{part}.lora_magnitude_vector": factor.grad for part, factor in m.items()}
    assert x.grad is not None
    return Unsharded(outputs, x.grad, gradients)  # type: ignore[arg-type]


def local_input(case: Case, sizes: ParallelSizes, layout: LinearLayout, rank: int) -> torch.Tensor:
    """This rank's piece of the whole input, or of a gradient of its shape."""
    return piece_of_input(random("x", TOKENS, ROWS, layout.in_features), case, sizes, rank).clone().requires_grad_()


def piece_of_input(whole: torch.Tensor, case: Case, sizes: ParallelSizes, rank: int) -> torch.Tensor:
    if is_row(case):
        return whole.chunk(sizes.tensor, dim=-1)[rank]
    return whole.chunk(sizes.tensor, dim=0)[rank] if sizes.sequence_parallel else whole


def piece_of_output(
    whole: dict[str, torch.Tensor], case: Case, sizes: ParallelSizes, layout: LinearLayout, rank: int
) -> torch.Tensor:
    if is_row(case):
        return whole["whole"].chunk(sizes.tensor, dim=0)[rank] if sizes.sequence_parallel else whole["whole"]
    return torch.cat([whole[s.part][..., s.start : s.start + s.length] for s in layout.segments], dim=-1)


def run_case(rank: int, case: Case, sizes: ParallelSizes) -> dict[str, float]:
    """The greatest relative error of each tensor of one linear on this rank."""
    model, module, layout = build(case, sizes)
    oracle = unsharded(case, layout)
    set_micro_batch(STEP)
    x = local_input(case, sizes, layout, rank)
    y, _ = module(x)
    g = {part: random(f"g{part}", TOKENS, ROWS, rows) for part, rows in layout.parts}
    (y * piece_of_output(g, case, sizes, layout, rank)).sum().backward()
    errors = {
        "y": relative(y, piece_of_output(oracle.y, case, sizes, layout, rank)),
        "dx": relative(x.grad, piece_of_input(oracle.dx, case, sizes, rank)),
    }
    for factor in factors([model]):
        gradient = factor.parameter.grad
        assert gradient is not None, factor.name
        if factor.parameter.sequence_parallel:  # type: ignore[attr-defined]
            dist.all_reduce(
                gradient, group=parallel_state.get_tensor_model_parallel_group()
            )  # Megatron's finalize step
        errors[factor.name] = relative(gradient, piece(oracle.gradients[factor.name], factor))
    assert set(oracle.gradients) >= {factor.name for factor in factors([model])}
    return errors


def relative(ours: torch.Tensor | None, theirs: torch.Tensor) -> float:
    assert ours is not None and ours.shape == theirs.shape, (None if ours is None else ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def all_cases(rank: int, sizes: ParallelSizes) -> dict[str, float]:
    return {
        f"{case}: {name}": error for case in cases(sizes.tensor) for name, error in run_case(rank, case, sizes).items()
    }


LAYOUTS = [ParallelSizes()]
LAYOUTS += [ParallelSizes(tensor=t, sequence_parallel=sp) for t in (2, 3, 4) for sp in (False, True)]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_tensor_equals_the_unsharded_one_on_every_rank(sizes: ParallelSizes) -> None:
    for rank, errors in enumerate(run_ranks(sizes.tensor, all_cases, sizes, sizes=sizes)):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-12, (rank, worst, errors[worst])


def doubled(collective: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda tensor, group: collective(collective(tensor, group), group)


def missing_all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return tensor


def missing_reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return tensor.chunk(group.size())[group.rank()]


def scaled_reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    piece = torch.empty_like(tensor.chunk(group.size())[0])
    dist.reduce_scatter_tensor(piece, tensor.contiguous(), group=group)
    return piece * group.size()


def missing_all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return torch.cat([tensor] * group.size())


def doubled_all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    pieces = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(pieces, tensor, group=group)
    return torch.cat(pieces) * group.size()


def broken_errors(rank: int, case: Case, sizes: ParallelSizes, site: str, name: str, fault: Any) -> float:
    """The worst error with one of our collectives broken at one place (``site`` is the function that calls it)."""
    owner = linear.LoraLinear if site == "forward" else linear
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


PLAIN, SP = ParallelSizes(tensor=2), ParallelSizes(tensor=2, sequence_parallel=True)
FAULTS = [
    (Case(QKV), PLAIN, "gradient_of_A", "all_reduce", missing_all_reduce),
    (Case(QKV), PLAIN, "gradient_of_A", "all_reduce", doubled),
    (Case(QKV), PLAIN, "input_gradient", "all_reduce_", missing_all_reduce),
    (Case(QKV), PLAIN, "input_gradient", "all_reduce_", doubled),
    (Case(QKV), SP, "forward", "all_gather", missing_all_gather),
    (Case(QKV), SP, "forward", "all_gather", doubled_all_gather),
    (Case(QKV), SP, "gradient_of_A", "reduce_scatter", missing_reduce_scatter),
    (Case(QKV), SP, "gradient_of_A", "reduce_scatter", scaled_reduce_scatter),
    (Case(QKV), SP, "input_gradient", "reduce_scatter", missing_reduce_scatter),
    (Case(QKV), SP, "input_gradient", "reduce_scatter", scaled_reduce_scatter),
    (Case(PROJ), PLAIN, "gradient_of_B", "all_reduce", missing_all_reduce),
    (Case(PROJ), PLAIN, "gradient_of_B", "all_reduce", doubled),
]


def test_every_collective_of_the_function_has_its_faults() -> None:
    tree = ast.parse(inspect.getsource(linear))
    called = {
        (function.name, node.func.attr)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "collectives"
    }
    assert sorted((site, name) for _, _, site, name, _ in FAULTS) == sorted([*called, *called])


@pytest.mark.parametrize(("case", "sizes", "site", "name", "fault"), FAULTS)
def test_a_collective_removed_or_doubled_is_seen(
    case: Case, sizes: ParallelSizes, site: str, name: str, fault: Any
) -> None:
    errors = run_ranks(2, broken_errors, case, sizes, site, name, fault, sizes=sizes)
    assert min(errors) > 1e-3


def unmarked_errors(rank: int, case: Case) -> float:
    original = factors

    def factors_without_marks(model: Any) -> Any:
        for factor in original(model):
            factor.parameter.sequence_parallel = False  # type: ignore[attr-defined]
            yield factor

    globals()["factors"] = factors_without_marks
    return max(run_case(rank, case, SP).values())


@pytest.mark.parametrize("case", [Case(QKV), Case(PROJ)])
def test_a_gradient_sum_that_megatron_is_not_asked_for_is_seen(case: Case) -> None:
    assert min(run_ranks(2, unmarked_errors, case, sizes=SP)) > 1e-3


def kept_activations(rank: int, case: Case, sizes: ParallelSizes, frozen: bool) -> list[tuple[int, ...]]:
    """Shapes of the activations that one linear keeps for backward."""
    model, module, layout = build(case, sizes)
    model.requires_grad_(not frozen)
    module.weight.requires_grad_(False)  # type: ignore[operator,union-attr]
    set_micro_batch(STEP)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)), lambda _: None):
        module(local_input(case, sizes, layout, rank))
    assert tuple(module.weight.shape) in shapes
    return [shape for shape in shapes if len(shape) == 3 or shape[0] == TOKENS * ROWS]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gathered_input_and_the_dropped_one_are_not_kept(frozen: bool) -> None:
    case = Case(QKV, dropout=0.3)
    for shapes in run_ranks(2, kept_activations, case, SP, frozen, sizes=SP):
        assert shapes == ([] if frozen else [(TOKENS // 2, ROWS, features(case)[0]), (TOKENS * ROWS, 3 * case.rank)])


def inputs_of_all_kinds(rank: int) -> dict[str, float]:
    """Errors against the plain contiguous input: strided x and dy, tokens without a batch dimension, no gradient for x."""
    _, module, layout = build(Case(FC1), PLAIN)
    x = random("x", TOKENS, ROWS, layout.in_features)
    dy = random("g", TOKENS, ROWS, sum(segment.length for segment in layout.segments))
    plain = step(module, x, dy)
    strided = step(
        module, x.transpose(0, 2).contiguous().transpose(0, 2), dy.transpose(0, 1).contiguous().transpose(0, 1)
    )
    flat = step(module, x.flatten(0, 1), dy.flatten(0, 1))
    leaf = step(module, x, dy, needs_x=False)
    errors = {"strided": distance(strided, plain), "flat": distance(flat, plain)}
    return errors | {"without dx": distance(leaf, {name: value for name, value in plain.items() if name != "dx"})}


def step(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor, needs_x: bool = True) -> dict[str, torch.Tensor]:
    """y and all gradients."""
    module.zero_grad()
    x = x.detach().requires_grad_(needs_x)
    y, _ = module(x)
    y.backward(dy)
    tensors = {name: parameter.grad for name, parameter in module.lora.named_parameters()}  # type: ignore[union-attr]
    return {"y": y.detach(), **({"dx": x.grad} if needs_x else {}), **tensors}  # type: ignore[dict-item]


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(relative(ours[name].reshape(theirs[name].shape), theirs[name]) for name in theirs)


def test_inputs_may_be_strided_flat_or_without_gradient() -> None:
    for errors in run_ranks(2, inputs_of_all_kinds, sizes=PLAIN):
        assert max(errors.values()) < 1e-12, errors


def in_precision(rank: int, base: torch.dtype, adapter: torch.dtype, autocast: bool) -> dict[str, Any]:
    """Greatest relative error against float64, the dtypes of what comes out, and whether B = 0 changes a bit."""
    _, module, layout = build(Case(FC1, bias=True), PLAIN)
    x, dy = random("x", TOKENS, ROWS, layout.in_features), random("g", TOKENS, ROWS, module.weight.shape[0])  # type: ignore[index]
    exact = step(module, x, dy)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(adapter if name.startswith("lora.") else base)
    for bank in banks([module]):
        for held in bank.adapters.values():
            held.dtype = adapter  # type: ignore[assignment]
    output = torch.bfloat16 if autocast else base
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module.zero_grad()
        low_x = x.to(base).requires_grad_()
        y, _ = module(low_x)
    y.backward(dy.to(y.dtype))  # Outside of autocast, as training loops do.
    ours = {"y": y, "dx": low_x.grad}
    ours |= {name: parameter.grad for name, parameter in module.lora.named_parameters()}  # type: ignore[union-attr]
    errors = {name: relative(tensor.double(), exact[name]) for name, tensor in ours.items()}  # type: ignore[union-attr]
    assert y.dtype == output and low_x.grad is not None and low_x.grad.dtype == base
    for bank in banks([module]):
        torch.nn.init.zeros_(bank.adapters["default"].lora_B["up"])  # type: ignore[union-attr,index]
        torch.nn.init.zeros_(bank.adapters["default"].lora_B["gate"])  # type: ignore[union-attr,index]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        start, off = module(low_x)[0], torch.nn.functional.linear(low_x, module.weight, module.bias)  # type: ignore[arg-type]
    return {"worst": max(errors.values()), "start": relative(start.double(), off.double())}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_lower_precision_and_autocast(base: torch.dtype, adapter: torch.dtype, autocast: bool) -> None:
    exact = base == torch.float32 and not autocast
    for found in run_ranks(2, in_precision, base, adapter, autocast, sizes=PLAIN):
        assert found["worst"] < (1e-5 if exact else 3e-2), found
        assert found["start"] < (1e-6 if exact else 1e-2), found


def thawed(rank: int, name: str) -> str:
    _, module, layout = build(Case(FC1, bias=True), PLAIN)
    getattr(module, name).requires_grad_(True)
    with pytest.raises(RuntimeError) as raised:
        module(random("x", TOKENS, ROWS, layout.in_features))
    return str(raised.value)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_is_not_frozen_is_refused(name: str) -> None:
    assert "must stay frozen" in run_ranks(2, thawed, name, sizes=PLAIN)[0]
