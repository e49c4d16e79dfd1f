"""Gemma 3 (text): Gemma 2 with norms of each head's query and key, and other angles in the layers with a window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlora.families.dense import dense_modules, read_layer_types
from mlora.families.family import Architecture, Family
from mlora.families.gemma2 import GEMMA_DEFAULTS, SANDWICH_NORM, read_gemma
from mlora.families.keys import ConfigKeys
from mlora.families.rope import Rope, rope_of

# Kind of layer -> transformers 4's key of its theta, and the default.
_THETA = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


def _rope(keys: ConfigKeys, width: int, kind: str) -> Rope:
    """The rotary embedding of one kind of layers."""
    key, theta = _THETA[kind]
    nested, scaling, old = keys.take("rope_parameters"), keys.take("rope_scaling"), keys.take(key)
    if nested is None:
        given = {} if kind == "sliding_attention" or scaling is None else scaling
        if not isinstance(given, Mapping):
            raise keys.error("rope_scaling", "is no object")
        return rope_of(keys, "rope_scaling", given, width, theta=theta if old is None else old)
    if not isinstance(nested, Mapping) or not nested.keys() <= _THETA.keys():
        raise keys.error("rope_parameters", f"does not describe {' and '.join(_THETA)}")
    for name, value in (("rope_scaling", scaling), (key, old)):
        if value is not None:
            raise keys.error(name, "stands beside rope_parameters; versions of transformers disagree on which holds")
    return rope_of(keys, "rope_parameters", nested.get(kind) or {}, width, theta=theta)


def _read(keys: ConfigKeys) -> Architecture:
    keys.require(
        "attn_logit_softcapping", lambda value: value is None, "is not supported: Hugging Face's class ignores it"
    )
    pattern = keys.integer("sliding_window_pattern")
    windowed = read_layer_types(keys, lambda layer: (layer + 1) % pattern > 0)
    architecture = read_gemma(
        keys, windowed, qk_norm=True, rope=lambda keys, width: _rope(keys, width, "full_attention")
    )
    return replace(architecture, local_rope=_rope(keys, architecture.sizes["head"], "sliding_attention"))


_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_local_base_freq": None,
    "sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
}

GEMMA3 = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    defaults=GEMMA_DEFAULTS | _DEFAULTS,
    modules=dense_modules(norms=SANDWICH_NORM, qk_norm=("head", "head")),
    read=_read,
)
