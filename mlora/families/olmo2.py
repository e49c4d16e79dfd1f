"""OLMo 2: norms after attention and MLP and none before; query and key are normalised over all their heads together."""

from mlora.families.dense import DEFAULTS, POST_NORM, dense_modules, read_dense
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys


def _read(keys: ConfigKeys) -> Architecture:
    biased = {"linear_qkv", "linear_proj"} if keys.flag("attention_bias") else set()
    return read_dense(keys, biased=frozenset(biased), qk_norm=True)


OLMO2 = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    defaults=DEFAULTS
    | {
        "head_dim": None,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "pad_token_id": 1,
    },
    modules=dense_modules(norms=POST_NORM, qk_norm=("query", "key")),
    read=_read,
)
