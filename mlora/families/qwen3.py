"""Qwen 3 (dense): each head's query and key are normalised."""

from mlora.families.dense import DEFAULTS, dense_modules, read_dense, read_windows
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys


def _read(keys: ConfigKeys) -> Architecture:
    biased = {"linear_qkv", "linear_proj"} if keys.flag("attention_bias") else set()
    return read_dense(keys, biased=frozenset(biased), window=read_windows(keys), qk_norm=True)


QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    modules=dense_modules(qk_norm=True),
    read=_read,
)
