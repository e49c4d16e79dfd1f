"""What Llama and its relatives share: pre-norm decoders of grouped-query attention and a gated MLP, with RMSNorm and RoPE."""

from typing import Any

import torch

from mlora.families.family import WHOLE, Architecture, HfModule, ModuleTable
from mlora.families.keys import ConfigKeys
from mlora.families.rope import read_rope

# Keys that the families have in common -> what Hugging Face's classes take when the file has them not. Shapes have no default:
# every checkpoint states them.
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
}

_LAYER, _HF_LAYER = "decoder.layers.{layer}", "model.layers.{layer}"


def dense_modules(*, qk_norm: bool = False) -> ModuleTable:
    """The modules of a dense decoder; with ``qk_norm`` each head's query and key are normalised."""
    attention, mlp = f"{_HF_LAYER}.self_attn", f"{_HF_LAYER}.mlp"
    norms = {"q_layernorm": "q_norm", "k_layernorm": "k_norm"} if qk_norm else {}
    return {
        "embedding.word_embeddings": {WHOLE: HfModule("model.embed_tokens", ("vocab", "hidden"))},
        f"{_LAYER}.input_layernorm": {WHOLE: HfModule(f"{_HF_LAYER}.input_layernorm", ("hidden",))},
        f"{_LAYER}.self_attention.linear_qkv": {
            "q": HfModule(f"{attention}.q_proj", ("query", "hidden")),
            "k": HfModule(f"{attention}.k_proj", ("key", "hidden")),
            "v": HfModule(f"{attention}.v_proj", ("key", "hidden")),
        },
        **{f"{_LAYER}.self_attention.{m}": {WHOLE: HfModule(f"{attention}.{h}", ("head",))} for m, h in norms.items()},
        f"{_LAYER}.self_attention.linear_proj": {WHOLE: HfModule(f"{attention}.o_proj", ("hidden", "query"))},
        f"{_LAYER}.pre_mlp_layernorm": {WHOLE: HfModule(f"{_HF_LAYER}.post_attention_layernorm", ("hidden",))},
        f"{_LAYER}.mlp.linear_fc1": {
            "gate": HfModule(f"{mlp}.gate_proj", ("ffn", "hidden")),
            "up": HfModule(f"{mlp}.up_proj", ("ffn", "hidden")),
        },
        f"{_LAYER}.mlp.linear_fc2": {WHOLE: HfModule(f"{mlp}.down_proj", ("hidden", "ffn"))},
        "decoder.final_layernorm": {WHOLE: HfModule("model.norm", ("hidden",))},
        "output_layer": {WHOLE: HfModule("lm_head", ("vocab", "hidden"))},
    }


def read_dense(
    keys: ConfigKeys, *, biased: frozenset[str], window: int | None = None, qk_norm: bool = False
) -> Architecture:
    """The architecture of a dense decoder.

    Args:
        biased: last parts of the Megatron modules that have a bias in Hugging Face.
        window: shortest attention window of any layer.
        qk_norm: each head's query and key are normalised.
    """
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    groups = keys.integer("num_key_value_heads", otherwise=heads)
    if heads % groups:
        raise keys.error("num_key_value_heads", f"does not divide num_attention_heads {heads}")
    width = _head_width(keys, hidden, heads)
    layers, ffn, vocab = (keys.integer(key) for key in ("num_hidden_layers", "intermediate_size", "vocab_size"))
    keys.require("hidden_act", lambda value: value in ("silu", "swish"), 'is not supported; the MLP is gated by "silu"')
    keys.require(
        "attention_dropout",
        lambda value: not value,
        "is not supported: it drops in training only, and differently at every layout; set it to 0 to train without",
    )
    keys.require("quantization_config", lambda value: not value, "is not supported; convert the checkpoint to bfloat16")
    keys.require("auto_map", lambda value: not value, "is not supported: it names code of the checkpoint's own")
    transformer = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": width,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": keys.number("rms_norm_eps"),
        "qk_layernorm": qk_norm,
        "add_qkv_bias": "linear_qkv" in biased,
        # Megatron knows one switch for all linears; a bias that the checkpoint has not is zero.
        "add_bias_linear": bool(biased - {"linear_qkv"}),
    }
    return Architecture(
        transformer=transformer,
        sizes={
            "vocab": vocab,
            "hidden": hidden,
            "query": heads * width,
            "key": groups * width,
            "head": width,
            "ffn": ffn,
        },
        counts={"layer": layers},
        biased=biased,
        vocab_size=vocab,
        tied=keys.flag("tie_word_embeddings"),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        window=window,
        rope=read_rope(keys),
    )


def read_windows(keys: ConfigKeys) -> int | None:
    """The attention window of Qwen's layers, if any of them has one."""
    layers, used = keys.integer("num_hidden_layers"), keys.flag("use_sliding_window")
    size, first, kinds = (keys.take(key) for key in ("sliding_window", "max_window_layers", "layer_types"))
    window = keys.integer("sliding_window") if used and size is not None else None
    if kinds is None:
        if window is not None and not isinstance(first, int):
            raise keys.error("max_window_layers", "is not the number of the first layer with a window")
        windowed = window is not None and first < layers
    else:
        known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
        if not known or len(kinds) != layers:
            raise keys.error("layer_types", f'does not give "full_attention" or "sliding_attention" to {layers} layers')
        windowed = "sliding_attention" in kinds
        if windowed and window is None:
            raise keys.error(
                "layer_types", "has windowed layers, and use_sliding_window and sliding_window give no window"
            )
    return window if windowed else None


def _head_width(keys: ConfigKeys, hidden: int, heads: int) -> int:
    if keys.take("head_dim") is None and hidden % heads:
        raise keys.error("num_attention_heads", f"does not divide hidden_size {hidden}, and there is no head_dim")
    width = keys.integer("head_dim", otherwise=hidden // heads)
    if width % 2:
        raise keys.error("head_dim", f"makes heads of {width} features; rotary embeddings turn pairs of them")
    return width
