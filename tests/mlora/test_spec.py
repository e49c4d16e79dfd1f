"""Names of the norms that Transformer Engine takes into linears; the specs themselves are tested by the models made of them."""

import pytest

from mlora.spec import fused_norm

LAYER = "decoder.layers.3"


@pytest.mark.parametrize(
    ("linear", "norm"),
    [
        (f"{LAYER}.self_attention.linear_qkv", (LAYER, "input_layernorm")),
        (f"{LAYER}.mlp.linear_fc1", (LAYER, "pre_mlp_layernorm")),
        (f"{LAYER}.self_attention.linear_q_up_proj", (f"{LAYER}.self_attention.linear_q_up_proj", "layer_norm")),
    ],
)
def test_every_fused_norm_has_a_name(linear: str, norm: tuple[str, str]) -> None:
    assert fused_norm(linear) == norm
