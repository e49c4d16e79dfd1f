"""Transformer Engine's linears with adapters, and the same mathematics in plain torch at any dtype."""

from dataclasses import dataclass
from typing import Any

import torch

import mlora
from mlora import LoraConfig
from mlora.attach import factors
from mlora.dropout import MicroBatch, set_micro_batch
from mlora_tools.bench_linear import plain as in_torch

HIDDEN, FFN, HEADS, GROUPS, WIDTH = 256, 384, 8, 2, 32
TOKENS, ROWS = 96, 2
STEP = MicroBatch(step=3, first_row=4)
QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
COLUMN, REPLICATED = "self_attention.linear_q_up_proj", "self_attention.linear_kv_down_proj"


@dataclass(frozen=True)
class Case:
    """A linear of the layer below and its adapter."""

    name: str
    rank: int = 8
    bias: bool = False
    dropout: float = 0.0
    shared_A: bool = False
    targets: Any = "all-linear"
    zero_centered: bool = False


CASES = [
    Case(QKV, rank=5, dropout=0.2),
    Case(QKV, shared_A=True, zero_centered=True),
    Case(QKV, targets=["q_proj", "v_proj"], bias=True),
    Case(PROJ, rank=16, dropout=0.1, bias=True),
    Case(FC1, rank=70),
    Case(FC1, targets=["up_proj"], dropout=0.3, bias=True),
    Case(FC2, rank=1),
    Case(COLUMN, dropout=0.1),
    Case(REPLICATED, rank=3),
]


def config_of(case: Case, dtype: torch.dtype, **changes: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": FFN,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "kv_channels": WIDTH,
            "normalization": "RMSNorm",
            "layernorm_zero_centered_gamma": case.zero_centered,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": case.bias,
            "add_qkv_bias": case.bias,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            **changes,
        }
    )


def build(case: Case, dtype: torch.dtype, adapted: bool = True, **changes: Any) -> tuple[torch.nn.Module, Any]:
    """(model, the linear) of one layer of Transformer Engine's spec and two linears that only other models have."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TELinear
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.spec_utils import build_module

    config = config_of(case, dtype, **changes)
    torch.manual_seed(1)
    layer = build_module(get_gpt_layer_with_transformer_engine_spec(), config=config, layer_number=1)
    common = {"config": config, "init_method": torch.nn.init.zeros_, "bias": case.bias, "skip_bias_add": False}
    attention = layer.self_attention
    attention.linear_q_up_proj = TEColumnParallelLinear(HIDDEN, FFN, gather_output=False, is_expert=False, **common)
    attention.linear_kv_down_proj = TELinear(
        HIDDEN, FFN, parallel_mode="duplicated", skip_weight_param_allocation=False, **common
    )
    model = torch.nn.Module()
    model.config = config
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList([layer])
    model.cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, device="cuda")
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else parameter + 0.3 * noise)
    linear = layer.get_submodule(case.name)
    if adapted:
        adapt(model, case)
    else:
        model.requires_grad_(False)
    return model, linear


def adapt(model: torch.nn.Module, case: Case) -> None:
    """An adapter whose A and B are both random, on the one linear."""
    lora = LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules=[case.name.rpartition(".")[2]] if case.targets == "all-linear" else case.targets,
        shared_A=case.shared_A,
    )
    mlora.apply([model], lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for factor in factors([model]):
            factor.parameter.copy_(torch.randn(factor.parameter.shape, device="cuda") / factor.shape[-1] ** 0.5)


def random(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def run(linear: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the linear gives and hands back for a random input and output gradient."""
    set_micro_batch(STEP)
    x = random(3, TOKENS, ROWS, linear.in_features, dtype=dtype).requires_grad_()
    y, bias = linear(x)
    y = y if bias is None else y + bias
    y.backward(random(4, *y.shape, dtype=dtype))
    adapter = linear.lora.current() if hasattr(linear, "lora") else None
    gradients = {} if adapter is None else {name: p.grad for name, p in adapter.named_parameters()}
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients}  # type: ignore[dict-item]


def plain(linear: Any, dtype: torch.dtype, given: torch.dtype) -> dict[str, torch.Tensor]:
    """The same in plain torch at ``dtype``, on inputs rounded to ``given``."""
    set_micro_batch(STEP)
    x = random(3, TOKENS, ROWS, linear.in_features, dtype=given)
    return in_torch(linear, x, random(4, TOKENS, ROWS, linear.out_features, dtype=given), dtype)


def relative(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor, the norm of its error over its own."""
    assert ours.keys() == exact.keys()
    return {
        name: float((ours[name].double() - value.double()).norm() / value.double().norm())
        for name, value in exact.items()
    }
