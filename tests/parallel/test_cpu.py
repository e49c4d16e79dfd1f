"""Inside the context Megatron's CUDA calls answer for the CPU; outside of it nothing is left of it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from parallel.cpu import _replacements, megatron_on_cpu

CPU = torch.device("cpu")


def everything() -> dict[str, Any]:
    """All names of the modules that the context touches, and torch's function modes."""
    owners = {owner.__name__: owner for owner, _, _ in _replacements()}
    assert set(owners) == {"torch.cuda", megatron_random.__name__}
    found = {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}
    return {key: id(value) for key, value in found.items()} | {"modes": list(_get_current_function_mode_stack())}


@contextlib.contextmanager
def nothing_changes() -> Iterator[None]:
    before = everything()
    yield
    assert everything() == before


def test_leaving_puts_everything_back() -> None:
    with nothing_changes(), megatron_on_cpu():
        changed = everything()
        assert sum(changed[f"{owner.__name__}.{name}"] != id(value) for owner, name, value in _replacements()) > 5
        assert len(changed["modes"]) == 1
    assert not torch.cuda.is_initialized()


def test_an_error_puts_everything_back_and_comes_through() -> None:
    with nothing_changes(), pytest.raises(KeyError, match="mine"), megatron_on_cpu():
        raise KeyError("mine")


def test_contexts_may_be_nested() -> None:
    with nothing_changes(), megatron_on_cpu():
        with nothing_changes(), megatron_on_cpu():
            assert torch.zeros(1, device="cuda").device == CPU
        assert torch.zeros(1, device="cuda").device == CPU


def test_it_does_not_start_after_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with nothing_changes(), pytest.raises(RuntimeError, match="CUDA is already initialised"), megatron_on_cpu():
        pass


def test_devices() -> None:
    with megatron_on_cpu():
        assert torch.cuda.current_device() == CPU
        made = [
            torch.empty(2, device="cuda"),
            torch.tensor([1.0], device="cuda:0"),
            torch.zeros(2, device=torch.device("cuda", 3)),
            torch.arange(3, device=torch.cuda.current_device()),
            torch.zeros(2).new_empty(2, device="cuda"),
            torch.zeros_like(torch.zeros(2), device="cuda"),
            torch.zeros(2).to("cuda"),
            torch.zeros(2).to(torch.device("cuda"), torch.float64),
            torch.zeros(2).to(device="cuda", non_blocking=True),
            torch.zeros(2).cuda(),
            torch.nn.Linear(2, 2, device="cuda").weight,
            torch.nn.Linear(2, 2).to("cuda").weight,
            torch.nn.Linear(2, 2).cuda().weight,
        ]
        assert [tensor.device for tensor in made] == [CPU] * len(made)
        assert made[7].dtype == torch.float64
        assert (
            torch.zeros(2, device="meta").device.type == "meta"
            and torch.zeros(2).to(torch.float64).dtype == torch.float64
        )
        same = torch.zeros(2)
        assert same.cuda() is same


def test_types_have_the_names_that_megatron_compares_with() -> None:
    with megatron_on_cpu():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_random_states_are_those_of_the_cpu() -> None:
    with megatron_on_cpu():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(5)))
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        megatron_random._set_cuda_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(megatron_random._get_cuda_rng_state(), torch.get_rng_state())


def test_streams_and_events_stand_by() -> None:
    with megatron_on_cpu():
        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=False)
        with torch.cuda.stream(stream), stream:
            event.record(stream)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.default_stream().wait_event(stream.record_event())
            assert stream.record_event(event) is event
        event.wait()
        event.synchronize()
        stream.synchronize()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert event.query()


def backward_of(call: Any) -> list[float]:
    x, w = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    call(x * w * w, x, w)
    return [float("nan") if leaf.grad is None else leaf.grad.tolist() for leaf in (x, w)]  # type: ignore[misc]


BACKWARDS = {
    "Tensor.backward": lambda y, x, w: y.sum().backward(),
    "gradient by place": lambda y, x, w: y.backward(torch.tensor([1.0, 10.0])),
    "gradient by name": lambda y, x, w: y.backward(gradient=torch.tensor([1.0, 10.0])),
    "inputs": lambda y, x, w: y.sum().backward(inputs=[w]),
    "one input": lambda y, x, w: y.sum().backward(inputs=w),
    "autograd.backward": lambda y, x, w: torch.autograd.backward(y, torch.ones(2)),
    "several": lambda y, x, w: torch.autograd.backward([y.sum(), (2 * y).sum()]),
    "several with gradients": lambda y, x, w: torch.autograd.backward((y, y[0]), (torch.ones(2), None)),
    "twice": lambda y, x, w: (y.sum().backward(retain_graph=True), y.sum().backward()),
    "second order": lambda y, x, w: torch.autograd.grad(y.sum(), w, create_graph=True)[0].sum().backward(),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_backward_is_torchs(name: str) -> None:
    plain = backward_of(BACKWARDS[name])
    with megatron_on_cpu():
        assert str(backward_of(BACKWARDS[name])) == str(plain)


def test_a_graph_is_used_once_as_always() -> None:
    with megatron_on_cpu():
        y = torch.ones(2, requires_grad=True).exp().sum()
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()
        with pytest.raises(RuntimeError, match="scalar outputs"):
            torch.ones(2, requires_grad=True).exp().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_in_backward_is_redirected_too(reentrant: bool) -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.full((2,), 3.0, device="cuda")).exp()

    with megatron_on_cpu():
        x = torch.zeros(2, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=False).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3.0, 3.0]
