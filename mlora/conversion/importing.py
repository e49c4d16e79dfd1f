"""A PEFT adapter in the words of the library, to go on training at any layout.

Each of its tensors is one of the adapter's matrices, bit for bit. :mod:`mlora.conversion.native_writer` makes a native checkpoint
of it, in one process; :func:`mlora.imported.load_import` fills an attached adapter, on its ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from mlora.config import LoraConfig
from mlora.conversion.peft_config import CONFIG_FILE, PeftConfig
from mlora.conversion.peft_writer import peft_key, slots
from mlora.conversion.selection import selection
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, refuse
from mlora.names import SHARED
from mlora.pretrained import Pretrained
from mlora.targets import Projection, Target, matches_saved, select


@dataclass(frozen=True)
class Import:
    """A PEFT adapter and the model that it is for.

    Attributes:
        source: where it was read from.
        base: its base model.
        config: with which :func:`mlora.apply` attaches exactly its modules, with its ranks and scalings.
        targets: its modules.
        matrices: by the global name that :class:`~mlora.adapter.Factor` has, modules trained whole among them.
        original: what its ``adapter_config.json`` says.
        keys: by Hugging Face module, its keys for A, B and, with DoRA, the magnitudes.
    """

    source: Path
    base: Pretrained
    config: LoraConfig
    targets: tuple[Target, ...]
    matrices: Mapping[str, LazyTensor]
    original: Mapping[str, Any]
    keys: Mapping[str, tuple[str, ...]]


def plan_import(state: AdapterState, base: Pretrained) -> Import:
    """What importing an adapter means; only headers and configurations are read.

    Args:
        state: of a PEFT directory, from :func:`~mlora.conversion.open_adapter`.
        base: the model that it was trained on. If its weights are there, their headers are checked too.

    Raises:
        ValueError: the adapter has a part that cannot be trained, does not fit the base, or lacks a module that its configuration
            targets; file, key and rule are named.
    """
    _check_trainable(state, base)
    state = _without_base_copies(state, base)
    if any(base.path.glob("*.safetensors")):
        with base.weights():
            pass
    projections = base_projections(base)
    _check_fit(state, projections, base)
    config = _config(state, base)
    matrices: dict[str, LazyTensor] = _whole_weights(state, config, base)
    for module in state.modules:
        matrices |= _matrices(module, base)
    targets = tuple(select(projections, config))
    _check_same(state, config, targets)
    keys = {
        module.name: tuple(peft_key(tensor, module.name, slot) for slot, tensor in slots(module).items())
        for module in state.modules
    }
    return Import(state.source, base, config, targets, matrices, state.config, keys)


def base_projections(base: Pretrained) -> list[Projection]:
    """Every projection of a model that can be adapted."""
    found = []
    for parameter, shape in base.family.tensors(base.architecture).items():
        hf_name = parameter.rpartition(".")[0]
        module, parts = base.family.megatron_parts(hf_name)
        if len(shape) == 2:
            found += [Projection(module, part, hf_name) for part in parts]
    return found


def _matrices(module: AdapterModule, base: Pretrained) -> dict[str, LazyTensor]:
    """Its tensors by their global names. Where it holds several parts (Phi 3's qkv_proj), they share A and divide the rows."""
    name, parts = base.family.megatron_parts(module.name)
    rows = {"lora_B": module.B} | ({"lora_magnitude_vector": module.magnitude} if module.magnitude else {})
    if len(parts) == 1:
        return {f"{name}.{parts[0]}.{slot}": tensor for slot, tensor in ({"lora_A": module.A} | rows).items()}
    found = {f"{name}.{SHARED}.lora_A": module.A}
    for part in parts:
        first, count = base.family.rows(base.architecture, name, part)
        for slot, tensor in rows.items():
            read = partial(_rows, tensor, first, count)
            found[f"{name}.{part}.{slot}"] = replace(tensor, shape=(count, *tensor.shape[1:]), read=read)
    return found


def _rows(tensor: LazyTensor, first: int, count: int) -> torch.Tensor:
    return tensor.load()[first : first + count].clone()


def _check_trainable(state: AdapterState, base: Pretrained) -> None:
    if state.format != "peft":
        raise ValueError(f"{state.source} is no PEFT directory, but a {state.layout}: it can be trained as it is")
    ends = {base.family.hf_name(module) for module in ("embedding.word_embeddings", "output_layer")}
    adapted = state.by_name.keys() | {parameter.rpartition(".")[0] for parameter in state.full}
    if state.ties_embeddings and base.architecture.tied and ends & adapted:
        raise ValueError(
            f"{state.source / CONFIG_FILE}: ensure_weight_tying: ends of the model that train as one are not supported"
        )


def _without_base_copies(state: AdapterState, base: Pretrained) -> AdapterState:
    """The adapter without the base weights that PEFT writes along with a targeted embedding, which must be the base's own."""
    brought = [module for module in state.modules if module.base_weight is not None]
    if not brought:
        return state
    with base.weights() as weights:
        for module in brought:
            tensor, name = module.base_weight, f"{module.name}.weight"
            if tensor is None or weights.shapes.get(name) != tensor.shape:
                continue  # The module's low-rank term does not fit either.
            own = weights.read(name, 0, tensor.shape[0])
            if not torch.equal(own.to(tensor.dtype), tensor.load()):
                raise ValueError(
                    f"{tensor.file}: {tensor.key} is not the base's own: base weights cannot be replaced in training"
                )
    return replace(state, modules=tuple(replace(module, base_weight=None) for module in state.modules))


def _whole_weights(state: AdapterState, config: LoraConfig, base: Pretrained) -> dict[str, LazyTensor]:
    """The weights of ``modules_to_save`` by their global names."""
    shapes, names = base.family.tensors(base.architecture), config.modules_to_save or ()
    wanted = {
        parameter
        for parameter in shapes
        if parameter.endswith(".weight")
        and any(matches_saved(parameter.removesuffix(".weight"), name) for name in names)
    }
    for parameter in sorted(wanted - state.full.keys()):
        raise ValueError(f"{state.source}: modules_to_save names {parameter}, but the file has no tensor of it")
    found = {}
    for parameter, tensor in state.full.items():
        module, leaf = parameter.rpartition(".")[::2]
        where = f"{tensor.file}: {tensor.key}"
        if parameter not in wanted or leaf != "weight":
            raise ValueError(f"{where} is a whole parameter ({parameter}) that modules_to_save does not name")
        if tensor.shape != shapes[parameter]:
            raise ValueError(
                f"{where} has shape {list(tensor.shape)}, and in {base.path} it has {list(shapes[parameter])}"
            )
        name = base.family.megatron_parts(module)[0]
        if len(tensor.shape) == 2 and name not in ("embedding.word_embeddings", "output_layer"):
            raise ValueError(f"{where} is a whole linear ({parameter}); only its low-rank term can be trained on")
        found[f"{name}.weight"] = tensor
    return found


def _check_fit(state: AdapterState, projections: Sequence[Projection], base: Pretrained) -> None:
    shapes = base.family.tensors(base.architecture)
    names = {projection.hf_name for projection in projections}
    for module in state.modules:
        key, weight = f"{module.A.file}: {module.A.key}", f"{module.name}.weight"
        if module.name not in names:
            exists = weight in shapes or module.name == base.family.hf_name("output_layer")
            rule = "it cannot be adapted in training" if exists else f"{base.path} has no such module"
            raise ValueError(f"{key}: {module.name}: {rule}")
        is_embedding = module.name == base.family.hf_name("embedding.word_embeddings")
        if module.embedding != is_embedding:
            raise ValueError(f"{key}: {module.name} is {'an' if is_embedding else 'no'} embedding in {base.path}")
        if module.embedding and module.magnitude is not None:
            raise ValueError(
                f"{module.magnitude.file}: {module.magnitude.key}: an embedding cannot be trained with DoRA"
            )
        if module.weight_shape != shapes[weight]:
            raise ValueError(
                f"{key}: it is for a {module.name} of shape {list(module.weight_shape)}, and that of {base.path} has "
                f"{list(shapes[weight])}: another base"
            )
    config, adapted = PeftConfig.from_dict(state.config, str(state.source), lambda problem: None), state.by_name
    vocabulary = {base.family.hf_name(module) for module in ("embedding.word_embeddings", "output_layer")}
    for name in sorted((names | vocabulary) - adapted.keys()):
        if config.targets(name):
            raise ValueError(
                f"{state.source}: {CONFIG_FILE} targets {name}, but the file has no tensors for it: part of the adapter is missing"
            )


def _config(state: AdapterState, base: Pretrained) -> LoraConfig:
    """Not the fields of the file but ones that say the same: theirs may be a regular expression on names that only PEFT has."""
    peft = PeftConfig.from_dict(state.config, str(state.source / CONFIG_FILE), refuse)
    modules = {module.name: (module.rank, peft.alpha(module.name)) for module in state.modules}
    dtypes = {tensor.dtype for module in state.modules for tensor in module.tensors}
    try:
        return LoraConfig(
            **selection(modules, base.architecture.counts["layer"]),
            use_rslora=peft.use_rslora,
            use_dora=peft.use_dora,
            lora_dropout=state.config.get("lora_dropout", 0.0),
            modules_to_save=peft.modules_to_save,
            adapter_dtype=_trained_in(dtypes),
        )
    except ValueError as error:
        raise ValueError(f"{state.source / CONFIG_FILE}: {error}") from error


def _trained_in(dtypes: set[torch.dtype]) -> torch.dtype:
    """A dtype that holds every tensor exactly. Not float16, in which small updates vanish."""
    whole = reduce(torch.promote_types, dtypes)
    return torch.float32 if whole == torch.float16 else whole


def _check_same(state: AdapterState, config: LoraConfig, targets: Sequence[Target]) -> None:
    """The configuration attaches the adapter's modules, ranks and scalings: no others, and none otherwise."""
    ours = {t.projection.hf_name: (t.rank, config.scaling(t.rank, t.alpha)) for t in targets}
    theirs = {module.name: (module.rank, module.scaling) for module in state.modules}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{state.source}: (rank, scaling) of {name} would be {ours.get(name)}, not {theirs.get(name)}"
            )
