"""A family's layer as a spec of Megatron's: its local spec, with a norm wherever the family's table has one."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp

from mlora.families import Family
from mlora.families.family import WHOLE
from parallel.norm import KeyRMSNorm, PostNorm, QueryRMSNorm, SequenceParallelRMSNorm

# What a query's or key's norm is over -> the norm.
_QK_NORMS = {"head": SequenceParallelRMSNorm, "query": QueryRMSNorm, "key": KeyRMSNorm}


def layer_spec(family: Family, config: TransformerConfig) -> ModuleSpec:
    """The layers of a family; ``config`` is the one that they will be built with."""
    layer: ModuleSpec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    slots: Any = layer.submodules
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(slots, name, SequenceParallelRMSNorm if _norm_size(family, name) else IdentityOp)
    for name in ("self_attn_bda", "mlp_bda"):
        if _norm_size(family, name):
            setattr(slots, name, ModuleSpec(module=PostNorm, params={"config": config}))
    for name in ("q_layernorm", "k_layernorm"):
        if size := _norm_size(family, f"self_attention.{name}"):
            setattr(slots.self_attention.submodules, name, _QK_NORMS[size])
    return layer


def _norm_size(family: Family, module: str) -> str | None:
    """What a norm in a layer is over, in names of the architecture's sizes; None if the family has no such norm."""
    parts = family.modules.get(f"decoder.layers.{{layer}}.{module}")
    return parts[WHOLE].shape[0] if parts else None
