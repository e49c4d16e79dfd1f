"""Transformer Engine's own attention against torch's in float64: what a model's errors in 16 bits may come from, apart from ours.

Query, key and value come as Megatron gives them: the value is a view into the fused projection's output.
"""

import pytest
import torch

from tests.gpu.linears import Case, config_of

HEADS, GROUPS = 8, 2


def attend(width: int, length: int, rows: int, dtype: torch.dtype, training: bool) -> float:
    """The relative error of one causal grouped-query attention."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = config_of(
        Case(""), dtype, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=width, hidden_size=256
    )
    attention = TEDotProductAttention(config, 1, AttnMaskType.causal, "self").train(training)
    torch.manual_seed(0)
    fused = torch.randn(length, rows, GROUPS, HEADS // GROUPS + 2, width, device="cuda").to(dtype)
    q = fused[:, :, :, : HEADS // GROUPS].reshape(length, rows, HEADS, width)
    k, v = fused[:, :, :, -2].contiguous(), fused[:, :, :, -1]
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).permute(2, 0, 1, 3)  # fmt: skip
    with torch.set_grad_enabled(training):
        ours = attention(q, k, v, None, AttnMaskType.causal)
    return float((ours.view_as(exact).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("length", "rows"), [(24, 1), (24, 4), (48, 2), (256, 1)])
@pytest.mark.parametrize("width", [4, 16, 32, 64, 128])
def test_attention_of_the_spec_is_exact(width: int, length: int, rows: int, training: bool) -> None:
    assert attend(width, length, rows, torch.bfloat16, training) < 5e-3
