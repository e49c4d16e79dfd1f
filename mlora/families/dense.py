"""What Llama and its relatives share: decoders of grouped-query attention and a gated MLP, with RMSNorm and RoPE.

Where a layer has its norms: Megatron's ``input_layernorm`` and ``pre_mlp_layernorm`` are in front of attention and MLP,
``self_attn_bda`` and ``mlp_bda`` behind them, before their outputs are added to the residual stream.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from mlora.families.family import WHOLE, Architecture, HfModule, ModuleTable
from mlora.families.keys import ConfigKeys
from mlora.families.rope import Rope, read_rope

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
    "partial_rotary_factor": None,
    "pad_token_id": None,
}

PRE_NORM = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
POST_NORM = {"self_attn_bda": "post_attention_layernorm", "mlp_bda": "post_feedforward_layernorm"}

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
_LAYER, _HF_LAYER = "decoder.layers.{layer}", "model.layers.{layer}"


def dense_modules(
    *, norms: Mapping[str, str] = PRE_NORM, qk_norm: tuple[str, str] | None = None, fused: bool = False
) -> ModuleTable:
    """The modules of a dense decoder.

    Args:
        norms: of a layer, Megatron's name -> Hugging Face's.
        qk_norm: sizes of the query's and the key's norm: of each head ("head", "head") or of all of them ("query", "key").
        fused: q, k and v are one module of Hugging Face's, and gate and up too.
    """
    attention, mlp = f"{_HF_LAYER}.self_attn", f"{_HF_LAYER}.mlp"
    names = dict.fromkeys("qkv", "qkv_proj") if fused else {part: f"{part}_proj" for part in "qkv"}
    names |= dict.fromkeys(("gate", "up"), "gate_up_proj") if fused else {"gate": "gate_proj", "up": "up_proj"}
    table: dict[str, Mapping[str, HfModule]] = {
        "embedding.word_embeddings": {WHOLE: HfModule("model.embed_tokens", ("vocab", "hidden"))},
        f"{_LAYER}.self_attention.linear_qkv": {
            "q": HfModule(f"{attention}.{names['q']}", ("query", "hidden")),
            "k": HfModule(f"{attention}.{names['k']}", ("key", "hidden")),
            "v": HfModule(f"{attention}.{names['v']}", ("key", "hidden")),
        },
        f"{_LAYER}.self_attention.linear_proj": {WHOLE: HfModule(f"{attention}.o_proj", ("hidden", "query"))},
        f"{_LAYER}.mlp.linear_fc1": {
            "gate": HfModule(f"{mlp}.{names['gate']}", ("ffn", "hidden")),
            "up": HfModule(f"{mlp}.{names['up']}", ("ffn", "hidden")),
        },
        f"{_LAYER}.mlp.linear_fc2": {WHOLE: HfModule(f"{mlp}.down_proj", ("hidden", "ffn"))},
        "decoder.final_layernorm": {WHOLE: HfModule("model.norm", ("hidden",))},
        "output_layer": {WHOLE: HfModule("lm_head", ("vocab", "hidden"))},
    }
    for module, hf_module in norms.items():
        table[f"{_LAYER}.{module}"] = {WHOLE: HfModule(f"{_HF_LAYER}.{hf_module}", ("hidden",))}
    for part, size in zip("qk", qk_norm or (), strict=bool(qk_norm)):
        name = f"{_LAYER}.self_attention.{part}_layernorm"
        table[name] = {WHOLE: HfModule(f"{attention}.{part}_norm", (size,))}
    return table


def read_dense(
    keys: ConfigKeys,
    *,
    biased: frozenset[str] = frozenset(),
    windows: tuple[int | None, ...] | None = None,
    qk_norm: bool = False,
    activation: str = "hidden_act",
    rope: Callable[[ConfigKeys, int], Rope] = read_rope,
    code: str | None = None,
) -> Architecture:
    """The architecture of a dense decoder.

    Args:
        biased: last parts of the Megatron modules that have a bias in Hugging Face.
        windows: of each layer's attention; None if none has any.
        qk_norm: queries and keys are normalised.
        activation: the key that names the activation of the MLP's gate.
        rope: reads the rotary embedding for heads of a width.
        code: model class that ``auto_map`` may name, because transformers has taken it over.
    """
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    groups = keys.integer("num_key_value_heads", otherwise=heads)
    if heads % groups:
        raise keys.error("num_key_value_heads", f"does not divide num_attention_heads {heads}")
    width = _head_width(keys, hidden, heads)
    layers, ffn, vocab = (keys.integer(key) for key in ("num_hidden_layers", "intermediate_size", "vocab_size"))
    keys.require(activation, _ACTIVATIONS.__contains__, f"is not supported; it can be {', '.join(_ACTIVATIONS)}")
    keys.require(
        "attention_dropout",
        lambda value: not value,
        "is not supported: it drops in training only, and differently at every layout; set it to 0 to train without",
    )
    keys.require("quantization_config", lambda value: not value, "is not supported; convert the checkpoint to bfloat16")
    keys.require(
        "auto_map",
        lambda value: not value or (code is not None and dict(value).get("AutoModelForCausalLM") == code),
        "is not supported: it names code of the checkpoint's own",
    )
    transformer = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": width,
        "gated_linear_unit": True,
        "activation_func": _ACTIVATIONS[keys.take(activation)],
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
        rope=rope(keys, width),
        windows=windows or (None,) * layers,
        pad_token=_pad_token(keys, vocab),
    )


def _pad_token(keys: ConfigKeys, vocab: int) -> int | None:
    """Counted from the end if it is negative, as torch does."""
    token = keys.take("pad_token_id")
    if token is None:
        return None
    if isinstance(token, bool) or not isinstance(token, int) or not -vocab <= token < vocab:
        raise keys.error("pad_token_id", f"is none of the {vocab} rows of the embedding")
    return token % vocab


def read_window(keys: ConfigKeys) -> tuple[int | None, ...]:
    """The attention windows of a model that gives all its layers the same, or none."""
    window = None if keys.take("sliding_window") is None else keys.integer("sliding_window")
    return (window,) * keys.integer("num_hidden_layers")


def read_layer_types(keys: ConfigKeys, windowed: Callable[[int], bool]) -> list[bool]:
    """Of each layer whether its attention has a window: by ``layer_types``, or, without it, ``windowed`` of its number."""
    layers, kinds = keys.integer("num_hidden_layers"), keys.take("layer_types")
    if kinds is None:
        return [windowed(layer) for layer in range(layers)]
    known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if not known or len(kinds) != layers:
        raise keys.error("layer_types", f'does not give "full_attention" or "sliding_attention" to {layers} layers')
    return [kind == "sliding_attention" for kind in kinds]


def _head_width(keys: ConfigKeys, hidden: int, heads: int) -> int:
    if keys.take("head_dim") is None and hidden % heads:
        raise keys.error("num_attention_heads", f"does not divide hidden_size {hidden}, and there is no head_dim")
    width = keys.integer("head_dim", otherwise=hidden // heads)
    if width % 2:
        raise keys.error("head_dim", f"makes heads of {width} features; rotary embeddings turn pairs of them")
    return width
