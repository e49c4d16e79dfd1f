"""Mistral 7B, Nemo and Small: every layer may see a window only."""

from mlora.families.dense import DEFAULTS, dense_modules, read_dense, read_window
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys


def _read(keys: ConfigKeys) -> Architecture:
    return read_dense(keys, windows=read_window(keys))


MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    defaults=DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
    modules=dense_modules(),
    read=_read,
)
