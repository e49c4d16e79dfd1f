"""Qwen 2 and 2.5: biases on q, k and v."""

from mlora.families.dense import DEFAULTS, dense_modules, read_dense, read_layer_types
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys

# Qwen 3 has them too.
WINDOW_DEFAULTS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def read_qwen_windows(keys: ConfigKeys) -> tuple[int | None, ...]:
    """The attention windows: of the last layers, if they are switched on."""
    used, size, first = keys.flag("use_sliding_window"), keys.take("sliding_window"), keys.take("max_window_layers")
    window = keys.integer("sliding_window") if used and size is not None else None
    if window is not None and keys.take("layer_types") is None and not isinstance(first, int):
        raise keys.error("max_window_layers", "is not the number of the first layer with a window")
    windowed = read_layer_types(keys, lambda layer: window is not None and layer >= first)
    if any(windowed) and window is None:
        raise keys.error("layer_types", "has windowed layers, and use_sliding_window and sliding_window give no window")
    return tuple(window if has else None for has in windowed)


def _read(keys: ConfigKeys) -> Architecture:
    return read_dense(keys, biased=frozenset({"linear_qkv"}), windows=read_qwen_windows(keys))


QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    defaults=DEFAULTS
    | WINDOW_DEFAULTS
    | {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    modules=dense_modules(),
    read=_read,
)
