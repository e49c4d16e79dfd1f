"""Phi 3, 3.5 and 4: q, k and v are one module, and gate and up too; LongRoPE."""

from functools import partial

from mlora.families.dense import DEFAULTS, dense_modules, read_dense, read_window
from mlora.families.family import Architecture, Family
from mlora.families.keys import ConfigKeys
from mlora.families.rope import read_rope


def _read(keys: ConfigKeys) -> Architecture:
    for key in ("resid_pdrop", "embd_pdrop"):
        keys.require(key, lambda value: not value, "is not supported; set it to 0 to train without")
    for key in ("full_attn_mod", "interpolate_factor"):
        keys.require(key, lambda value: value == 1, "is not supported; only 1 changes nothing")
    keys.take(
        "original_max_position_embeddings"
    )  # Stands there for every kind of angles; LongRoPE's alone depend on it.
    return read_dense(
        keys,
        windows=read_window(keys),
        rope=partial(read_rope, kinds=("default", "longrope"), partial=True),
        code="modeling_phi3.Phi3ForCausalLM",
    )


PHI3 = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    defaults=DEFAULTS
    | {
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "pad_token_id": 32000,
    },
    modules=dense_modules(fused=True),
    read=_read,
)
