"""PEFT adapters of every make into native checkpoints that train at any layout, and back bit for bit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mlora
from mlora import LoraConfig
from mlora.attach import banks
from mlora.checkpoint import load_checkpoint, save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.difference import compare
from mlora.conversion.importing import plan_import
from mlora.conversion.native_writer import IMPORTED_FILE, write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.imported import load_import
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from tests import gpt, training
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.peft_oracle import exported_logits, train_with_peft
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tokens, write_model

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
    "patterns-rslora": {
        "target_modules": ALL, "lora_alpha": 1, "use_rslora": True, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"up_proj": 3},
    },
    "layers": {"target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "dora": {"target_modules": ALL, "lora_alpha": 1, "use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "one": {"target_modules": ["model.layers.2.mlp.up_proj"], "init_lora_weights": "gaussian"},
    "uneven": {
        "target_modules": ["layers.0.self_attn.q_proj", "layers.3.self_attn.k_proj", "down_proj"],
        "exclude_modules": ["layers.1.mlp.down_proj"],
    },
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
    if name == "dora":
        with pytest.raises(ValueError, match=rf"is DoRA's magnitude; the {profile} profile cannot express it"):
            peft_adapter(open_adapter(adapters / "native" / name), profile, base=Pretrained.open(base))
        return
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


FAMILIES = ["llama3.1", "qwen2-tied", "qwen3", "mistral-window", "phi3", "gemma2", "gemma3", "olmo2"]
FUSED = {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "rank_pattern": {"qkv_proj": 3}}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of each family, and with its adapter."""
    folder = tmp_path_factory.mktemp("families")
    for number, kind in enumerate(FAMILIES):
        base = write_model(folder / "base" / kind, kind)
        config = FUSED if kind.startswith("phi3") else {"target_modules": ALL, "rank_pattern": {"v_proj": 3}}
        write_with_peft(folder / "peft" / kind, base, seed=number, lora_alpha=1, use_rslora=True, **config)
        write_import(plan_import(open_adapter(folder / "peft" / kind), Pretrained.open(base)), folder / "native" / kind)
    return folder


def _both_ways(rank: int, folder: Path, saved: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By family the logits of its imported adapter, and those of another one, which is saved."""
    found = {}
    for kind in FAMILIES:
        base = Pretrained.open(folder / "base" / kind)
        config = LoraConfig.from_json(folder / "native" / kind / "adapter_config.json")
        chunks = mlora.apply(build_model(base, SIZES), config, family=base.family)
        load_checkpoint(folder / "native" / kind, chunks)
        logits = whole_logits(chunks, tokens(1, 32), VOCAB)
        gpt.fill_adapter(chunks)
        save_checkpoint(saved / kind, chunks, base={"path": str(base.path)})
        found[kind] = logits, whole_logits(chunks, tokens(1, 32), VOCAB)
    return found


@pytest.fixture(scope="module")
def both_ways(families: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    saved = tmp_path_factory.mktemp("saved")
    return saved, run_ranks(4, _both_ways, families, saved, sizes=SIZES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_in_both_directions(families: Path, both_ways: Any, tmp_path: Path, kind: str) -> None:
    """PEFT's logits of what is imported, and our logits of what is exported, in PEFT."""
    from peft import PeftModel, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    saved, ranks = both_ways
    exported = _export(saved / kind, tmp_path / "out")
    for adapter, number in ((families / "peft" / kind, 0), (tmp_path / "out", 1)):
        model: Any = AutoModelForCausalLM.from_pretrained(families / "base" / kind, attn_implementation="eager")
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            wanted = model(tokens(1, 32)).logits
        for found in ranks:
            assert (found[kind][number] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    result = set_peft_model_state_dict(model, exported)
    assert result.unexpected_keys == [] and not any("lora_" in key for key in result.missing_keys)


def test_fused_modules_are_divided_and_joined(families: Path, tmp_path: Path) -> None:
    """Phi 3's qkv_proj and gate_up_proj are one module each: one A, and B's rows are those of the parts one after the other."""
    ours = _export(families / "native" / "phi3", tmp_path / "out")
    assert_same(ours, load_file(families / "peft" / "phi3" / "adapter_model.safetensors"))
    found = open_adapter(families / "native" / "phi3").by_name["model.layers.1.self_attn.qkv_proj"]
    assert found.rank == 3 and found.A.key == "adapter.decoder.layers.1.self_attention.linear_qkv.shared.lora_A"


TP2 = ParallelSizes(tensor=2, sequence_parallel=True)


def _go_on(rank: int, base: Path, native: Path, saved: Path, case: training.Case) -> training.Share:
    chunks = training.adapt(base, case, TP2)
    load_checkpoint(native, chunks)
    share = training.train(chunks, case, training.Layout(2, TP2, 4))
    save_checkpoint(saved, chunks, iteration=case.steps, base={"path": str(base)})
    return share


def test_training_goes_on_as_in_peft(adapters: Path, base: Path, tmp_path: Path) -> None:
    """Losses, gradients and weights of two more steps, at another layout, are PEFT's; so are the answers of what is exported."""
    name = "patterns"
    config = LoraConfig.from_json(adapters / "native" / name / "adapter_config.json")
    case = training.Case(lora=config, steps=2)
    shares = run_ranks(2, _go_on, base, adapters / "native" / name, tmp_path / "saved", case, sizes=TP2)
    initial = load_file(adapters / "peft" / name / "adapter_model.safetensors")
    ours, theirs = training.join(shares), train_with_peft(base, case, initial)
    assert training.failures(ours, theirs) == {}
    for profile in ("peft", "portable", "sglang"):
        exported = _export(tmp_path / "saved", tmp_path / profile, profile, base=Pretrained.open(base))
        logits = exported_logits(base, tmp_path / profile)
        assert (logits - ours.logits_after).abs().max() < 1e-4 * logits.abs().max()
        if profile == "peft":
            assert_same(exported, ours.final)
