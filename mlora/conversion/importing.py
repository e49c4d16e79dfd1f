"""A PEFT adapter in the words of the library, to go on training at any layout.

Each of its tensors is one of the adapter's matrices, bit for bit. :mod:`mlora.conversion.native_writer` makes a native checkpoint
of it, in one process; :func:`load_import` fills an attached adapter, on its ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from mlora.adapter import SHARED, Factor
from mlora.attach import DEFAULT_ADAPTER, factors
from mlora.config import LoraConfig
from mlora.conversion.peft_config import CONFIG_FILE, PeftConfig
from mlora.conversion.peft_writer import peft_key, slots
from mlora.conversion.selection import selection
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, refuse
from mlora.pretrained import Pretrained
from mlora.targets import Projection, Target, select
from parallel.stages import union_over_stages
from parallel.together import together


@dataclass(frozen=True)
class Import:
    """A PEFT adapter and the model that it is for.

    Attributes:
        source: where it was read from.
        base: its base model.
        config: with which :func:`mlora.apply` attaches exactly its modules, with its ranks and scalings.
        targets: its modules.
        matrices: by the global name that :class:`~mlora.adapter.Factor` has.
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
    _check_trainable(state)
    if any(base.path.glob("*.safetensors")):
        with base.weights():
            pass
    projections = base_projections(base)
    _check_fit(state, projections, base)
    config = _config(state, base)
    matrices: dict[str, LazyTensor] = {}
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
        if len(shape) == 2 and module not in ("embedding.word_embeddings", "output_layer"):
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


def _check_trainable(state: AdapterState) -> None:
    if state.format != "peft":
        raise ValueError(f"{state.source} is no PEFT directory, but a {state.layout}: it can be trained as it is")
    for parameter, tensor in state.full.items():
        raise ValueError(
            f"{tensor.file}: {tensor.key} is a whole parameter ({parameter}); only low-rank terms can be trained on"
        )
    for module in state.modules:
        if module.embedding:
            raise ValueError(f"{module.A.file}: {module.A.key}: embeddings cannot be adapted in training")
        if (weight := module.base_weight) is not None:
            raise ValueError(f"{weight.file}: {weight.key}: base weights cannot be replaced in training")


def _check_fit(state: AdapterState, projections: Sequence[Projection], base: Pretrained) -> None:
    shapes = base.family.tensors(base.architecture)
    names = {projection.hf_name for projection in projections}
    for module in state.modules:
        key, weight = f"{module.A.file}: {module.A.key}", f"{module.name}.weight"
        if module.name not in names:
            exists = weight in shapes or module.name == base.family.hf_name("output_layer")
            rule = "it cannot be adapted in training" if exists else f"{base.path} has no such module"
            raise ValueError(f"{key}: {module.name}: {rule}")
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


def load_import(
    plan: Import, model: torch.nn.Module | Sequence[torch.nn.Module], adapter_name: str = DEFAULT_ADAPTER
) -> None:
    """Fill the adapter that :func:`mlora.apply` attached with ``plan.config``, on every rank and at any layout.

    Every rank reads the PEFT file. Load before the optimizer is made: it may keep float32 copies of the parameters.

    Raises:
        ValueError: another adapter is attached, or a tensor is not finite; on every rank alike, and nothing has changed.
    """
    held = list(factors(model, adapter_name))
    attached = union_over_stages({factor.name for factor in held if factor.name.endswith("lora_A")})
    wanted = {name for name in plan.matrices if name.endswith("lora_A")}
    if attached != wanted:
        raise ValueError(f"{plan.source} and the attached adapter differ in {min(attached ^ wanted)}")
    pieces = together(lambda: [_piece(plan, factor) for factor in held])
    with torch.no_grad():
        for factor, piece in zip(held, pieces, strict=True):
            factor.parameter.copy_(piece)


def _piece(plan: Import, factor: Factor) -> torch.Tensor:
    tensor = plan.matrices.get(factor.name)
    if tensor is None:
        raise ValueError(f"{plan.source} has nothing for {factor.name} of the attached adapter")
    if tensor.shape != factor.shape:
        raise ValueError(
            f"{tensor.file}: {tensor.key} has shape {list(tensor.shape)}, in the model {list(factor.shape)}"
        )
    place = zip(factor.offset, factor.parameter.shape, strict=True)
    return tensor.load()[tuple(slice(first, first + count) for first, count in place)].clone()
