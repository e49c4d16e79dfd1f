"""Gemma 2: norms before and after attention and MLP, capped scores and logits, a window in every other layer."""

from dataclasses import replace
from typing import Any

from mlora.families.dense import DEFAULTS, POST_NORM, dense_modules, read_dense, read_layer_types
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys

SANDWICH_NORM = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "pre_feedforward_layernorm"} | POST_NORM
# Gemma 3 has them too.
GEMMA_DEFAULTS: dict[str, Any] = {key: value for key, value in DEFAULTS.items() if key != "hidden_act"} | {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "use_bidirectional_attention": None,
    "pad_token_id": 0,
}


def read_gemma(keys: ConfigKeys, windowed: list[bool], **arguments: Any) -> Architecture:
    """What Gemma 2 and 3 have in common; ``arguments`` as :func:`read_dense` takes them."""
    keys.require("use_bidirectional_attention", lambda value: not value, "is not supported; attention is causal")
    activation = keys.take("hidden_activation")
    keys.require("hidden_act", lambda value: value == activation, f"differs from hidden_activation = {activation!r}")
    window = keys.integer("sliding_window") if any(windowed) else keys.take("sliding_window")
    architecture = read_dense(
        keys,
        biased=frozenset({"linear_qkv", "linear_proj"} if keys.flag("attention_bias") else ()),
        windows=tuple(window if has else None for has in windowed),
        activation="hidden_activation",
        **arguments,
    )
    transformer = {
        "layernorm_zero_centered_gamma": True,
        "softmax_scale": keys.number("query_pre_attn_scalar") ** -0.5,
    }
    return replace(
        architecture,
        transformer={**architecture.transformer, **transformer},
        embedding_scale=architecture.sizes["hidden"] ** 0.5,
        logit_cap=keys.optional_number("final_logit_softcapping"),
    )


def _read(keys: ConfigKeys) -> Architecture:
    keys.require(
        "sliding_window_size", lambda value: value == keys.take("sliding_window"), "differs from sliding_window"
    )
    architecture = read_gemma(keys, read_layer_types(keys, lambda layer: layer % 2 == 0))
    return replace(architecture, attention_cap=keys.optional_number("attn_logit_softcapping"))


GEMMA2 = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    defaults=GEMMA_DEFAULTS
    | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    modules=dense_modules(norms=SANDWICH_NORM),
    read=_read,
)
