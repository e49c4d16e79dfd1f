"""An adapter as a PEFT directory for given readers.

| profile | tensors | configuration | readers |
|---|---|---|---|
| portable | one rank: smaller ones are padded with zeros; a scaling that differs is folded into B | one alpha | all |
| peft | as trained, or as they were imported | ranks, alphas and rsLoRA likewise | PEFT |
| sglang | portable, and with zeros what SGLang stacks with them: q with v, gate with up, every layer alike | one alpha | SGLang |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlora.checkpoint import INFO_FILE, read_info
from mlora.config import LoraConfig
from mlora.conversion.native_writer import IMPORTED_FILE, Original, read_original
from mlora.conversion.peft import PREFIX
from mlora.conversion.peft_writer import PeftAdapter, PeftTensor, from_matrix, peft_key, slots
from mlora.conversion.selection import most_common, selection, targets
from mlora.conversion.sglang import with_stacked
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
        original: what was imported, if that is what the adapter is.
    """

    state: AdapterState
    layer_count: int | None
    base_name: str | None
    dtype: torch.dtype | None
    base: Pretrained | None
    original: Original | None


def peft_adapter(
    state: AdapterState, profile: str = "portable", *, dtype: torch.dtype | None = None, base: Pretrained | None = None
) -> PeftAdapter:
    """The PEFT directory of an adapter; only headers are read.

    Args:
        state: from :func:`~mlora.conversion.open_adapter`.
        profile: one of :data:`PROFILES`.
        dtype: of the tensors. None keeps each one's, unless folding a scaling would lose precision: then all become float32.
        base: the adapter's base model, for what the adapter does not say itself.

    Raises:
        ValueError: the adapter has something that the profile cannot express, or that its readers would ignore; it is named.
    """
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}; there is {', '.join(PROFILES)}")
    native = state.format == "mlora"
    info = read_info(state.source) if native else {}
    layers = base.architecture.counts["layer"] if base else info.get("layers")
    name = info.get("base", {}).get("path") if native else state.config.get("base_model_name_or_path")
    original = read_original(state.source) if native else None
    return PROFILES[profile](Request(state, layers or None, name, dtype, base, original))


def portable(request: Request) -> PeftAdapter:
    """One rank and one alpha for every module, no rsLoRA."""
    state = request.state
    check_plain(state, "portable")
    tensors, rank, alpha = uniform(state.modules, request.dtype)
    where = targets([module.name for module in state.modules], request.layer_count)
    return PeftAdapter(tensors, config_of(request, r=rank, lora_alpha=alpha, **where))


def sglang(request: Request) -> PeftAdapter:
    """Like portable, with zeros where SGLang stacks projections of which one is missing."""
    state = request.state
    check_plain(state, "sglang")
    modules = with_stacked(state, request.base)
    tensors, rank, alpha = uniform(modules, request.dtype)
    where = targets([module.name for module in modules], request.layer_count)
    return PeftAdapter(tensors, config_of(request, r=rank, lora_alpha=alpha, **where))


def as_is(request: Request) -> PeftAdapter:
    """Every tensor as it is, with ranks, alphas, rsLoRA and whatever else PEFT reads."""
    state, original = request.state, request.original
    found: dict[str, LazyTensor] = {}
    for module in state.modules:
        if original is not None:
            found |= zip(_original_keys(original, module), slots(module).values(), strict=True)
        else:
            found |= {peft_key(tensor, module.name, slot): tensor for slot, tensor in slots(module).items()}
    for parameter, tensor in state.full.items():
        found[peft_key(tensor, *parameter.rsplit(".", 1))] = tensor
    tensors = tuple(from_matrix(key, tensor, dtype=request.dtype) for key, tensor in found.items())
    if original is not None:
        return PeftAdapter(tensors, original.config)
    return PeftAdapter(tensors, state.config if state.format == "peft" else _trained_config(request))


def _original_keys(original: Original, module: AdapterModule) -> Sequence[str]:
    keys = original.keys.get(module.name, ())
    if len(keys) != len(module.tensors):
        raise ValueError(f"{module.A.file}: {IMPORTED_FILE} has no keys for {module.name}, which {INFO_FILE} has")
    return keys


def _trained_config(request: Request) -> dict[str, Any]:
    """The configuration by which PEFT does what was trained here; names are Hugging Face's, whatever they were given as."""
    config = LoraConfig.from_dict(request.state.config, str(request.state.source))
    modules = {module.name: (module.rank, _alpha_of(module, config, request.state)) for module in request.state.modules}
    trained = {
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_dropout": config.lora_dropout,
    }
    return config_of(request, **trained, **selection(modules, request.layer_count))


def _alpha_of(module: AdapterModule, config: LoraConfig, state: AdapterState) -> float:
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if config.scaling(module.rank, alpha) == module.scaling:
            return alpha
    raise ValueError(
        f"{state.source}: {INFO_FILE} gives {module.name} rank {module.rank} and scaling {module.scaling}, which no alpha of its "
        f"configuration makes"
    )


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


def uniform(modules: Sequence[AdapterModule], dtype: torch.dtype | None) -> tuple[tuple[PeftTensor, ...], int, float]:
    """(tensors, rank, alpha) with one rank and one alpha, without rsLoRA.

    Args:
        dtype: None keeps each tensor's, unless a factor cannot be folded into a B of lower precision without loss: then all
            become float32.
    """
    rank = max(module.rank for module in modules)
    scaling = most_common(module.scaling for module in modules)
    factors = {module.name: module.scaling / scaling for module in modules}
    if dtype is None and not all(_folds(factors[module.name], module.B.dtype) for module in modules):
        dtype = torch.float32
    tensors = []
    for module in modules:
        A, B, name = module.A, module.B, f"{PREFIX}{module.name}"
        tensors.append(from_matrix(f"{name}.lora_A.weight", A, shape=(rank, A.shape[1]), dtype=dtype))
        factor = factors[module.name]
        tensors.append(from_matrix(f"{name}.lora_B.weight", B, shape=(B.shape[0], rank), dtype=dtype, factor=factor))
    return tuple(tensors), rank, _alpha(scaling, rank)


def _folds(factor: float, dtype: torch.dtype) -> bool:
    """Whether a matrix of the dtype can be multiplied without loss: float16 has no room for it."""
    power_of_two = abs(math.frexp(factor)[0]) == 0.5
    return factor == 1.0 or dtype.itemsize >= 4 or (dtype == torch.bfloat16 and power_of_two)


def _alpha(scaling: float, rank: int) -> float:
    """The alpha with ``alpha / rank == scaling``; an ``int`` if there is one, as PEFT writes it."""
    nearest = round(scaling * rank)
    return nearest if nearest / rank == scaling else scaling * rank


def config_of(request: Request, **fields: Any) -> dict[str, Any]:
    """An ``adapter_config.json`` with nothing on that ``fields`` do not say."""
    return {
        "base_model_name_or_path": request.base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "task_type": request.state.config.get("task_type", "CAUSAL_LM"),
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }


PROFILES: Mapping[str, Callable[[Request], PeftAdapter]] = {
    "portable": portable,
    "peft": as_is,
    "sglang": sglang,
}
