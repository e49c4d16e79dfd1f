"""The portable profile, and what the others have in common with it: one rank and one alpha for every module, no rsLoRA.

Smaller ranks are padded with zeros, and a scaling that differs is folded into B: exact in float32, in bfloat16 for powers of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlora.conversion.peft import PREFIX
from mlora.conversion.peft_writer import PeftAdapter, PeftTensor, from_matrix
from mlora.conversion.selection import most_common, targets
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor
from mlora.pretrained import Pretrained


@dataclass(frozen=True)
class Request:
    """What a profile makes a PEFT directory of.

    Attributes:
        state: the adapter.
        layer_count: of its base model; None if it is not known.
        base_name: what its configuration calls the base model.
        dtype: of the result; None for each tensor's own.
        base: its base model, if it was given.
    """

    state: AdapterState
    layer_count: int | None
    base_name: str | None
    dtype: torch.dtype | None
    base: Pretrained | None


@dataclass(frozen=True)
class Uniform:
    """One rank and one scaling for modules that may have several.

    Attributes:
        rank: of every module.
        scaling: of every module.
        dtype: of every tensor; None for each one's own.
    """

    rank: int
    scaling: float
    dtype: torch.dtype | None

    @classmethod
    def of(cls, modules: Sequence[AdapterModule], dtype: torch.dtype | None) -> "Uniform":
        """The greatest rank and the most common scaling.

        Args:
            dtype: None keeps each tensor's, unless a factor cannot be folded into a B of lower precision without loss: then all
                become float32.
        """
        rank, scaling = max(module.rank for module in modules), most_common(module.scaling for module in modules)
        if dtype is None and not all(_folds(module.scaling / scaling, module.B.dtype) for module in modules):
            dtype = torch.float32
        return cls(rank, scaling, dtype)

    @property
    def alpha(self) -> float:
        """The alpha with ``alpha / rank == scaling``; an ``int`` if there is one, as PEFT writes it."""
        nearest = round(self.scaling * self.rank)
        return nearest if nearest / self.rank == self.scaling else self.scaling * self.rank

    def A(self, module: AdapterModule) -> PeftTensor:
        """[rank, in]."""
        name, shape = f"{PREFIX}{module.name}.lora_A.weight", (self.rank, module.A.shape[1])
        return from_matrix(name, module.A, shape=shape, dtype=self.dtype)

    def B(self, module: AdapterModule) -> PeftTensor:
        """[out, rank], with what the module's scaling differs by."""
        name, shape = f"{PREFIX}{module.name}.lora_B.weight", (module.B.shape[0], self.rank)
        return from_matrix(name, module.B, shape=shape, dtype=self.dtype, factor=module.scaling / self.scaling)

    def tensors(self, modules: Sequence[AdapterModule]) -> tuple[PeftTensor, ...]:
        """A and B of every module."""
        return tuple(tensor for module in modules for tensor in (self.A(module), self.B(module)))


def _folds(factor: float, dtype: torch.dtype) -> bool:
    """Whether a matrix of the dtype can be multiplied without loss: float16 has no room for it."""
    power_of_two = abs(math.frexp(factor)[0]) == 0.5
    return factor == 1.0 or dtype.itemsize >= 4 or (dtype == torch.bfloat16 and power_of_two)


def portable(request: Request) -> PeftAdapter:
    """One rank and one alpha, for every reader."""
    check_plain(request.state, "portable")
    return uniform_adapter(request, request.state.modules)


def uniform_adapter(request: Request, modules: Sequence[AdapterModule]) -> PeftAdapter:
    """The given modules with one rank and one alpha."""
    uniform = Uniform.of(modules, request.dtype)
    where = targets([module.name for module in modules], request.layer_count)
    return PeftAdapter(uniform.tensors(modules), config_of(request, r=uniform.rank, lora_alpha=uniform.alpha, **where))


def check_plain(state: AdapterState, profile: str) -> None:
    """Raises ValueError for what is more than low-rank terms on linears: only PEFT reads it all."""
    problem = f"the {profile} profile cannot express it, because most readers ignore or refuse it; the peft profile can"
    for parameter, tensor in state.full.items():
        raise ValueError(f"{tensor.file}: {tensor.key} is a whole parameter ({parameter}); {problem}")
    for module in state.modules:
        parts: tuple[tuple[LazyTensor | None, str], ...] = (
            (module.magnitude, "DoRA's magnitude"),
            (module.base_weight, "a base weight"),
            (module.A if module.embedding else None, "the low-rank term of an embedding"),
        )
        for part, what in parts:
            if part is not None:
                raise ValueError(f"{part.file}: {part.key} is {what}; {problem}")


def config_of(request: Request, **fields: Any) -> dict[str, Any]:
    """An ``adapter_config.json`` with nothing on that ``fields`` do not say."""
    return plain_config(request.base_name, task_type=request.state.config.get("task_type", "CAUSAL_LM"), **fields)


def plain_config(base_name: str | None, **fields: Any) -> dict[str, Any]:
    """An ``adapter_config.json`` for the base model of that name, with nothing on that ``fields`` do not say."""
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }
