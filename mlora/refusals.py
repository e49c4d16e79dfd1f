"""Modules that cannot have the low-rank term that a configuration asks for."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from mlora.config import LoraConfig
from mlora.families import Family
from mlora.names import hf_module_name
from mlora.targets import Projection, is_target
from mlora.vocabulary import is_output_layer
from parallel.layout import WHOLE, LinearLayout


def is_local(module: torch.nn.Module) -> bool:
    """Whether it is a linear of Megatron's local spec."""
    return isinstance(module, ColumnParallelLinear | RowParallelLinear)


def check_untied(chunks: Sequence[torch.nn.Module], config: LoraConfig, family: Family | None) -> None:
    """Raises ValueError if a tied output layer is named as a target."""
    if not any(getattr(chunk, "share_embeddings_and_output_weights", False) for chunk in chunks):
        return
    output = Projection("output_layer", WHOLE, hf_module_name("output_layer", WHOLE, family))
    if is_target(output, config):
        raise ValueError(
            f"target_modules: {output.hf_name} is tied to the embedding; a low-rank term of its own is not supported: leave it out"
        )


def check_supported(module: torch.nn.Module, layout: LinearLayout, lora: LoraConfig) -> None:
    """Raises ValueError, with the module's name, for one that cannot be adapted as ``lora`` says."""
    if isinstance(module, VocabParallelEmbedding):
        if lora.use_dora:
            raise ValueError(f"{layout.name}: DoRA is not supported on an embedding; leave it out of target_modules")
        if lora.decomposes:
            raise ValueError(
                f"{layout.name}: an embedding cannot start with {lora.init_lora_weights!r}; leave it out of target_modules"
            )
        return
    if is_output_layer(layout.name) and not _runs_its_own_product(module):
        raise ValueError(
            f"{layout.name}: a {type(module).__name__} multiplies with its weight by itself, where a low-rank term would be ignored"
        )
    config: Any = module.config
    if lora.lora_dropout > 0 and config.context_parallel_size > 1:
        raise ValueError(
            f"{layout.name}: a lora_dropout of {lora.lora_dropout} does not go with context parallelism, of which the masks do not "
            f"know which tokens a rank holds; set lora_dropout to 0"
        )
    if not is_local(module) and lora.use_dora and lora.lora_dropout > 0:
        raise ValueError(
            f"{layout.name}: DoRA with a lora_dropout of {lora.lora_dropout} needs a second product with the base weight, which "
            f"Transformer Engine's linears do not give; set lora_dropout to 0"
        )
    if not is_local(module) and lora.use_dora and type(module.weight) is not torch.nn.Parameter:
        raise ValueError(f"{layout.name}: DoRA needs the lengths of the weight's rows, and the weight is quantized")
    if not is_local(module) and getattr(config, "use_transformer_engine_op_fuser", False):
        raise ValueError(
            f"{layout.name}: with use_transformer_engine_op_fuser the MLP never calls its linears, so an adapter on them would do "
            f"nothing; switch it off"
        )
    if layout.expert:
        raise ValueError(f"{layout.name} is an expert's linear; experts cannot be adapted: add it to exclude_modules")
    if layout.group.size() > 1 and not _runs_its_own_collectives(module, layout):
        raise ValueError(
            f"{layout.name}: with moe_shared_expert_overlap its collectives run elsewhere, and those of a low-rank term would not: "
            f"switch it off, or add {'.'.join(layout.name.split('.')[-2:])!r} to exclude_modules"
        )
    if layout.group.size() > 1 and layout.name.endswith(".in_proj"):
        raise ValueError(
            f"{layout.name}: each rank holds a piece of every part of its rows, and an adapter's rows would be others at another "
            f"tensor parallel size: add it to exclude_modules"
        )
    if getattr(module, "gtp_remat_size", 1) > 1:
        raise ValueError(
            f"{layout.name}: its weight is rematerialised over a group (GTP), which adapters do not support"
        )


def _runs_its_own_product(module: torch.nn.Module) -> bool:
    """Whether an output layer computes by ``ColumnParallelLinear.forward``, not fused with the loss."""
    fused = "LinearCrossEntropyModule"
    return isinstance(module, ColumnParallelLinear) and all(cls.__name__ != fused for cls in type(module).__mro__)


def _runs_its_own_collectives(module: Any, layout: LinearLayout) -> bool:
    """Whether a linear whose weight is cut communicates in its forward, as it does unless Megatron has told it not to."""
    if is_local(module):
        return not module.explicit_expert_comm
    return layout.partition_dim is None or module.parallel_mode is not None
