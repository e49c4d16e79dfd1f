"""Qwen 3 (dense): each head's query and key are normalised."""

from mlora.families.dense import DEFAULTS, dense_modules, read_dense
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys
from mlora.families.qwen2 import WINDOW_DEFAULTS, read_qwen_windows


def _read(keys: ConfigKeys) -> Architecture:
    biased = {"linear_qkv", "linear_proj"} if keys.flag("attention_bias") else set()
    return read_dense(keys, biased=frozenset(biased), windows=read_qwen_windows(keys), qk_norm=True)


QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    defaults=DEFAULTS
    | WINDOW_DEFAULTS
    | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, "max_position_embeddings": 32768},
    modules=dense_modules(qk_norm=("head", "head")),
    read=_read,
)
