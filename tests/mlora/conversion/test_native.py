"""Native checkpoints read without ranks or a model, and what they hold told in any other format's words."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.attach import factors
from mlora.checkpoint import save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.difference import compare
from mlora.conversion.merge import merge
from mlora.description import INFO_FILE, PREFIX
from mlora.export import export_peft
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks
from tests.tiny import VOCAB, hf_logits, tokens, write_model

SIZES = ParallelSizes(tensor=2, pipeline=2)
SCALE = {"A": 1.0, "B": 0.2}  # of what is filled in, so that the model's answers stay tame
CONFIGS = {
    "all": LoraConfig(r=5, lora_alpha=10, rank_pattern={"q_proj": 3}, alpha_pattern={r"layers\.1\.mlp\..*": 3}),
    "shared": LoraConfig(r=3, lora_alpha=4, use_rslora=True, shared_A=True, adapter_dtype=torch.bfloat16),
    "some": LoraConfig(r=2, target_modules=["v_proj", "down_proj"], layers_to_transform=[1, 3]),
}


FUSED = {"fused": LoraConfig(r=5, lora_alpha=10, rank_pattern={"qkv_proj": 3})}


def _save(rank: int, base: Path, folder: Path, configs: dict[str, LoraConfig]) -> torch.Tensor | None:
    pretrained = Pretrained.open(base)
    for name, config in configs.items():
        chunks = mlora.apply(build_model(pretrained, SIZES), config, family=pretrained.family)
        gpt.fill_adapter(chunks)
        for factor in factors(chunks):
            factor.parameter.data *= SCALE[factor.name[-1]]
        for iteration in (2, 30):
            save_checkpoint(folder / name, chunks, iteration=iteration, base={"path": str(base)})
    return None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("native")
    run_ranks(4, _save, base, folder, CONFIGS, sizes=SIZES)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_are_hugging_faces(saved: Path, base: Path, name: str) -> None:
    config, state = CONFIGS[name], open_adapter(saved / name / "iter_0000030")
    assert state.format == "mlora" and state.full == {}
    assert state.layout == "native checkpoint of iteration 30, saved at TP 2 x PP 2 x DP 1"
    layers = config.layers_to_transform or range(4)
    leaves = config.target_modules if name == "some" else [*"qkvo", "gate", "up", "down"]
    assert len(state.modules) == len(layers) * len(leaves)  # type: ignore[arg-type]
    for module in state.modules:
        rank = config.rank_pattern.get(module.name.rpartition(".")[2], config.r)
        alpha = 3 if name == "all" and "layers.1.mlp" in module.name else config.lora_alpha
        assert (module.rank, module.scaling) == (rank, config.scaling(rank, alpha))
        factors = module.load()
        for lazy, value in ((module.A, factors.A), (module.B, factors.B)):
            expected = gpt.values(f"default {lazy.key.removeprefix(PREFIX)}", *lazy.shape).to(value.dtype)
            assert torch.equal(value, expected * SCALE[lazy.key[-1]]), lazy.key
        assert factors.A.dtype == (config.adapter_dtype or torch.float32)


def test_a_folder_of_checkpoints_is_its_newest(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        state = open_adapter(saved / "all")
    assert state.source == saved / "all" / "iter_0000030"
    assert f"{saved / 'all'} holds 2 checkpoints; reading the newest, iter_0000030" in caplog.text


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_adapter_is_the_same_adapter(saved: Path, tmp_path: Path, name: str) -> None:
    """Padded ranks, folded scalings and copied A's change nothing that is added to the base."""
    export_peft(saved / name / "iter_0000030", tmp_path / "peft", dtype=torch.float32)
    found = compare(open_adapter(saved / name), open_adapter(tmp_path / "peft"))
    assert len(found) == len(open_adapter(saved / name).modules)
    assert max(difference.relative for difference in found) < 1e-7


def assert_merged_as_exported(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The merged model's answers are those of the exported adapter in PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export_peft(checkpoint, tmp_path / "peft", dtype=torch.float32)
    merge(base, [(open_adapter(checkpoint), 1.0)], tmp_path / "out", verified=True)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "peft")).eval()
    ids = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
    assert wanted.shape[-1] == VOCAB
    assert (hf_logits(tmp_path / "out", ids) - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_it_gives_the_answers_of_its_export_in_peft(saved: Path, base: Path, tmp_path: Path, name: str) -> None:
    assert_merged_as_exported(base, saved / name / "iter_0000030", tmp_path)


def test_the_parts_of_a_fused_module_are_one(tmp_path: Path) -> None:
    """Phi 3: B's rows are those of q, k and v, or gate and up, one after the other."""
    base, native = write_model(tmp_path / "base", "phi3"), tmp_path / "fused" / "iter_0000030"
    run_ranks(4, _save, base, tmp_path, FUSED, sizes=SIZES)
    for module in (modules := open_adapter(native).by_name).values():
        if module.name.endswith(("qkv_proj", "gate_up_proj")):
            parts = [part.removeprefix(PREFIX) for part in module.B.key.split(" + ")]
            rows = {"q": 32, "k": 16, "v": 16, "gate": 48, "up": 48}
            assert [part.split(".")[-2] for part in parts] == (
                ["q", "k", "v"] if "qkv" in module.name else ["gate", "up"]
            )
            expected = [gpt.values(f"default {part}", rows[part.split(".")[-2]], module.rank) for part in parts]
            assert torch.equal(module.B.load(), torch.cat(expected).float() * SCALE["B"])
    assert len(modules) == 16 and modules["model.layers.3.self_attn.qkv_proj"].rank == 3
    assert_merged_as_exported(base, native, tmp_path)
    _edit(native, lambda info: next(row for row in info["projections"] if row["part"] == "k").update(hf_row=31))
    with pytest.raises(
        ValueError, match=r"3 projections are called model\.layers\.0\..*qkv_proj and do not make up one module"
    ):
        open_adapter(native)


def _copy(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "bad").mkdir()
    for path in (saved / "some" / "iter_0000002").iterdir():
        (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "bad"


def _edit(checkpoint: Path, change: Any) -> None:
    info = json.loads((checkpoint / INFO_FILE).read_text())
    change(info)
    (checkpoint / INFO_FILE).write_text(json.dumps(info))


def test_what_does_not_fit_is_named(saved: Path, tmp_path: Path) -> None:
    bad = _copy(saved, tmp_path)
    _edit(bad, lambda info: info["projections"][0].update(rank=7))
    with pytest.raises(ValueError, match=rf"bad: .*lora_A and .*lora_B are of ranks \(2, 2\); {INFO_FILE} says 7"):
        open_adapter(bad)
    _edit(bad, lambda info: info["projections"][0].update(rank=2, part="nothing"))
    problems: list[str] = []
    state = open_adapter(bad, problems.append)
    assert len(state.modules) == 3
    assert [("bad lacks" in problem, "bad holds" in problem) for problem in problems] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    _edit(bad, lambda info: info["projections"][0].pop("scaling"))
    with pytest.raises(ValueError, match="its projections are incomplete"):
        open_adapter(bad)
    _edit(bad, lambda info: info.pop("projections"))
    with pytest.raises(ValueError, match="its projections are incomplete"):
        open_adapter(bad)


def test_a_piece_that_is_missing_or_cut_is_named(saved: Path, tmp_path: Path) -> None:
    bad = _copy(saved, tmp_path)
    piece = sorted(bad.glob("*.distcp"))[0]
    content = piece.read_bytes()
    piece.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{piece.name} is truncated"):
        open_adapter(bad)
    piece.unlink()
    with pytest.raises(ValueError, match=f"{piece.name} is missing"):
        open_adapter(bad)
