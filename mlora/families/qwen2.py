"""Qwen 2 and 2.5: biases on q, k and v."""

from mlora.families.dense import DEFAULTS, dense_modules, read_dense, read_windows
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys


def _read(keys: ConfigKeys) -> Architecture:
    return read_dense(keys, biased=frozenset({"linear_qkv"}), window=read_windows(keys))


QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    defaults=DEFAULTS
    | {
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    modules=dense_modules(),
    read=_read,
)
