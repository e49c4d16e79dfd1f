"""A Hugging Face PEFT directory as an :class:`~mlora.conversion.state.AdapterState`.

Whatever PEFT itself would skip in silence (a key of the wrong prefix, a module that the configuration does not target) is a
problem, as is whatever a low-rank term, DoRA's magnitude or a whole parameter cannot express.

| key, behind ``base_model.model.`` | becomes |
|---|---|
| ``<module>.lora_A.weight``, ``lora_B.weight`` | A, B |
| ``<module>.lora_embedding_A``, ``lora_embedding_B`` | A, B of an embedding |
| ``<module>.lora_magnitude_vector`` | magnitude |
| ``<module>.base_layer.weight`` | base_weight |
| ``<module>.weight``, ``.bias`` of ``modules_to_save``, resized embeddings, trained biases | full |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mlora.conversion.peft_config import CONFIG_FILE, EMBEDDINGS, PeftConfig, read_config
from mlora.conversion.safetensors_file import FLOATS, SafetensorsFile
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, Report, natural_order

WEIGHTS_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# The last part of a key -> the slot of the module that it fills. An adapter's name may stand in it, as in a live model.
_NAME = r"(?:\.(?P<adapter>[^.]+))?"
_SLOTS = [
    (re.compile(rf"(?P<module>.+)\.lora_(?P<slot>[AB]){_NAME}\.weight"), ""),
    (re.compile(rf"(?P<module>.+)\.lora_embedding_(?P<slot>[AB]){_NAME}"), "embedding_"),
    (
        re.compile(r"(?P<module>.+)\.lora_(?P<slot>magnitude)_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"),
        "",
    ),
    (re.compile(r"(?P<module>.+)\.(?P<slot>base_layer)\.weight(?P<adapter>)"), ""),
]
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
# Keys of features that are refused, with their names; the configuration usually says so too.
_REFUSED = {
    ".bias": "a bias on a LoRA factor (lora_bias)",
    ".trainable_tokens_delta": "single trained rows of the embedding (trainable_token_indices)",
    ".lora_diag": "KaSA's diagonal (kasa_config)",
}
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass
class _Found:
    """What the keys of a file say, before any of it is checked."""

    slots: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    full: dict[str, LazyTensor] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)


def is_peft(path: Path) -> bool:
    """Whether ``path`` is meant as a PEFT directory."""
    return any((path / name).is_file() for name in (WEIGHTS_FILE, PICKLE_FILE)) or (path / CONFIG_FILE).is_file()


def read_peft(path: Path, report: Report) -> AdapterState:
    """The adapter in a PEFT directory; its problems are told to ``report``.

    Raises:
        FileNotFoundError: the weights or the configuration are missing.
        ValueError: a file is corrupt as a whole: nothing can be told of its tensors.
    """
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG_FILE}: without it the scaling of the adapter is unknown")
    values = read_config(path / CONFIG_FILE)
    config = PeftConfig.from_dict(values, str(path / CONFIG_FILE), report)
    file, tensors = _open_weights(path)
    found = _sort_keys(file, tensors, config, report)
    modules = [
        module
        for name, slots in found.slots.items()
        if (module := _module(file, name, slots, config, report)) is not None
    ]
    _check_saved(file, found, config, report)
    return AdapterState(
        source=path,
        format="peft",
        layout=f"Hugging Face PEFT directory, {file.name}",
        modules=tuple(sorted(modules, key=lambda module: natural_order(module.name))),
        full={name: found.full[name] for name in sorted(found.full, key=natural_order)},
        config=values,
        ties_embeddings=config.ensure_weight_tying,
    )


def _open_weights(path: Path) -> tuple[Path, dict[str, LazyTensor]]:
    """The file that PEFT would load, and its tensors."""
    if (path / WEIGHTS_FILE).is_file():
        safetensors = SafetensorsFile(path / WEIGHTS_FILE)
        return safetensors.path, {key: safetensors.lazy(key) for key in safetensors.entries}
    if (path / PICKLE_FILE).is_file():
        return path / PICKLE_FILE, _open_pickle(path / PICKLE_FILE)
    raise FileNotFoundError(f"{path} has neither {WEIGHTS_FILE} nor {PICKLE_FILE}")


def _open_pickle(file: Path) -> dict[str, LazyTensor]:
    """Tensors of a torch.save file, by torch's restricted unpickler, mapped where its format allows."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        # Without torch's advice to load it unsafely.
        found = re.search(r"[Uu]nsupported (?:global: )?\w+ \S+", str(error))
        reason = found[0] if found else str(error).partition("\n")[0].partition(" In PyTorch")[0]
        raise ValueError(
            f"{file} is corrupt, or holds more than tensors (pickled code is never run): {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not tensors by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise ValueError(f"{file}: {key!r} is not a tensor")

    def lazy(key: str, value: torch.Tensor) -> LazyTensor:
        return LazyTensor(
            key,
            file,
            tuple(value.shape),
            value.dtype,
            lambda: value.detach().clone(memory_format=torch.contiguous_format),
        )

    return {key: lazy(key, value) for key, value in content.items()}


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _sort_keys(file: Path, tensors: Mapping[str, LazyTensor], config: PeftConfig, report: Report) -> _Found:
    found = _Found()
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            report(
                f"{file}: {key} is stored as {tensor.dtype}; an adapter's tensors are float32, bfloat16, float16 or float64"
            )
            continue
        path = _strip(key)
        if path is None:
            report(f"{file}: {key} does not begin with {PREFIX}: PEFT would ignore it")
            continue
        _sort_key(file, path, tensor, config, found, report)
    if len(found.adapters) > 1:
        report(f"{file} holds tensors of several adapters: {', '.join(sorted(found.adapters))}")
    return found


def _strip(key: str) -> str | None:
    """The key behind PEFT's prefix, without what wrappers of the model put in; None if it has no such prefix."""
    key = _WRAPPERS.sub("", key).removeprefix("module.")
    if not key.startswith(PREFIX):
        return None
    return key.removeprefix(PREFIX).removeprefix("module.")


def _sort_key(file: Path, path: str, tensor: LazyTensor, config: PeftConfig, found: _Found, report: Report) -> None:
    match = None
    for expression, kind in _SLOTS:
        if match := expression.fullmatch(path):
            target, slot = found.slots.setdefault(match["module"], {}), kind + match["slot"]
            break
    else:
        if match := _SAVED.fullmatch(path):
            path = f"{match['module']}.{match['leaf']}"
        path = path.replace(".base_layer.bias", ".bias")
        if problem := _why_not_full(path, config):
            report(f"{file}: {tensor.key}: {problem}")
            return
        target, slot = found.full, path
    if match and match["adapter"]:
        found.adapters.add(match["adapter"])
    if slot in target:
        report(f"{file}: {tensor.key} and {target[slot].key} are the same tensor of one module")
        return
    target[slot] = tensor


def _why_not_full(parameter: str, config: PeftConfig) -> str | None:
    """What is wrong with a tensor that must be a whole parameter of the base; None if it may be one."""
    module, _, leaf = parameter.rpartition(".")
    if ".lora_" in parameter or ".token_adapter." in parameter:
        feature = next((text for end, text in _REFUSED.items() if parameter.endswith(end)), "this part of an adapter")
        return f"{feature} is not supported"
    if config.saves(module) or any(module.endswith(name) for name in config.modules_to_save):
        return None
    if leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS:
        return None  # PEFT adds the embeddings when the vocabulary was resized.
    if leaf == "bias" and config.bias in ("all", "lora_only"):
        return None
    return "unknown key: neither a LoRA tensor nor of a module in modules_to_save"


def _module(
    file: Path, name: str, slots: Mapping[str, LazyTensor], config: PeftConfig, report: Report
) -> AdapterModule | None:
    embedding = any(slot.startswith("embedding_") for slot in slots)
    kind = "lora_embedding_" if embedding else "lora_"
    wanted = [f"{'embedding_' if embedding else ''}{factor}" for factor in "AB"]
    allowed = {*wanted, "magnitude", "base_layer"}
    if missing := [slot for slot in wanted if slot not in slots]:
        report(f"{file}: {name} has {', '.join(sorted(slots))} but lacks {kind}{missing[0][-1]}")
        return None
    if left := sorted(slots.keys() - allowed):
        report(f"{file}: {slots[left[0]].key}: {name} is an embedding and a linear at once")
        return None
    A, B, magnitude = slots[wanted[0]], slots[wanted[1]], slots.get("magnitude")
    rank = config.rank(name)
    if problem := _shape_problem(A, B, magnitude, slots.get("base_layer"), rank, embedding):
        report(f"{file}: {problem}")
        return None
    if not (config.targets(name) or config.ties(name)):
        report(f"{file}: {A.key}: {CONFIG_FILE} does not target {name}, so PEFT would ignore it")
    if config.use_dora != (magnitude is not None):
        says = "says use_dora, but the file has no" if config.use_dora else "does not say use_dora, but the file has a"
        report(f"{file}: {name}: {CONFIG_FILE} {says} lora_magnitude_vector")
    return AdapterModule(name, rank, config.scaling(name), A, B, magnitude, embedding, slots.get("base_layer"))


def _shape_problem(
    A: LazyTensor, B: LazyTensor, magnitude: LazyTensor | None, base: LazyTensor | None, rank: int, embedding: bool
) -> str | None:
    for tensor in (A, B):
        if len(tensor.shape) != 2:
            return f"{tensor.key} has shape {list(tensor.shape)}; a LoRA matrix has two dimensions"
    for tensor, found in ((A, A.shape[0]), (B, B.shape[1])):
        if found != rank:
            return f"{tensor.key} has shape {list(tensor.shape)}, of rank {found}; {CONFIG_FILE} says rank {rank}"
    if magnitude is not None and magnitude.shape != B.shape[:1]:
        return f"{magnitude.key} has shape {list(magnitude.shape)}, not [{B.shape[0]}]"
    weight = (A.shape[1], B.shape[0]) if embedding else (B.shape[0], A.shape[1])
    if base is not None and base.shape != weight:
        return f"{base.key} has shape {list(base.shape)}, and the low-rank term {list(weight)}"
    return None


def _check_saved(file: Path, found: _Found, config: PeftConfig, report: Report) -> None:
    for name in config.modules_to_save:
        if not any(parameter.rpartition(".")[0].endswith(name) or f"{name}." in parameter for parameter in found.full):
            report(f"{file}: {CONFIG_FILE} has {name!r} in modules_to_save, but the file has no tensor of it")
    for parameter, tensor in found.full.items():
        module = parameter.rpartition(".")[0]
        if parameter.endswith(".weight") and module in found.slots:
            report(f"{file}: {tensor.key} replaces {module}, which also has a low-rank term")
    if not found.slots and not found.full:
        report(f"{file} holds no adapter tensors")
