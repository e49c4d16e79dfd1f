"""Adapted linears of Transformer Engine's spec, and the choice of the way their low-rank term is computed.

| way | where | cost |
|---|---|---|
| fused | bf16 and fp16 weights on a GPU with Triton, RMS norm or none in front | a few percent of the linear (:mod:`mlora.fused`) |
| beside | all else: FP8, fp32, overlapped communication, layer norm with bias, DoRA | a pass or two more (:mod:`mlora.branch`) |

The choice is made for each adapter at its first forward on a linear, when the weight has its final dtype and device, and again when
these change. The fused way turns the weight into a view with a row stride, which Transformer Engine's GEMM would misread: its own
forward is never given one. :mod:`mlora.fused` then computes the base's output, also while the adapter is off and for one that comes
beside, so that no switch copies the weight.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlora.adapter import LinearAdapter
from mlora.bank import AdapterBank
from mlora.branch import LoraBranch
from mlora.dora import Rescale, scales
from mlora.linear import Geometry
from parallel.stages import as_chunks

# (whether it holds, what stands in the way of the fused path if it does not), of the base and of an adapter on it, in this order.
_BASE_RULES: list[tuple[Callable[[Any], bool], str]] = [
    (lambda m: importlib.util.find_spec("triton") is not None, "Triton is not installed"),
    (lambda m: bool(m.weight.is_cuda), "the weight is not on a GPU"),
    (lambda m: type(m.weight) is torch.nn.Parameter, "the weight is quantized"),
    (lambda m: m.weight.dtype in (torch.bfloat16, torch.float16), "the weight is neither bf16 nor fp16"),
    (lambda m: m.weight.shape[1] % 8 == 0, "the input features do not divide by 8"),
    (lambda m: not m.config.fp8 and not getattr(m.config, "fp4", None), "the base runs in FP8 or FP4"),
    (lambda m: getattr(m, "te_quant_params", None) is None, "the base has a quantization recipe"),
    (lambda m: not m.config.tp_comm_overlap, "tensor-parallel communication is overlapped"),
    (lambda m: not m.config.fp32_residual_connection, "the residual stream is fp32"),
    (lambda m: not m.config.cpu_offloading, "activations are offloaded to the host"),
    (lambda m: getattr(m, "normalization", "RMSNorm") == "RMSNorm", "the norm in front is a layer norm"),
]
_RULES: list[tuple[Callable[[Any, LinearAdapter], bool], str]] = [
    (lambda m, a: a.dtype == m.weight.dtype, "the adapter's dtype is not the weight's"),
    (lambda m, a: len(set(a.scaling.values())) == 1 or not a.shares_A, "one A has several scalings"),
    (lambda m, a: not a.uses_dora, "the adapter is DoRA"),
    (lambda m, a: not a.config.decomposes, "the adapter starts as a part of the weight"),
]


def obstacle(module: Any, adapter: LinearAdapter) -> str | None:
    """What stands in the way of the fused path for this linear; None if nothing does."""
    return _obstacle_of_base(module) or next((why for holds, why in _RULES if not holds(module, adapter)), None)


def _obstacle_of_base(module: Any) -> str | None:
    return next((why for holds, why in _BASE_RULES if not holds(module)), None)


def ways(model: torch.nn.Module | Sequence[torch.nn.Module]) -> dict[str, str]:
    """Name of each adapted linear of Transformer Engine's on this rank -> "fused", or "beside" and why, for its active adapter."""
    found = {}
    for chunk in as_chunks(model):
        for module in chunk.modules():
            if isinstance(module, TeLora) and (adapter := module.lora.current()) is not None:
                why = obstacle(module, adapter)
                found[module.lora.layout.name] = "fused" if why is None else f"beside: {why}"
    return found


class TeLora:
    """Forward of an adapted linear of Transformer Engine; comes before its class in the instance's class."""

    lora: AdapterBank
    weight: torch.nn.Parameter
    _version = 0  # of the weight at the last forward of Transformer Engine's own

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x as Megatron gives it to the base -> (y, bias to be added later).

        Raises:
            RuntimeError: a parameter of the base requires a gradient, which it would not get, or not whole.
        """
        adapter = self.lora.current()
        packed = self.packed(adapter)
        if adapter is not None or packed is not None:
            self._check_frozen()
        if packed is not None and packed.is_used_by(adapter):
            return self._fused(x, packed, packed.parameters())
        y, bias = self._fused(x, packed, []) if packed is not None else self._plain(x)
        if adapter is None:
            return y, bias
        geometry = self.geometry(adapter, self.length(x))
        term = LoraBranch.apply(self._normed(x), *adapter.fused(), geometry)  # type: ignore[no-untyped-call]
        y = (y + term).to(y.dtype)
        if adapter.uses_dora:
            added = self.bias if self.use_bias and bias is None else None  # type: ignore[attr-defined]
            y = Rescale.apply(y, scales(adapter, self.weight), added)  # type: ignore[no-untyped-call]
        return y, bias

    def _plain(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transformer Engine's own forward."""
        if self.weight._version != self._version:
            # A weight in FP8 is made of the first micro batch's and kept, and a merge changes it in between.
            self.is_first_microbatch, self._version = True, self.weight._version
        return super().forward(x)  # type: ignore[misc,no-any-return]

    def set_activation_dtype(self, x: torch.Tensor) -> None:
        """Transformer Engine's check of all parameters' dtypes, from which an adapter's may differ."""
        lora = self._modules.pop("lora")  # type: ignore[attr-defined]
        try:
            super().set_activation_dtype(x)  # type: ignore[misc]
        finally:
            self._modules["lora"] = lora  # type: ignore[attr-defined]

    def packed(self, adapter: LinearAdapter | None) -> Any:
        """The buffers on which the base's product runs, made or refreshed; None if Transformer Engine's own weight serves it.

        Those of another adapter if this one is off or comes beside.
        """
        kept = self.lora.packed
        if kept is not None and not kept.is_of(self.weight):
            kept = self.lora.packed = None  # The model was moved or cast.
        if kept is None or not kept.is_used_by(adapter):
            kept = self._packed_for(adapter, kept)
        if kept is not None:
            kept.note_capture()
            if kept.is_used_by(adapter):
                kept.fill()
        return kept

    def _packed_for(self, adapter: LinearAdapter | None, kept: Any) -> Any:
        """For an adapter that has not run last, after ``kept``."""
        if kept is not None and _obstacle_of_base(self) is not None:  # There was none when it was made.
            self.weight.data = self.weight.data.contiguous()
            made = None
        elif adapter is None or obstacle(self, adapter) is not None:
            return kept
        else:
            from mlora.packed import Packed

            with torch.inference_mode(False):  # What is made in it could not be used to train.
                made = Packed.of(self.weight, adapter, kept)
        if kept is not None and kept.buffer.captured and (made is None or made.buffer is not kept.buffer):
            self.lora.captured.append(kept.buffer)
        self.lora.packed = made
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """torch's; the base's weight as a tensor of its own, because some that read it take no view into a buffer."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not keep_vars and self.lora.packed is not None:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()

    def _check_frozen(self) -> None:
        base = (getattr(self, name, None) for name in ("weight", "bias", "layer_norm_weight", "layer_norm_bias"))
        if any(parameter.requires_grad for parameter in base if parameter is not None):
            raise RuntimeError(
                "an adapted linear gives its base no gradient: its weight and bias, and the norm in front, must stay frozen"
            )

    def norm(self) -> Any:
        """The RMS norm in front of the linear; None if there is none."""
        weight = getattr(self, "layer_norm_weight", None)
        if weight is None:
            return None
        from mlora.fused import Norm

        return Norm(self._gamma(weight.detach()), self.eps)  # type: ignore[attr-defined]

    def geometry(self, adapter: LinearAdapter | None, length: int) -> Geometry:
        """Of the linear in sequences of ``length`` tokens, with the current dropout mask."""
        return Geometry.of(self.lora.layout, adapter.dropout(length) if adapter is not None else None)

    def length(self, x: torch.Tensor) -> int:
        """Tokens of the whole sequence of which x [s, b, ...] is this rank's piece."""
        layout = self.lora.layout
        cut = layout.sequence_parallel and layout.partition_dim != 1
        return x.shape[0] * (layout.group.size() if cut else 1)

    def _fused(
        self, x: torch.Tensor, packed: Any, parameters: list[torch.nn.Parameter]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's forward on the buffers, with the adapter's if its ``parameters`` are given."""
        from mlora.fused import FusedLinear

        later = self.te_return_bias  # type: ignore[attr-defined]
        bias = self.bias if self.use_bias else None  # type: ignore[attr-defined]
        geometry = self.geometry(packed.adapter if parameters else None, self.length(x))
        now = None if later else bias
        y = FusedLinear.apply(x, self.norm(), now, packed, geometry, *parameters)  # type: ignore[no-untyped-call]
        return y, bias if later else None

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """What Transformer Engine's fused norm makes of x, which it does not give away without costs."""
        weight = getattr(self, "layer_norm_weight", None)
        if weight is None:
            return x
        shape, eps = (x.shape[-1],), self.eps  # type: ignore[attr-defined]
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma = self._gamma(weight.detach()).to(wide)
        if self.normalization == "RMSNorm":  # type: ignore[attr-defined]
            return torch.nn.functional.rms_norm(x.to(wide), shape, gamma, eps).to(x.dtype)
        bias = self.layer_norm_bias.detach().to(wide)  # type: ignore[attr-defined]
        return torch.nn.functional.layer_norm(x.to(wide), shape, gamma, bias, eps).to(x.dtype)

    def _gamma(self, weight: torch.Tensor) -> torch.Tensor:
        """The norm's factor; 1 + weight in float32, where 16 bits would lose the weight's last ones."""
        return weight.float() + 1 if self.zero_centered_gamma else weight  # type: ignore[attr-defined]


class MlpLora:
    """Forward of a gated MLP whose two linears are both on the fused way."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [s, b, h] -> (y [s, b, h], None), or what Megatron's own forward gives."""
        fc1, fc2 = self.linear_fc1, self.linear_fc2  # type: ignore[attr-defined]
        adapters = fc1.lora.current(), fc2.lora.current()
        plain = all(value is None for value in (*args, *kwargs.values()))
        if not plain or None in adapters or not _is_plain_swiglu(self.config):  # type: ignore[attr-defined]
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc,no-any-return]
        packed = fc1.packed(adapters[0]), fc2.packed(adapters[1])
        fused = all(p is not None and p.is_used_by(a) for p, a in zip(packed, adapters, strict=True))
        if not fused or fc1.use_bias or fc2.use_bias:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc,no-any-return]
        from mlora.fused import FusedMlp

        parameters = [*packed[0].parameters(), *packed[1].parameters()]
        length = fc1.length(hidden_states)
        geometries = fc1.geometry(adapters[0], length), fc2.geometry(adapters[1], length)
        y = FusedMlp.apply(hidden_states, fc1.norm(), packed, geometries, *parameters)  # type: ignore[no-untyped-call]
        return y, None


def _is_plain_swiglu(config: Any) -> bool:
    return (
        config.gated_linear_unit
        and config.activation_func is torch.nn.functional.silu
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
        and not config.activation_func_fp8_input_store
    )
