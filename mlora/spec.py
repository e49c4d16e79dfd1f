"""A family's layer as a spec of Megatron's, local or Transformer Engine's, with a norm wherever the family's table has one."""

from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp

from mlora.families import Architecture, Family
from mlora.families.family import WHOLE
from parallel.norm import KeyRMSNorm, PostNorm, QueryRMSNorm, SequenceParallelRMSNorm

TransformerImpl = Literal["local", "transformer_engine"]

# What a query's or key's norm is over -> the norm.
_QK_NORMS = {"head": SequenceParallelRMSNorm, "query": QueryRMSNorm, "key": KeyRMSNorm}
# The linear into which Transformer Engine takes the norm in front of it -> that norm; by their names within a layer.
FUSED_NORMS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}


def transformer_engine_obstacle(architecture: Architecture) -> str | None:
    """Why Transformer Engine's spec cannot hold this model exactly, or on this machine; None if it can."""
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        return "Transformer Engine is not installed"
    if not torch.cuda.is_available():
        return "Transformer Engine needs a GPU"
    if architecture.attention_cap is not None:
        return "Transformer Engine's attention cannot cap the scores"
    if len(set(architecture.windows) - {None}) > 1:
        return "Megatron gives Transformer Engine's attention windows of one size only"
    return None


def layer_spec(family: Family, config: TransformerConfig, transformer_impl: TransformerImpl = "local") -> ModuleSpec:
    """The layers of a family; ``config`` is the one that they will be built with."""
    layer = _local(family, config) if transformer_impl == "local" else _transformer_engine(family, config)
    slots: Any = layer.submodules
    for name in ("self_attn_bda", "mlp_bda"):
        if _norm_size(family, name):
            setattr(slots, name, ModuleSpec(module=PostNorm, params={"config": config}))
    for name in ("q_layernorm", "k_layernorm"):
        if size := _norm_size(family, f"self_attention.{name}"):
            setattr(slots.self_attention.submodules, name, _QK_NORMS[size])
    return layer


def fused_norm(linear: str) -> tuple[str, str]:
    """(path of its block, name in it) of the norm that Transformer Engine has taken into a linear, given by its full path.

    That of a linear which no norm of the local spec stands in front of has the name ``layer_norm`` in the linear.
    """
    for path, norm in FUSED_NORMS.items():
        if linear.endswith(f".{path}"):
            return linear.removesuffix(f".{path}"), norm
    return linear, "layer_norm"


def final_norm(transformer_impl: TransformerImpl) -> Any:
    """The norm behind the last layer."""
    if transformer_impl == "local":
        return SequenceParallelRMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _local(family: Family, config: TransformerConfig) -> ModuleSpec:
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    for norm in FUSED_NORMS.values():
        setattr(layer.submodules, norm, SequenceParallelRMSNorm if _norm_size(family, norm) else IdentityOp)
    return layer


def _transformer_engine(family: Family, config: TransformerConfig) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    for path, norm in FUSED_NORMS.items():
        if not _norm_size(family, norm):
            block, _, linear = path.partition(".")
            setattr(_submodules(getattr(layer.submodules, block)), linear, TEColumnParallelLinear)
    return layer


def _submodules(spec: Any) -> Any:
    """Of a module's spec, which newer Megatron gives as a builder for some."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def _norm_size(family: Family, module: str) -> str | None:
    """What a norm in a layer is over, in names of the architecture's sizes; None if the family has no such norm."""
    parts = family.modules.get(f"decoder.layers.{{layer}}.{module}")
    return parts[WHOLE].shape[0] if parts else None
