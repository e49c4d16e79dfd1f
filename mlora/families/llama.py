"""Llama 2, 3, 3.1, 3.2, 3.3 and what was made from them."""

from mlora.families.dense import DEFAULTS, dense_modules, read_dense
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys


def _read(keys: ConfigKeys) -> Architecture:
    biased: set[str] = set()
    if keys.flag("attention_bias"):
        biased |= {"linear_qkv", "linear_proj"}
    if keys.flag("mlp_bias"):
        biased |= {"linear_fc1", "linear_fc2"}
    return read_dense(keys, biased=frozenset(biased))


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    defaults=DEFAULTS | {"head_dim": None, "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    modules=dense_modules(),
    read=_read,
)
