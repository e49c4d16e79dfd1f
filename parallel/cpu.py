"""Megatron-Core on the CPU: a context that redirects the CUDA calls Megatron makes without asking.

Megatron-Core allocates on ``torch.cuda.current_device()``, keeps CUDA generator states and asks tensors whether their type is
``torch.cuda.FloatTensor``. Inside :func:`megatron_on_cpu` each of these is answered for the CPU, so that the same training code
runs over gloo. Nothing is patched at import; leaving the context puts everything back.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """Sends ``device="cuda"`` to the CPU and answers ``Tensor.type()`` with the CUDA names Megatron compares with."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        if func is torch.Tensor.backward:
            return self._backward(
                *args, **{"grad_tensors" if key == "gradient" else key: v for key, v in kwargs.items()}
            )
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and len(args) == 1:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def _backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """``torch.autograd.backward`` with the redirection on, which recomputation needs.

        The mode is off while a function that it intercepts runs, and were it on, that function would be intercepted again:
        so this calls the engine itself.
        """
        outputs = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
        given = (
            (grad_tensors,) if isinstance(grad_tensors, torch.Tensor) else tuple(grad_tensors or [None] * len(outputs))
        )
        grads = torch.autograd._make_grads(outputs, given, is_grads_batched=False)
        keep = create_graph if retain_graph is None else retain_graph
        leaves = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs or ())
        with self:
            torch.autograd.Variable._execution_engine.run_backward(
                outputs, grads, keep, create_graph, leaves, allow_unreachable=True, accumulate_grad=True
            )


class _Stream:
    """Stands in for ``torch.cuda.Stream`` and the stream context: CPU work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _replacements() -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "empty_cache", _nothing),
        (torch.cuda, "manual_seed", manual_seed),
        (torch.cuda, "get_rng_state", get_state),
        (torch.cuda, "set_rng_state", set_state),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda *args: _Stream()),
        (torch.cuda, "default_stream", lambda *args: _Stream()),
        (megatron_random, "_get_cuda_rng_state", get_state),
        (megatron_random, "_set_cuda_rng_state", set_state),
    ]


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Redirect, for this process and until the context ends, the CUDA calls of Megatron-Core to the CPU.

    Raises:
        RuntimeError: if CUDA was already initialised in this process; the redirection would mix devices.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("megatron_on_cpu() cannot start: CUDA is already initialised in this process")
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in _replacements():
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        undo.enter_context(_CudaToCpu())
        yield
