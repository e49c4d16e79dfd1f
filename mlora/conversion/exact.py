"""The exact profile: the tensors and the configuration of an adapter as they were trained, or as they were imported."""

from collections.abc import Sequence
from typing import Any

from mlora.config import LoraConfig
from mlora.conversion.native_writer import IMPORTED_FILE, Original, read_original
from mlora.conversion.peft_writer import PeftAdapter, from_matrix, peft_key, slots
from mlora.conversion.portable import Request, config_of
from mlora.conversion.selection import selection
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor
from mlora.description import INFO_FILE


def as_is(request: Request) -> PeftAdapter:
    """Every tensor as it is, with ranks, alphas, rsLoRA and whatever else PEFT reads."""
    state = request.state
    original = read_original(state.source) if state.format == "mlora" else None
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
        # The term of an adapter that started as a part of the base weight has twice the rank that it was configured with.
        "use_rslora": config.use_rslora and not config.decomposes,
        "use_dora": config.use_dora,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
    }
    return config_of(request, **trained, **selection(modules, request.layer_count))


def _alpha_of(module: AdapterModule, config: LoraConfig, state: AdapterState) -> float:
    if config.decomposes:
        return module.scaling * module.rank
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if config.scaling(module.rank, alpha) == module.scaling:
            return alpha
    raise ValueError(
        f"{state.source}: {INFO_FILE} gives {module.name} rank {module.rank} and scaling {module.scaling}, which no alpha of its "
        f"configuration makes"
    )
