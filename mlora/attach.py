"""``apply``: freeze the base and hang adapters below its linears, without replacing a module or renaming a parameter."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.mlp import MLP

from mlora.adapter import LinearAdapter
from mlora.bank import AdapterBank, Bank
from mlora.config import LoraConfig
from mlora.copies import (
    Candidate,
    CopiedModule,
    CopyBank,
    UntiedOutput,
    base_weight,
    choose_copied,
    copied_modules,
    new_copy,
    rows_of,
)
from mlora.counts import parameter_counts
from mlora.decomposition import check_started, start_from_weight
from mlora.dora import reset_magnitudes
from mlora.embedding import EmbeddingAdapter, EmbeddingLora, embedding_layout
from mlora.factor import Factor
from mlora.families import Family
from mlora.local import LocalLora
from mlora.names import DEFAULT_ADAPTER, hf_module_name
from mlora.refusals import check_supported, check_untied, is_local
from mlora.targets import Projection, Target, select
from mlora.te import MlpLora, TeLora
from mlora.vocabulary import is_embedding, is_output_layer, leave_pad_token, real_rows
from parallel.layout import WHOLE, LinearLayout, read_layout
from parallel.stages import as_chunks, named_modules, union_over_stages
from parallel.together import together

logger = logging.getLogger(__name__)


_adapted_classes: dict[tuple[type, type], type] = {}


def adapted_class(base: type, mixin: type) -> type:
    """The subclass of a module's class that adds the adapter; one for each class, so that ``isinstance`` stays true."""
    if (base, mixin) not in _adapted_classes:
        made = type(f"Lora{base.__name__}", (mixin, base), {"__module__": base.__module__})
        _adapted_classes[base, mixin] = made
    return _adapted_classes[base, mixin]


def banks(model: torch.nn.Module | Sequence[torch.nn.Module]) -> Iterator[AdapterBank]:
    """Every adapter bank of this rank's chunks."""
    for chunk in as_chunks(model):
        yield from (module for module in chunk.modules() if isinstance(module, AdapterBank))


def factors(
    model: torch.nn.Module | Sequence[torch.nn.Module], adapter_name: str = DEFAULT_ADAPTER
) -> Iterator[Factor]:
    """Every parameter of one adapter on this rank, with its place in the whole.

    Raises:
        ValueError: no linear on any stage has an adapter of this name.
    """
    for adapter in linear_adapters(model, adapter_name):
        yield from adapter.factors()
    for module, copies in copied_modules(model):
        yield from copies.factors(adapter_name, module)


def linear_adapters(
    model: torch.nn.Module | Sequence[torch.nn.Module], adapter_name: str = DEFAULT_ADAPTER
) -> Iterator[LinearAdapter]:
    """One adapter on every linear of this rank that it targets.

    Raises:
        ValueError: no linear on any stage has an adapter of this name.
    """
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    for bank in found:
        adapter = bank.adapter(adapter_name)
        if adapter is not None:
            yield adapter


def check_adapter_exists(found: Sequence[AdapterBank], adapter_name: str) -> None:
    """Raises ValueError, on every stage alike, for a name that no stage knows. A collective of the pipeline group."""
    names = union_over_stages({name for bank in found for name in bank.adapters})
    if adapter_name not in names:
        raise ValueError(f"there is no adapter {adapter_name!r}; there is {', '.join(sorted(names)) or 'none'}")


def apply(
    model: Sequence[torch.nn.Module],
    config: LoraConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    family: Family | None = None,
) -> list[torch.nn.Module]:
    """Freeze the base model and attach a LoRA adapter. Call it on every rank, before DDP and the optimizer.

    Its type is that of Megatron's pre-wrap hook. Base modules stay the same objects with the same parameter and state-dict
    names. A second call with another name adds an adapter, frozen and inactive until :func:`mlora.set_adapter`; that may also be
    done to a model in training, whose gradient buffers stay as they are.

    Args:
        model: this rank's chunks: one, or one for each virtual pipeline stage.
        config: what to adapt. DoRA, and the inits that decompose, start from the base weights, which must be in place.
        adapter_name: of the new adapter.
        family: whose Hugging Face names the linears have (``Pretrained.family``); None for Llama's names.

    Returns:
        ``model``'s chunks.

    Raises:
        ValueError: the name is taken or no identifier; a target, pattern or layer matches nothing on any stage (the message
            lists what exists); a linear is none of the family's; a targeted linear is of a kind that cannot be adapted, or its
            weight cannot be decomposed; a module of ``modules_to_save`` is of a kind that cannot be trained whole; the model is in
            Megatron's DDP already, and this is its first adapter.

    Every error is raised on every rank alike, before anything in the model has changed.
    """
    if not adapter_name.isidentifier():
        raise ValueError(
            f"adapter name {adapter_name!r} must be a Python identifier: it becomes part of parameter names"
        )
    chunks = as_chunks(model)
    check_untied(chunks, config, family)
    linears = together(lambda: {name: (module, layout) for name, module, layout in _linears(chunks)})
    projections = together(lambda: _projections([layout for _, layout in linears.values()], family))
    targets = select(projections, config, union_over_stages)
    wholes = choose_copied(chunks, targets, config, family)
    existing = union_over_stages({name for bank in banks(chunks) for name in bank.adapters})
    if adapter_name in existing:
        raise ValueError(f"there is an adapter {adapter_name!r} already")
    adapters = together(lambda: _make(chunks, linears, targets, config, first=not existing))
    if config.decomposes:
        for module, adapter in adapters:
            start_from_weight(adapter, base_weight(module))
        together(lambda: check_started(adapter for _, adapter in adapters))
    if config.use_dora:
        for module, adapter in adapters:
            reset_magnitudes(adapter, base_weight(module))
    if not existing:
        for chunk in chunks:
            chunk.requires_grad_(False)
    for module, adapter in adapters:
        _attach(module, adapter, adapter_name, first=not existing)
    for whole in wholes:
        _attach_copy(whole, adapter_name, first=not existing)
    for chunk in chunks:
        _join_mlps(chunk)
        _untie_output(chunk)
        _let_gradients_reach_the_first_stage(chunk)
    _log_summary(chunks, adapter_name)
    return list(model)


def _linears(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module, LinearLayout]]:
    """(global name, module, layout) of every module that can have a low-rank term."""
    for chunk in chunks:
        tied = getattr(chunk, "share_embeddings_and_output_weights", False)
        for name, module in named_modules(chunk):
            if is_output_layer(name) and tied:
                continue  # Its weight is the embedding's, which it need not hold.
            layout = embedding_layout(name, module) if is_embedding(name, module) else read_layout(name, module)
            if layout is not None:
                yield name, module, layout


def _projections(layouts: Sequence[LinearLayout], family: Family | None) -> list[Projection]:
    return [
        Projection(layout.name, part, hf_module_name(layout.name, part, family))
        for layout in layouts
        for part, _ in layout.parts
    ]


def _make(
    chunks: Sequence[torch.nn.Module],
    linears: Mapping[str, tuple[torch.nn.Module, LinearLayout]],
    targets: Sequence[Target],
    config: LoraConfig,
    first: bool,
) -> list[tuple[torch.nn.Module, LinearAdapter]]:
    """The new adapters and the linears that they belong to; changes nothing."""
    if first and any(hasattr(parameter, "main_grad") for chunk in chunks for parameter in chunk.parameters()):
        raise ValueError(
            "the model is in DDP already, whose gradient buffers would not hold the adapter: attach it before"
        )
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.projection.module, []).append(target)
    made = []
    for name, chosen in by_module.items():
        module, layout = linears[name]
        check_supported(module, layout, config)
        kind = EmbeddingAdapter if isinstance(module, VocabParallelEmbedding) else LinearAdapter
        adapter = kind(layout, chosen, config, base_weight(module), real_rows(module))
        if isinstance(adapter, EmbeddingAdapter):
            leave_pad_token(module, adapter.lora_A[WHOLE], 1)
        made.append((module, adapter))
    return made


def _attach(module: torch.nn.Module, adapter: LinearAdapter, adapter_name: str, first: bool) -> None:
    if not isinstance(module, LocalLora | TeLora | EmbeddingLora):
        module.add_module("lora", AdapterBank(adapter.layout))
        module.__class__ = adapted_class(type(module), _mixin(module))
    bank: AdapterBank = module.lora  # type: ignore[assignment]
    bank.adapters[adapter_name] = adapter.train(module.training)
    if first:
        bank.active = adapter_name
    else:
        adapter.requires_grad_(False)


def _mixin(module: torch.nn.Module) -> type:
    if isinstance(module, VocabParallelEmbedding):
        return EmbeddingLora
    return LocalLora if is_local(module) else TeLora


def _attach_copy(whole: Candidate, adapter_name: str, first: bool) -> None:
    name, module = whole.name, whole.module
    copy = new_copy(name, module)
    if not isinstance(module, CopiedModule):
        module.add_module("copies", CopyBank(name, whole.hf_names[0], rows_of(name, module)))
        module.__class__ = adapted_class(type(module), CopiedModule)
    bank: CopyBank = module.copies  # type: ignore[assignment]
    bank.adapters[adapter_name] = copy.requires_grad_(first)
    if first:
        bank.active = adapter_name


def _join_mlps(chunk: torch.nn.Module) -> None:
    """Let an MLP of Transformer Engine's linears, both adapted, run as one."""
    for module in chunk.modules():
        if type(module) is MLP and isinstance(module.linear_fc1, TeLora) and isinstance(module.linear_fc2, TeLora):
            module.__class__ = adapted_class(MLP, MlpLora)


def _untie_output(chunk: torch.nn.Module) -> None:
    tied = getattr(chunk, "share_embeddings_and_output_weights", False) and getattr(chunk, "pre_process", False)
    if tied and isinstance(chunk.embedding.word_embeddings, CopiedModule) and not isinstance(chunk, UntiedOutput):  # type: ignore[union-attr]
        chunk.__class__ = adapted_class(type(chunk), UntiedOutput)


def freeze_all_but(bank: Bank, adapter_name: str | None) -> None:
    """Let only the adapter ``adapter_name`` of a bank train; None: none."""
    for name, adapter in bank.adapters.items():
        adapter.requires_grad_(name == adapter_name)


def _let_gradients_reach_the_first_stage(chunk: torch.nn.Module) -> None:
    """Make the embedding's output require a gradient where something behind it needs one.

    With the base frozen, nothing in front of the first adapter requires a gradient. Recomputation then records no graph for a
    layer, and a stage without adapters has nothing to send a gradient back to. Both need hidden states that require grad.
    """
    config: Any = getattr(chunk, "config", None)
    if config is None or (config.recompute_granularity is None and config.pipeline_model_parallel_size == 1):
        return
    for module in chunk.modules():
        if isinstance(module, LanguageModelEmbedding) and not getattr(module, "_mlora_hook", False):
            module.register_forward_hook(_require_grad)
            module._mlora_hook = True


def _require_grad(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def _log_summary(chunks: Sequence[torch.nn.Module], adapter_name: str) -> None:
    """Which linears have the adapter, and how many of the model's parameters are its own, each global element once."""
    group = parallel_state.get_model_parallel_group()
    sizes = {factor.name: math.prod(factor.shape) for factor in factors(chunks, adapter_name)}
    gathered: list[dict[str, int] | None] = [None] * group.size()
    torch.distributed.all_gather_object(gathered, sizes, group=group)  # No rank need hold a piece of every factor.
    own = sum({name: size for part in gathered if part for name, size in part.items()}.values())
    _, total = parameter_counts(chunks)
    trains = union_over_stages({"yes" for factor in factors(chunks, adapter_name) if factor.parameter.requires_grad})
    linears = union_over_stages({bank.layout.name for bank in banks(chunks) if adapter_name in bank.adapters})
    if torch.distributed.get_rank() == 0:
        does = "train" if trains else "are its own, and do not train"
        share = f"{own:,} of {total:,} parameters {does} ({own / total:.4%})"
        logger.info("LoRA adapter %r on %d linears; %s", adapter_name, len(linears), share)
