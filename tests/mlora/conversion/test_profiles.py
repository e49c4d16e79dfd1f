"""Profiles: what each writes, that all are the same adapter, and that PEFT loads every key of them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlora.conversion import AdapterState, open_adapter
from mlora.conversion.difference import compare
from mlora.conversion.peft_writer import PeftAdapter, write_peft
from mlora.conversion.portable import Uniform
from mlora.conversion.profiles import PROFILES, peft_adapter
from mlora.pretrained import Pretrained
from tests.mlora.conversion.adapters import PREFIX, tensors_of, write_adapter
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.tiny import hf_logits, tokens, write_model

ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
SHAPES = {
    "q": (32, 32),
    "k": (16, 32),
    "v": (16, 32),
    "o": (32, 32),
    "gate": (48, 32),
    "up": (48, 32),
    "down": (32, 48),
}


def name_of(leaf: str, layer: int) -> str:
    return (ATTENTION if leaf in "qkvo" else MLP).format(layer) + f"{leaf}_proj"


def state_of(
    folder: Path, ranks: dict[tuple[str, int], int], dtype: torch.dtype = torch.float32, **config: Any
) -> AdapterState:
    """An adapter with the given (kind, layer) -> rank."""
    modules = [(name_of(*place), rank, *SHAPES[place[0]]) for place, rank in ranks.items()]
    tensors = {key: tensor.to(dtype) for key, tensor in tensors_of(*modules).items()}
    fields = {
        "target_modules": [name for name, *_ in modules],
        "rank_pattern": {re.escape(name): rank for name, rank, *_ in modules},
        **config,
    }
    return open_adapter(write_adapter(folder, tensors, **fields))


def greatest(first: AdapterState, second: AdapterState) -> float:
    return max(difference.relative for difference in compare(first, second))


def written(adapter: PeftAdapter, folder: Path) -> dict[str, Any]:
    write_peft(adapter, folder)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


UNEVEN = {("q", 0): 3, ("q", 1): 8, ("k", 0): 1, ("k", 1): 5, ("up", 0): 3, ("up", 1): 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_portable_has_one_rank_and_one_alpha(tmp_path: Path, dtype: torch.dtype, use_rslora: bool) -> None:
    state = state_of(tmp_path / "a", UNEVEN, dtype, use_rslora=use_rslora, alpha_pattern={"up_proj": 7})
    config = written(peft_adapter(state, "portable"), tmp_path / "out")
    assert (
        config["r"] == 8
        and config["use_rslora"] is False
        and config["target_modules"] == ["k_proj", "q_proj", "up_proj"]
    )
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    found = open_adapter(tmp_path / "out")
    assert {(module.rank, module.scaling) for module in found.modules} == {(8, config["lora_alpha"] / 8)}
    # Folding needs float32 at least.
    assert {tensor.dtype for tensor in found.tensors} == {torch.promote_types(dtype, torch.float32)}
    assert greatest(state, found) < (1e-15 if dtype == torch.float64 else 1e-7)


def test_what_folds_without_loss_keeps_its_dtype(tmp_path: Path) -> None:
    ranks = {("q", 0): 4, ("q", 1): 8, ("v", 0): 2, ("v", 1): 2}
    for number, (dtype, wanted) in enumerate(
        [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)]
    ):
        state = state_of(tmp_path / f"a{number}", ranks, dtype)
        write_peft(peft_adapter(state), tmp_path / str(number))
        found = open_adapter(tmp_path / str(number))
        assert {tensor.dtype for tensor in found.tensors} == {wanted}
        assert greatest(state, found) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("rank", "alpha"), [(r, a) for r in (1, 3, 7, 12, 64, 129) for a in (1, 2, 10, 16, 0.1, 1e-3, 32)]
)
def test_alpha_gives_the_scaling_back(tmp_path: Path, rank: int, alpha: float) -> None:
    for number, use_rslora in enumerate((False, True)):
        state = state_of(tmp_path / str(number), {("q", 0): rank}, lora_alpha=alpha, use_rslora=use_rslora)
        uniform = Uniform.of(state.modules, None)
        found = uniform.alpha
        assert uniform.rank == rank
        assert found / rank == pytest.approx(alpha / (math.sqrt(rank) if use_rslora else rank), rel=3e-16)
        if not use_rslora and isinstance(alpha, int):
            assert found == alpha and isinstance(found, int)


def test_layers_are_named_where_not_all_have_adapters(tmp_path: Path) -> None:
    base = Pretrained.open(write_model(tmp_path / "base", num_hidden_layers=3))
    state = state_of(tmp_path / "a", {("o", layer): 2 for layer in range(3)})
    assert peft_adapter(state, base=base).config["target_modules"] == ["o_proj"]
    assert "layers_to_transform" not in peft_adapter(state, base=base).config
    assert peft_adapter(state).config["layers_to_transform"] == [0, 1, 2]  # There may be more: nothing says so.


def test_another_dtype_and_values_that_it_cannot_hold(tmp_path: Path) -> None:
    state = state_of(tmp_path / "a", {("q", 0): 2})
    write_peft(peft_adapter(state, "peft", dtype=torch.bfloat16), tmp_path / "out")
    exact, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "out"))
    assert all(torch.equal(ours[key], tensor.bfloat16()) for key, tensor in exact.items())
    tensors = tensors_of((name_of("q", 0), 2, 32, 32))
    tensors[f"{PREFIX}{name_of('q', 0)}.lora_B.weight"][0, 0] = 1e6
    write_adapter(tmp_path / "large", tensors, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight is not finite in float16"):
        write_peft(peft_adapter(open_adapter(tmp_path / "large"), dtype=torch.float16), tmp_path / "none")
    assert not (tmp_path / "none").exists()


FULL: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", attention_bias=True)


@pytest.mark.parametrize("name", FULL)
def test_only_peft_gets_what_only_peft_reads(tmp_path: Path, base: Path, name: str) -> None:
    write_with_peft(tmp_path / "a", base, **FULL[name])
    state = open_adapter(tmp_path / "a")
    config = written(peft_adapter(state, "peft"), tmp_path / "out")
    exact, ours = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("a", "out"))
    assert exact.keys() == ours.keys() and all(torch.equal(ours[key], tensor) for key, tensor in exact.items())
    assert config == json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for profile in ("portable", "sglang"):
        with pytest.raises(ValueError, match=rf"base_model\.model\..* the {profile} profile cannot express it"):
            peft_adapter(state, profile)


def test_a_profile_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no profile 'portabel'; there is {', '.join(PROFILES)}"):
        peft_adapter(state_of(tmp_path / "a", {("q", 0): 2}), "portabel")


def _load_with_peft(base: Path, adapter: Path) -> Any:
    """Loaded so that PEFT tells of every key that it misses or does not know."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter))
    result = set_peft_model_state_dict(adapted, load_file(adapter / "adapter_model.safetensors"))
    assert result.unexpected_keys == [] and [key for key in result.missing_keys if "lora_" in key] == []
    return adapted.eval()


@pytest.mark.parametrize("profile", ["portable", "peft", "sglang"])
def test_peft_knows_every_key_and_gives_the_same_answers(tmp_path: Path, base: Path, profile: str) -> None:
    write_with_peft(
        tmp_path / "a", base, target_modules=["q_proj", "up_proj", "down_proj"], layers_to_transform=[1, 2],
        rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3}, use_rslora=True,
    )  # fmt: skip
    write_peft(peft_adapter(open_adapter(tmp_path / "a"), profile, base=Pretrained.open(base)), tmp_path / "out")
    ids = tokens(1, 16)
    with torch.no_grad():
        wanted, found = (_load_with_peft(base, tmp_path / name)(ids).logits for name in ("a", "out"))
    assert (wanted - hf_logits(base, ids)).abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_file_is_in_safetensors_own_order(tmp_path: Path) -> None:
    """Wide types first: a tensor that is not aligned cannot be mapped."""
    tensors = tensors_of((name_of("q", 0), 1, 3, 5), (name_of("k", 0), 1, 3, 5))
    mixed = {key: tensor.to(torch.bfloat16 if "q_proj" in key else torch.float32) for key, tensor in tensors.items()}
    write_adapter(tmp_path / "a", mixed, r=1, target_modules=["q_proj", "k_proj"])
    write_peft(peft_adapter(open_adapter(tmp_path / "a"), "peft"), tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "a" / "adapter_model.safetensors"
    ).read_bytes()
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# What SGLang stacks: (what is adapted, what is added).
STACKED: list[tuple[dict[tuple[str, int], int], set[tuple[str, int]]]] = [
    ({("q", 0): 2}, {("v", 0)}),
    ({("v", 0): 2}, {("q", 0)}),
    ({("k", 0): 2}, {("q", 0), ("v", 0)}),
    ({("q", 0): 2, ("v", 0): 3}, set()),
    ({("o", 0): 2, ("down", 1): 2}, {("o", 1), ("down", 0)}),
    ({("up", 1): 2}, {("gate", 1)}),
    ({("gate", 1): 2}, {("up", 1)}),
    ({("q", 0): 2, ("k", 1): 4}, {("v", 0), ("k", 0), ("q", 1), ("v", 1)}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(STACKED)))
def test_sglang_gets_all_that_it_stacks(tmp_path: Path, base: Path, number: int) -> None:
    present, added = STACKED[number]
    state = state_of(tmp_path / "a", present)
    config = written(peft_adapter(state, "sglang", base=Pretrained.open(base)), tmp_path / "out")
    found = open_adapter(tmp_path / "out")
    assert set(found.by_name) == {name_of(*place) for place in present.keys() | added}
    assert {module.rank for module in found.modules} == {max(present.values())}
    assert not any("." in target for target in config["target_modules"])
    for place in added:
        module = found.by_name[name_of(*place)]
        assert module.weight_shape == SHAPES[place[0]] and not module.load().B.any()
    assert greatest(state, found) < 1e-7


def test_sglang_needs_to_know_the_shapes(tmp_path: Path, base: Path) -> None:
    state = state_of(tmp_path / "a", {("q", 0): 2})
    with pytest.raises(
        ValueError, match=r"has no model\.layers\.0\.self_attn\.v_proj, which SGLang needs.* give the base model"
    ):
        peft_adapter(state, "sglang")
    # k's is v's, and another layer's is this one's.
    for number, present in enumerate([{("q", 0): 2, ("k", 0): 2}, {("q", 0): 2, ("q", 1): 2, ("v", 1): 2}]):
        adapter = peft_adapter(state_of(tmp_path / str(number), present), "sglang")
        shapes = {tensor.name: tensor.shape for tensor in adapter.tensors}
        assert shapes[f"{PREFIX}{name_of('v', 0)}.lora_B.weight"] == (16, 2)
