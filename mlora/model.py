"""A Hugging Face directory as this rank's chunks of a Megatron GPTModel."""

import logging
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from mlora.attention import shape_attention
from mlora.families import Architecture
from mlora.families.rope import Rope
from mlora.loading import load_chunk
from mlora.pretrained import Pretrained
from mlora.spec import TransformerImpl, final_norm, layer_spec, transformer_engine_obstacle
from mlora.vocabulary import CapLogits, MaskPadding, Scale, padded_size, set_vocabulary
from parallel.sizes import ParallelSizes

logger = logging.getLogger(__name__)

# What changes a transformer's results and is so unless the architecture says otherwise: never an override's business.
_PLAIN: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False,
    "apply_query_key_layer_scaling": False,
    "softmax_scale": None,
    "window_size": None,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    # Fused, Megatron's softmax takes no mask but the causal one: packed samples and windows would be ignored.
    "masked_softmax_fusion": False,
}
# Overrides by which Megatron divides layers otherwise than evenly.
_UNEVEN = {
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def build_model(
    pretrained: Pretrained,
    sizes: ParallelSizes,
    *,
    dtype: torch.dtype = torch.float32,
    seq_length: int | None = None,
    transformer_impl: TransformerImpl = "local",
    **overrides: Any,
) -> list[torch.nn.Module]:
    """This rank's chunks of the model, one for each virtual pipeline stage, with the base weights in them.

    The modules are those of Megatron's local or Transformer Engine spec, on ``torch.cuda.current_device()`` (inside
    :func:`parallel.cpu.megatron_on_cpu` the CPU). Their config has what Megatron's schedules and DDP read, so that a training
    loop need not change it. Called on every rank, in process groups divided by ``sizes``.

    The embedding has Megatron's number of rows, a multiple of 128 for each rank. Logits of the added rows are the dtype's least
    value, so that losses are those of the real vocabulary, ``pretrained.architecture.vocab_size``.

    Args:
        pretrained: the opened directory.
        sizes: how the model is divided.
        dtype: of the weights: float64, float32, bfloat16 or float16.
        seq_length: the longest sequence that will be run. It matters to sequence parallelism, and to models whose rotary angles
            hold for shorter sequences only than the checkpoint was made for.
        transformer_impl: Megatron's word for the spec: "local" or "transformer_engine".
        overrides: fields of ``TransformerConfig`` that do not change the results, such as ``recompute_granularity``, or only by
            their precision, such as ``fp8``.

    Raises:
        FileNotFoundError: a file of weights is missing.
        ValueError: the model or ``seq_length`` does not divide by ``sizes``; ``seq_length`` exceeds what the rotary angles hold
            for; an override is unknown or decided by the checkpoint; a tensor is missing, left over, of another shape or type
            (file and key are named). All of it is checked on every rank alike, before anything is built.
    """
    architecture = pretrained.architecture
    if transformer_impl != "local" and (why := transformer_engine_obstacle(architecture)):
        raise ValueError(f'transformer_impl "transformer_engine": {why}; "local" can')
    _check_sizes(architecture, sizes, seq_length, uneven=bool(_UNEVEN & overrides.keys()))
    _check_length(architecture.rope, architecture.max_position_embeddings if seq_length is None else seq_length)
    config = _config(architecture, sizes, dtype, transformer_impl, overrides)
    chunks: list[torch.nn.Module] = []
    with pretrained.weights() as weights:
        for stage in range(sizes.virtual_pipeline or 1):
            chunk = _chunk(pretrained, config, transformer_impl, stage if sizes.virtual_pipeline else None)
            load_chunk(chunk, pretrained.family, architecture, weights)
            chunks.append(chunk)
        read, total = weights.bytes_read, weights.bytes
    if dist.get_rank() == 0:
        logger.info("%s: rank 0 read %.1f of %.1f MB", pretrained.path, read / 1e6, total / 1e6)
    return chunks


def _check_sizes(architecture: Architecture, sizes: ParallelSizes, seq_length: int | None, uneven: bool) -> None:
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "num_layers")
    heads, groups, ffn, layers = (architecture.transformer[name] for name in names)
    tensor, stages = sizes.tensor, sizes.pipeline * (sizes.virtual_pipeline or 1)
    problems = [
        f"{value} {what} do not divide by tensor parallel size {tensor}"
        for value, what in ((heads, "attention heads"), (ffn, "features of the MLP"))
        if value % tensor
    ]
    if groups % tensor and tensor % groups:
        problems.append(f"{groups} query groups neither divide by tensor parallel size {tensor} nor divide it")
    if sizes.sequence_parallel and seq_length is not None and seq_length % tensor:
        problems.append(f"sequences of {seq_length} tokens do not divide by tensor parallel size {tensor}")
    if layers % stages and not uneven:
        virtual = f" x {sizes.virtual_pipeline} virtual stages" if sizes.virtual_pipeline else ""
        problems.append(f"{layers} layers do not divide by {sizes.pipeline} pipeline stages{virtual}")
    if problems:
        raise ValueError(f"the model cannot be divided so: {'; '.join(problems)}")


def _check_length(rope: Rope, length: int) -> None:
    if rope.longest is not None and length > rope.longest:
        raise ValueError(
            f"original_max_position_embeddings = {rope.longest}: sequences of {length} tokens would need the rotary angles of long "
            f"sequences, which are not supported; give a seq_length of at most {rope.longest}"
        )


def _config(
    architecture: Architecture,
    sizes: ParallelSizes,
    dtype: torch.dtype,
    transformer_impl: TransformerImpl,
    overrides: Mapping[str, Any],
) -> TransformerConfig:
    decided = {
        **_PLAIN,
        **architecture.transformer,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline,
        "sequence_parallel": sizes.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }
    chosen = {
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        # Batched p2p over gloo gives wrong gradients with virtual stages.
        "batch_p2p_comm": dist.get_backend() == "nccl",
        "perform_initialization": False,
        "attention_softmax_in_fp32": True,
    }
    if transformer_impl != "local":
        decided |= _windows(architecture)
        gated_silu = architecture.transformer["activation_func"] is torch.nn.functional.silu
        chosen |= {"bias_activation_fusion": gated_silu, "bias_dropout_fusion": True, "apply_rope_fusion": True}
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; it can be {', '.join(map(str, _DTYPES))}")
    known = {field.name for field in fields(TransformerConfig)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name} is no field of Megatron's TransformerConfig")
        if name in decided:
            raise ValueError(f"{name} = {overrides[name]!r} cannot be given: the checkpoint and the sizes decide it")
    config = TransformerConfig(**decided, **{**chosen, **overrides})
    if architecture.rope.magnitude != 1:
        # The field of YaRN's by which Megatron's attention comes to multiply queries and keys with 0.1 ln(field) + 1.
        config.yarn_rotary_scaling_factor = math.exp(10 * (architecture.rope.magnitude - 1))
    return config


def _windows(architecture: Architecture) -> dict[str, Any]:
    """The layers' attention windows as fields of the config, which Transformer Engine's attention reads."""
    sizes = {window for window in architecture.windows if window is not None}
    if not sizes:
        return {}
    return {
        "window_size": (sizes.pop() - 1, 0),
        "window_attn_skip_freq": [int(window is not None) for window in architecture.windows],
    }


def _chunk(
    pretrained: Pretrained, config: TransformerConfig, transformer_impl: TransformerImpl, vp_stage: int | None
) -> torch.nn.Module:
    architecture = pretrained.architecture
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    vocab_size = padded_size(architecture.vocab_size, config.tensor_model_parallel_size)
    layers = [layer_spec(pretrained.family, config, transformer_impl)] * get_num_layers_to_build(config, vp_stage)
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm(transformer_impl)),
        vocab_size=vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    # Megatron knows Llama 3.1's scaling with constants only.
    ropes = [architecture.rope] if architecture.local_rope is None else [architecture.rope, architecture.local_rope]
    frequencies = torch.cat([rope.inverse_frequencies(config.kv_channels) for rope in ropes])
    chunk.rotary_pos_emb.inv_freq = frequencies.to(device=torch.cuda.current_device())
    for layer in chunk.decoder.layers:
        shape_attention(layer, architecture)
    if first:
        _shape_embedding(chunk.embedding, architecture)
    if last:
        set_vocabulary(chunk.output_layer, architecture.vocab_size)
    if last and architecture.logit_cap is not None:
        chunk.output_layer.register_forward_hook(CapLogits(architecture.logit_cap))
    if last and vocab_size > architecture.vocab_size:
        chunk.output_layer.register_forward_hook(MaskPadding(architecture.vocab_size))
    return chunk  # type: ignore[no-any-return]


def _shape_embedding(embedding: Any, architecture: Architecture) -> None:
    set_vocabulary(embedding.word_embeddings, architecture.vocab_size, architecture.pad_token)
    if architecture.embedding_scale != 1:
        embedding.register_forward_hook(Scale(architecture.embedding_scale))
    if architecture.rope.longest is not None:
        embedding.register_forward_pre_hook(_Longest(architecture.rope), with_kwargs=True)


class _Longest:
    """A forward pre-hook on the embedding that refuses sequences for which the rotary angles do not hold."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope

    def __call__(self, module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else inputs[0]
        _check_length(self._rope, tokens.shape[1])
