"""PEFT adapters of every make into native checkpoints that train at any layout, and back bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mlora
from mlora import LoraConfig
from mlora.attach import banks
from mlora.checkpoint import load_checkpoint, save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.difference import compare
from mlora.conversion.importing import load_import, plan_import
from mlora.conversion.native_writer import IMPORTED_FILE, write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.mlora.conversion.adapters import PREFIX, config_of, tensors_of, write_adapter, write_peft as write_with_peft
from tests.ranks import run_ranks
from tests.tiny import HIDDEN, LAYERS, VOCAB, tokens, write_model

SIZES = ParallelSizes(tensor=2, pipeline=2)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"

# What libraries on top of PEFT save by default, and what only few use.
CONFIGS: dict[str, dict[str, Any]] = {
    "q+v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "unsloth": {"target_modules": ALL, "r": 16, "lora_alpha": 1, "use_rslora": True},
    "llamafactory": {"target_modules": ["up_proj", "o_proj", "k_proj"], "r": 8, "lora_alpha": 16},
    "swift": {"target_modules": r"^(model(?=\.).*\.(v_proj|down_proj|gate_proj))$", "lora_alpha": 32},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "rank_pattern": {"k_proj": 3, r"layers\.[12]\.self_attn\.v_proj": 5, "^model.layers.3.mlp.down_proj": 1},
        "alpha_pattern": {"q_proj": 1.5, r"layers\.0\..*": 7},
    },
    "patterns-rslora": {"target_modules": ALL, "lora_alpha": 1, "use_rslora": True, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"up_proj": 3}},
    "layers": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "one": {"target_modules": ["model.layers.2.mlp.up_proj"], "init_lora_weights": "gaussian"},
    "uneven": {"target_modules": ["layers.0.self_attn.q_proj", "layers.3.self_attn.k_proj", "down_proj"], "exclude_modules": ["layers.1.mlp.down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A folder with an adapter of each kind, and with its import."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(CONFIGS.items()):
        write_with_peft(folder / "peft" / name, base, seed=number, **config)
        write_import(plan_import(open_adapter(folder / "peft" / name), Pretrained.open(base)), folder / "native" / name)
    return folder


def _export(native: Path, output: Path, profile: str = "peft", **options: Any) -> dict[str, torch.Tensor]:
    write_peft(peft_adapter(open_adapter(native), profile, **options), output)
    return load_file(output / "adapter_model.safetensors")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", CONFIGS)
def test_exporting_gives_back_what_was_imported(adapters: Path, tmp_path: Path, name: str) -> None:
    ours = _export(adapters / "native" / name, tmp_path / "out")
    assert_same(ours, load_file(adapters / "peft" / name / "adapter_model.safetensors"))
    config, original = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path / "out", adapters / "peft" / name)
    )
    assert config == original


@pytest.mark.parametrize("profile", ["portable", "sglang"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_profile_is_the_same_adapter(adapters: Path, tmp_path: Path, base: Path, name: str, profile: str) -> None:
    _export(adapters / "native" / name, tmp_path / "out", profile, base=Pretrained.open(base))
    found = compare(open_adapter(adapters / "peft" / name), open_adapter(tmp_path / "out"))
    assert max(difference.relative for difference in found) < 1e-7


def _train(rank: int, base: Path, native: Path, saved: Path, peft: Path) -> dict[str, tuple[list[Any], torch.Tensor]]:
    """By adapter: what is attached, and the logits. The adapters are saved again from this layout."""
    pretrained = Pretrained.open(base)
    found = {}
    for name in CONFIGS:
        checkpoint = native / name
        config = LoraConfig.from_json(checkpoint / "adapter_config.json")
        assert config.adapter_dtype == torch.float32
        chunks = mlora.apply(
            build_model(pretrained, SIZES, dtype=torch.float64),
            replace(config, adapter_dtype=torch.float64),
            family=pretrained.family,
        )
        load_checkpoint(checkpoint, chunks)
        save_checkpoint(saved / name, chunks, base={"path": str(base)})
        attached = [
            (a.hf_names[part], a.ranks[part], a.scaling[part])
            for bank in banks(chunks)
            if (a := bank.adapter("default")) is not None
            for part in a.parts
        ]
        before = gpt.pieces(chunks)
        with torch.no_grad():
            for bank in banks(chunks):
                for parameter in bank.parameters():
                    parameter.fill_(7)
        load_import(plan_import(open_adapter(peft / name), pretrained), chunks)
        for key, (_, _, piece) in gpt.pieces(chunks).items():
            assert torch.equal(piece, before[key][2]), key
        found[name] = (attached, whole_logits(chunks, tokens(1, 16), VOCAB))
    return found


@pytest.fixture(scope="module")
def trained(
    adapters: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, tuple[list[Any], torch.Tensor]]]]:
    saved = tmp_path_factory.mktemp("saved")
    return saved, run_ranks(4, _train, base, adapters / "native", saved, adapters / "peft", sizes=SIZES)


@pytest.mark.parametrize("name", CONFIGS)
def test_exactly_its_modules_are_attached_at_any_layout(adapters: Path, trained: Any, name: str) -> None:
    attached = sorted({row for rank in trained[1] for row in rank[name][0]})
    modules = open_adapter(adapters / "peft" / name).modules
    assert attached == sorted((module.name, module.rank, module.scaling) for module in modules)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_pefts(adapters: Path, base: Path, trained: Any, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(adapters / "peft" / name)
    ).eval()
    ids = tokens(1, 16)
    with torch.no_grad():
        theirs = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - theirs).abs().max() > 0.1
    for rank in trained[1]:
        # In float64, but for Hugging Face's norms and rotary angles.
        assert (rank[name][1] - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_another_layout_saves_the_same_adapter(adapters: Path, trained: Any, tmp_path: Path, name: str) -> None:
    """The exact profile of a trained checkpoint knows its ranks, alphas and rsLoRA without the imported configuration."""
    assert not (trained[0] / name / "iter_0000000" / IMPORTED_FILE).exists()
    ours = _export(trained[0] / name, tmp_path / "out", dtype=torch.float32)
    assert_same(ours, load_file(adapters / "peft" / name / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    original = json.loads((adapters / "peft" / name / "adapter_config.json").read_text())
    assert config["use_rslora"] == original["use_rslora"] and config["lora_dropout"] == original["lora_dropout"]
    found, wanted = open_adapter(tmp_path / "out"), open_adapter(adapters / "peft" / name)
    assert [(module.name, module.rank, module.scaling) for module in found.modules] == [
        (module.name, module.rank, module.scaling) for module in wanted.modules
    ]


def _train_fused(rank: int, base: Path, native: Path, saved: Path) -> torch.Tensor:
    pretrained = Pretrained.open(base)
    config = LoraConfig.from_json(native / "adapter_config.json")
    chunks = mlora.apply(build_model(pretrained, SIZES), config, family=pretrained.family)
    load_checkpoint(native, chunks)
    save_checkpoint(saved, chunks, base={"path": str(base)})
    return whole_logits(chunks, tokens(1, 16), VOCAB)


def test_fused_modules_are_divided_and_joined(tmp_path: Path) -> None:
    """Phi 3's qkv_proj and gate_up_proj are one module each: one A, and B's rows are those of the parts one after the other."""
    base = write_model(tmp_path / "base", "phi3")
    theirs = write_with_peft(tmp_path / "peft", base, target_modules=["qkv_proj", "gate_up_proj", "o_proj"], rank_pattern={"qkv_proj": 3})
    write_import(plan_import(open_adapter(tmp_path / "peft"), Pretrained.open(base)), tmp_path / "native")
    logits = run_ranks(4, _train_fused, base, tmp_path / "native", tmp_path / "saved", sizes=SIZES)
    with torch.no_grad():
        wanted = theirs(tokens(1, 16)).logits
    for found in logits:
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    for number, checkpoint in enumerate((tmp_path / "native", tmp_path / "saved")):
        ours = _export(checkpoint, tmp_path / str(number))
        assert_same(ours, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
