"""Every kind of Transformer Engine's linear, adapted, on both ways and in every dtype, against float64.

The yardstick is plain torch in the same dtype on the same numbers, which rounds after every operation as PEFT does: ours may be
off by no more than half as much again.
"""

from typing import Any

import pytest
import torch

import mlora
from mlora import te
from mlora.dropout import MicroBatch, set_micro_batch
from mlora_tools.bench_layers import beside
from tests.gpu.linears import CASES, COLUMN, FC1, QKV, REPLICATED, Case, build, plain, relative, run

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SLACK = 1.5
FLOOR = {torch.bfloat16: 1e-4, torch.float16: 1e-5, torch.float32: 1e-6}


def check(linear: Any, dtype: torch.dtype) -> None:
    exact = plain(linear, torch.float64, dtype)
    ours, theirs = relative(run(linear, dtype), exact), relative(plain(linear, dtype, dtype), exact)
    too_far = {name: (ours[name], theirs[name]) for name in exact if ours[name] > SLACK * theirs[name] + FLOOR[dtype]}
    assert not too_far


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_on_the_chosen_way(case: Case, dtype: torch.dtype) -> None:
    _, linear = build(case, dtype)
    check(linear, dtype)
    assert (linear.lora.packed is not None) == (dtype != torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_beside_the_linear(case: Case) -> None:
    with beside():
        _, linear = build(case, torch.bfloat16)
        check(linear, torch.bfloat16)
        assert linear.lora.packed is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [QKV, FC1, COLUMN, REPLICATED])
def test_with_the_adapter_off_the_base_is_what_it_was(name: str, dtype: torch.dtype) -> None:
    case = Case(name)
    _, frozen = build(case, dtype, adapted=False)
    _, linear = build(case, dtype)
    expected = run(frozen, dtype)
    run(linear, dtype)
    linear.lora.active = None
    errors = relative(run(linear, dtype), expected)
    # The fused way's GEMM is another one, on a view into the buffer.
    assert max(errors.values()) <= {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 0.0}[dtype]


@pytest.mark.parametrize("way", ["chosen", "beside"])
def test_gradient_accumulation_fusion_changes_nothing(way: str) -> None:
    """Megatron's flag makes Transformer Engine add weight gradients into main_grad; a frozen weight has none."""
    case = Case(FC1)
    results = []
    for fusion in (False, True):
        _, linear = build(case, torch.bfloat16, gradient_accumulation_fusion=fusion)
        if way == "beside":
            with beside():
                results.append(run(linear, torch.bfloat16))
        else:
            results.append(run(linear, torch.bfloat16))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def fp8(recipe: str) -> Any:
    from transformer_engine.common import recipe as recipes

    return {
        "delayed": recipes.DelayedScaling(),
        "tensorwise": recipes.Float8CurrentScaling(),
        "blockwise": recipes.Float8BlockScaling(),
    }[recipe]


@pytest.mark.parametrize("primary", [False, True], ids=["bf16 weights", "FP8 weights"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("name", [QKV, FC1, COLUMN])
def test_on_an_fp8_base_the_term_is_added_in_the_adapters_dtype(name: str, recipe: str, primary: bool) -> None:
    """Output and input gradient are the frozen FP8 linear's plus the low-rank term's, and A and B get that term's gradients."""
    import transformer_engine.pytorch as te_torch

    case, dtype = Case(name), torch.bfloat16
    with te_torch.fp8_model_init(enabled=primary, recipe=fp8(recipe)):
        changes = {"fp8": "hybrid", "fp8_recipe": recipe, "fp8_param": primary}
        _, frozen = build(case, dtype, adapted=False, **changes)
        _, linear = build(case, dtype, **changes)
    assert type(linear.weight) is not torch.nn.Parameter or not primary
    with te_torch.fp8_autocast(enabled=True, fp8_recipe=fp8(recipe)):
        base, ours = run(frozen, dtype), run(linear, dtype)
    assert linear.lora.packed is None
    exact = plain(linear, torch.float64, dtype)
    with torch.no_grad():  # The term alone: the same linear on a base of zeros.
        linear.weight.zero_()
    term = plain(linear, torch.float64, dtype)
    assert 1e-3 < relative({"y": base["y"]}, {"y": exact["y"] - term["y"]})["y"] < 0.1  # That the base is in FP8.
    for tensor in ("y", "dx"):
        expected = base[tensor].double() + term[tensor]
        assert (ours[tensor].double() - expected).norm() < 6e-3 * expected.norm(), tensor
    for tensor in ours.keys() - {"y", "dx"}:
        assert (ours[tensor].double() - exact[tensor]).norm() < 6e-3 * exact[tensor].norm(), tensor


def test_a_graph_replays_the_layer_with_the_parameters_of_the_moment() -> None:
    case, dtype = Case(FC1), torch.bfloat16
    _, linear = build(case, dtype)
    adapter = linear.lora.current()
    x = torch.randn(64, 2, linear.in_features, device="cuda", dtype=dtype).requires_grad_()

    def step() -> torch.Tensor:
        x.grad = None
        for parameter in adapter.parameters():
            parameter.grad = None
        y, _ = linear(x)
        y.sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    held = {"y": y, "dx": x.grad, **{name: p.grad for name, p in adapter.named_parameters()}}
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(scale)
        graph.replay()
        replayed = {name: value.clone() for name, value in held.items() if value is not None}
        y = step()
        now = {"y": y, "dx": x.grad, **{name: p.grad for name, p in adapter.named_parameters()}}
        assert all(torch.equal(replayed[name], value) for name, value in now.items() if value is not None)


def test_a_graph_with_dropout_is_refused() -> None:
    _, linear = build(Case(FC1, dropout=0.1), torch.bfloat16)
    run(linear, torch.bfloat16)
    x = torch.randn(64, 2, linear.in_features, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot hold dropout"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            linear(x)


def test_new_steps_and_micro_batches_compile_nothing() -> None:
    """A kernel that is compiled anew for the values of its mask's keys would be so at nearly every step."""
    from triton import knobs

    _, linear = build(Case(QKV, dropout=0.1), torch.bfloat16)
    run(linear, torch.bfloat16)
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    try:
        for step in range(40):
            set_micro_batch(MicroBatch(step, first_row=step % 7 * 4))
            y, _ = linear(torch.randn(96, 2, linear.in_features, device="cuda", dtype=torch.bfloat16))
            y.sum().backward()
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_a_quantized_weight_takes_no_merge() -> None:
    import transformer_engine.pytorch as te_torch

    with te_torch.fp8_model_init(enabled=True, recipe=fp8("tensorwise")):
        model, linear = build(Case(FC1), torch.bfloat16, fp8="hybrid", fp8_recipe="tensorwise", fp8_param=True)
    before = linear.weight.dequantize()
    with pytest.raises(ValueError, match=r"linear_fc1 has a quantized weight"):
        mlora.merge_adapter(model)
    assert torch.equal(linear.weight.dequantize(), before)


def test_what_is_chosen_can_be_asked_for() -> None:
    for dtype, way in ((torch.bfloat16, "fused"), (torch.float32, "beside: the weight is neither bf16 nor fp16")):
        model, _ = build(Case(FC1), dtype)
        assert te.ways(model) == {"decoder.layers.0.mlp.linear_fc1": way}
