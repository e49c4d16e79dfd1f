"""Experts' terms, packed and by configuration, in PEFT on mixture-of-experts models of transformers 5."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlora.conversion import AdapterState, open_adapter
from mlora.conversion.consumers import CONSUMERS, check
from mlora.conversion.experts import pack_A, pack_B, stack_B
from mlora.conversion.peft_directory import PeftDirectory
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from tests.mlora.conversion.adapters import tensors_of, write_adapter

HIDDEN, FFN, EXPERT_FFN, SHARED_FFN, EXPERTS, RANK = 32, 40, 24, 20, 3, 2
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": FFN, "moe_intermediate_size": EXPERT_FFN, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
}  # fmt: skip


def _shape(leaf: str, ffn: int) -> tuple[int, int]:
    return (HIDDEN, ffn) if leaf == "down_proj" else (ffn, HIDDEN)


# (what its configuration adds, what is adapted besides attention and experts, name of the experts, in which layers they are)
KINDS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]], str, range]] = {
    "qwen3_moe": ({"head_dim": 8}, {}, "mlp.experts", range(2)),
    "qwen2_moe": (
        {"shared_expert_intermediate_size": SHARED_FFN},
        {
            f"model.layers.{layer}.mlp.shared_expert.{leaf}": _shape(leaf, SHARED_FFN)
            for layer in range(2)
            for leaf in ("gate_proj", "up_proj", "down_proj")
        },
        "mlp.experts",
        range(2),
    ),
    "mixtral": ({"intermediate_size": EXPERT_FFN, "head_dim": 8}, {}, "block_sparse_moe.experts", range(2)),
    "deepseek_v3": (
        {
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
            "v_head_dim": 8, "n_group": 1, "topk_group": 1,
        },
        {
            f"model.layers.{where}.{leaf}": _shape(leaf, ffn)
            for where, ffn in (("0.mlp", FFN), ("1.mlp.shared_experts", EXPERT_FFN))
            for leaf in ("gate_proj", "up_proj", "down_proj")
        },
        "mlp.experts",
        range(1, 2),
    ),
}  # fmt: skip
O_PROJ = {f"model.layers.{layer}.self_attn.o_proj": (HIDDEN, HIDDEN) for layer in range(2)}


def _model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | KINDS[kind][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _adapter(kind: str, folder: Path, **config: Any) -> AdapterState:
    """Attention, all experts, and what else is adapted, as PEFT wrote it before experts were packed."""
    leaves = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    modules = dict(O_PROJ) | KINDS[kind][1]
    for layer in KINDS[kind][3]:
        for expert in range(EXPERTS):
            for leaf, shape in zip(leaves, ((EXPERT_FFN, HIDDEN),) * 2 + ((HIDDEN, EXPERT_FFN),), strict=True):
                modules[f"model.layers.{layer}.{KINDS[kind][2]}.{expert}.{leaf}"] = shape
    tensors = {key: 0.3 * tensor for key, tensor in tensors_of(*((n, RANK, *s) for n, s in modules.items())).items()}
    fields = {
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "r": RANK,
        "lora_alpha": 3,
        **config,
    }
    return open_adapter(write_adapter(folder, tensors, **fields))


@torch.no_grad()
def _merged_logits(kind: str, state: AdapterState, ids: torch.Tensor) -> torch.Tensor:
    """The base with every term added by hand."""
    model = _model(kind)
    parameters = dict(model.named_parameters())
    for module in state.modules:
        factors = module.load()
        delta = module.scaling * factors.B @ factors.A
        if match := re.fullmatch(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)", module.name):
            layer, expert, leaf = match[1], int(match[2]), match[3]
            if leaf in ("down_proj", "w2"):
                parameters[f"{layer}.mlp.experts.down_proj"][expert] += delta
            else:
                half = slice(EXPERT_FFN) if leaf in ("gate_proj", "w1") else slice(EXPERT_FFN, None)
                parameters[f"{layer}.mlp.experts.gate_up_proj"][expert, half] += delta
        else:
            parameters[f"{module.name}.weight"] += delta
    logits: torch.Tensor = model(ids).logits
    return logits


def _peft_logits(kind: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """In PEFT, which must know every key; PEFT says nothing of those that it does not know."""
    from peft import PeftModel, set_peft_model_state_dict

    model: Any = PeftModel.from_pretrained(_model(kind), str(folder)).eval()
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert result.unexpected_keys == [] and not [key for key in result.missing_keys if "lora_" in key]
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("profile", ["peft-v5", "vllm-3d"])
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_answers_are_those_of_the_merged_model(tmp_path: Path, kind: str, profile: str) -> None:
    state = _adapter(kind, tmp_path / "a", use_rslora=True, alpha_pattern={"o_proj": 5})
    write_peft(peft_adapter(state, profile), tmp_path / "out")
    wanted = _merged_logits(kind, state, IDS)
    with torch.no_grad():
        assert (wanted - _model(kind)(IDS).logits).abs().max() > 0.1
    assert (_peft_logits(kind, tmp_path / "out", IDS) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_where_nothing_else_is_named_like_experts_the_portable_profile_does_too(tmp_path: Path, kind: str) -> None:
    state = _adapter(kind, tmp_path / "a", use_rslora=True)
    write_peft(peft_adapter(state, "portable"), tmp_path / "out")
    wanted = _merged_logits(kind, state, IDS)
    assert (_peft_logits(kind, tmp_path / "out", IDS) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_has_no_term_is_packed_as_zero(tmp_path: Path) -> None:
    """PEFT and vLLM want every expert and every projection."""
    full = _adapter("qwen3_moe", tmp_path / "full")
    kept = [m for m in full.modules if not re.search(r"layers\.0.*experts\.1\.|layers\.1.*(up|gate)_proj", m.name)]
    tensors = {tensor.key: tensor.load() for module in kept for tensor in module.tensors}
    names = [module.name for module in kept]
    state = open_adapter(write_adapter(tmp_path / "a", tensors, r=RANK, lora_alpha=3, target_modules=names))
    wanted = _merged_logits("qwen3_moe", state, IDS)
    for profile in ("peft-v5", "vllm-3d"):
        write_peft(peft_adapter(state, profile), tmp_path / profile)
        found = _peft_logits("qwen3_moe", tmp_path / profile, IDS)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("profile", "but"), [("peft-v5", {"tgi", "trtllm"}), ("vllm-3d", {"sglang", "trtllm", "llamacpp", "tgi"})]
)
def test_who_can_use_it(tmp_path: Path, profile: str, but: set[str]) -> None:
    write_peft(peft_adapter(_adapter("qwen3_moe", tmp_path / "a"), profile), tmp_path / "out")
    directory = PeftDirectory.open(tmp_path / "out")
    refusing = {name for name in CONSUMERS if check(directory, name)}
    if profile == "peft-v5":  # Its ranks and targets are for PEFT alone.
        assert "peft" not in refusing
    else:
        assert refusing == but


def test_packing_puts_each_expert_where_peft_looks_for_it() -> None:
    A = [torch.randn(2, 5) for _ in range(3)]
    B = [torch.randn(4, 2) for _ in range(3)]
    packed_A, packed_B = pack_A(A), pack_B(B)
    assert (packed_A.shape, packed_B.shape) == ((6, 5), (4, 6))
    for expert in range(3):
        assert torch.equal(packed_A.reshape(3, 2, 5)[expert], A[expert])
        assert torch.equal(packed_B.reshape(4, 2, 3)[:, :, expert], B[expert])
    both = stack_B(B[0], B[1])
    assert torch.equal(both[:4, :2], B[0]) and torch.equal(both[4:, 2:], B[1]) and both.count_nonzero() == 16


def test_what_is_no_expert(tmp_path: Path) -> None:
    dense = open_adapter(write_adapter(tmp_path / "dense"))
    with pytest.raises(ValueError, match="dense adapts no experts, so there is nothing to pack: the portable profile"):
        peft_adapter(dense, "vllm-3d")
    write_peft(peft_adapter(dense, "portable"), tmp_path / "portable")
    write_peft(peft_adapter(dense, "peft-v5"), tmp_path / "v5")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "v5" / name).read_bytes() == (tmp_path / "portable" / name).read_bytes()
    name = "model.layers.0.mlp.experts.0.dense"
    odd = open_adapter(write_adapter(tmp_path / "odd", tensors_of((name, 2, 4, 4)), target_modules=["dense"]))
    with pytest.raises(ValueError, match=r"experts\.0\.dense\.lora_A\.weight: experts have \('gate_proj'"):
        peft_adapter(odd, "vllm-3d")
