"""Exported adapters in Hugging Face PEFT itself, and the rules that other readers of PEFT's format have."""

import dataclasses
import json
import os
import re
import resource
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mlora
from mlora import LoraConfig
from mlora.attach import factors
from mlora.checkpoint import load_checkpoint, save_checkpoint
from mlora.conversion import peft_writer
from mlora.conversion.peft import WEIGHTS_FILE
from mlora.conversion.peft_config import CONFIG_FILE
from mlora.description import INFO_FILE
from mlora.export import export_peft
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.tensor_file import write_tensors
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tokens, write_model

ONE = ParallelSizes()
ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter on a model, and what its exported configuration must say.

    Attributes:
        says: fields of adapter_config.json.
        dtypes: of the tensors in the file.
    """

    kind: str
    config: LoraConfig
    says: Mapping[str, Any]
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32})


CASES = {
    "llama": Case(
        "llama", LoraConfig(r=5, lora_alpha=10), {"r": 5, "lora_alpha": 10, "target_modules": ALL}
    ),
    "qwen2": Case("qwen2", LoraConfig(r=4, lora_alpha=6), {"r": 4, "lora_alpha": 6, "target_modules": ALL}),
    "qwen3": Case("qwen3", LoraConfig(r=1, lora_alpha=1.5), {"r": 1, "lora_alpha": 1.5, "target_modules": ALL}),
    "mistral": Case("mistral", LoraConfig(r=8), {"r": 8, "lora_alpha": 8, "target_modules": ALL}),
    "phi3": Case(
        "phi3",
        LoraConfig(r=4, lora_alpha=8, rank_pattern={"qkv_proj": 7}, alpha_pattern={"gate_up_proj": 2}),
        {"r": 7, "lora_alpha": 14, "target_modules": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]},
    ),
    "phi3_qkv": Case("phi3", LoraConfig(r=3, target_modules=["linear_qkv"]), {"r": 3, "target_modules": ["qkv_proj"]}),
    "gemma2": Case("gemma2", LoraConfig(r=4), {"r": 4, "target_modules": ALL}),
    "gemma3": Case("gemma3", LoraConfig(r=4), {"r": 4, "target_modules": ALL}),
    "olmo2": Case("olmo2", LoraConfig(r=4), {"r": 4, "target_modules": ALL}),
    "rslora": Case("llama", LoraConfig(r=4, lora_alpha=6, use_rslora=True), {"r": 4, "lora_alpha": 12}),
    "patterns": Case(
        "llama",
        LoraConfig(
            r=4, lora_alpha=8, rank_pattern={"q_proj": 7, "down_proj": 1}, alpha_pattern={r"layers\.1\..*v_proj": 3}
        ),
        # Most are of scaling 2; q_proj's 8/7, down_proj's 8 and one v_proj's 3/4 go into B.
        {"r": 7, "lora_alpha": 14, "target_modules": ALL},
    ),
    "q_and_v": Case(
        "qwen3", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), {"target_modules": ["q_proj", "v_proj"]}
    ),
    "shared": Case("qwen2", LoraConfig(r=3, shared_A=True), {"r": 3, "target_modules": ALL}),
    "middle_layers": Case(
        "llama",
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 2]),
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]},
    ),
    "other_in_each_layer": Case(
        "llama",
        LoraConfig(r=2, target_modules=["model.layers.0.self_attn.q_proj", "layers.3.mlp.down_proj"]),
        {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"]},
    ),
    "bfloat16": Case(
        "llama",
        LoraConfig(r=4, adapter_dtype=torch.bfloat16, alpha_pattern={"k_proj": 2}),
        {"r": 4, "lora_alpha": 8},
        frozenset({torch.bfloat16}),  # the factor 1/4 changes no bit of a mantissa
    ),
    "bfloat16_rounds": Case(
        "llama",
        LoraConfig(r=4, adapter_dtype=torch.bfloat16, alpha_pattern={"k_proj": 3}),
        {"r": 4, "lora_alpha": 8},
        frozenset({torch.float32}),  # the factor 3/8 would
    ),
}  # fmt: skip
Logits = npt.NDArray[np.float32]


def _adapted(path: Path, config: LoraConfig) -> list[torch.nn.Module]:
    pretrained = Pretrained.open(path)
    chunks = mlora.apply(build_model(pretrained, ONE), config, family=pretrained.family)
    gpt.fill_adapter(chunks)
    for factor in factors(chunks):
        if factor.name.endswith("lora_B"):
            factor.parameter.data *= 0.2
    return chunks


def _save(rank: int, models: dict[str, Path], folder: Path) -> dict[str, Logits]:
    """Save an adapter of every case; our logits with it."""
    found = {}
    for name, case in CASES.items():
        chunks = _adapted(models[case.kind], case.config)
        checkpoint = save_checkpoint(folder / name, chunks, base={"path": str(models[case.kind])})
        if case.config.adapter_dtype:  # PEFT calculates in float32 with the values of a bfloat16 adapter.
            chunks = _adapted(models[case.kind], dataclasses.replace(case.config, adapter_dtype=None))
            load_checkpoint(checkpoint, chunks)
        with torch.no_grad():
            found[name] = chunks[0](tokens(), None, None).numpy()
    return found


@dataclasses.dataclass(frozen=True)
class Exported:
    """Of a case: the base model's directory, the native checkpoint, the PEFT directory, and our logits."""

    base: Path
    native: Path
    peft: Path
    logits: torch.Tensor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every case, exported."""
    folder = tmp_path_factory.mktemp("export")
    models = {kind: write_model(folder / kind, kind) for kind in {case.kind for case in CASES.values()}}
    (logits,) = run_ranks(1, _save, models, folder / "native", sizes=ONE)
    found = {}
    for name, case in CASES.items():
        native, peft = folder / "native" / name / "iter_0000000", folder / "peft" / name
        export_peft(native, peft)
        found[name] = Exported(models[case.kind], native, peft, torch.from_numpy(logits[name])[..., :VOCAB])
    return found


@torch.no_grad()
def _peft_logits(base: Path, peft: Path) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(logits without, with the adapter, what loading it reports) of Hugging Face PEFT."""
    from peft import PeftModel, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    plain = model(tokens()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it misses.
        model = PeftModel.from_pretrained(model, str(peft)).eval()
    adapted = model(tokens()).logits
    report = set_peft_model_state_dict(model, load_file(peft / WEIGHTS_FILE))
    assert torch.equal(model(tokens()).logits, adapted)
    return plain, adapted, report


@pytest.mark.parametrize("name", CASES)
def test_peft_gives_our_logits(exported: dict[str, Exported], name: str) -> None:
    case = exported[name]
    plain, adapted, report = _peft_logits(case.base, case.peft)
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora_" in key]
    assert (case.logits - adapted).abs().max() < 1e-5 * adapted.abs().max()
    # The adapter changes the logits by far more than that.
    assert (plain - adapted).abs().max() > 1e-2 * adapted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_files_keep_the_rules_of_every_reader(exported: dict[str, Exported], name: str) -> None:
    case, folder = CASES[name], exported[name].peft
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert {key: config[key] for key in case.says} == dict(case.says)
    assert config["target_modules"] == sorted(config["target_modules"])
    constant = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False, "bias": "none",
        "init_lora_weights": True, "inference_mode": True, "fan_in_fan_out": False, "modules_to_save": None,
        "lora_dropout": 0.0, "base_model_name_or_path": str(exported[name].base),
    }  # fmt: skip
    assert config == {**constant, **{key: config[key] for key in ("r", "lora_alpha", *case.says)}} | {
        "target_modules": config["target_modules"]
    }
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    assert {tensor.dtype for tensor in tensors.values()} == case.dtypes
    pattern = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.[a-z_]+_proj\.lora_(A|B)\.weight")
    for key, tensor in tensors.items():
        assert pattern.fullmatch(key), key
        assert tensor.shape[0 if "lora_A" in key else 1] == config["r"]
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    assert tensors.keys() == {f"{module}.lora_{factor}.weight" for module in modules for factor in "AB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_written_file_is_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        f"layer.{name}": torch.randn(shape).to(dtype) for name, shape in [("b", (3, 5)), ("a", (1, 7)), ("Ä", (2,))]
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    names = sorted(tensors)
    write_tensors(
        tmp_path / "ours", [(name, tensors[name].shape, dtype) for name in names], (tensors[name] for name in names)
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="declared"):
        write_tensors(tmp_path / "wrong", [("a", (1, 7), dtype)], [tensors["layer.b"]])
    entry, a = ("a", (1, 7), dtype), tensors["layer.a"]
    with pytest.raises(ValueError, match="no tensor for a"):
        write_tensors(tmp_path / "missing", [entry], [])
    with pytest.raises(ValueError, match="more tensors than names"):
        write_tensors(tmp_path / "more", [entry], [a, a])


def test_another_dtype_and_a_folder_that_exists(exported: dict[str, Exported], tmp_path: Path) -> None:
    output, native = tmp_path / "out", exported["llama"].native
    export_peft(native, output, dtype=torch.bfloat16)
    tensors, exact = load_file(output / WEIGHTS_FILE), load_file(exported["llama"].peft / WEIGHTS_FILE)
    assert all(torch.equal(tensor, exact[key].bfloat16()) for key, tensor in tensors.items())
    (output / "extra").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        export_peft(native, output)
    assert (output / "extra").exists()
    export_peft(native, output, replace=True)
    assert (output / WEIGHTS_FILE).read_bytes() == (exported["llama"].peft / WEIGHTS_FILE).read_bytes()
    assert not (output / "extra").exists()
    (output / CONFIG_FILE).unlink()
    with pytest.raises(FileExistsError, match="something else"):
        export_peft(native, output, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_an_export_that_fails_leaves_what_was_there(
    exported: dict[str, Exported], tmp_path: Path, existing: bool
) -> None:
    output = tmp_path / "out"
    if existing:
        export_peft(exported["qwen2"].native, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()} if existing else None

    def check() -> None:
        assert ({path.name: path.read_bytes() for path in output.iterdir()} if output.exists() else None) == before
        assert {path.name for path in tmp_path.iterdir()} <= {"out"}

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # bytes; the file is longer
    try:
        with pytest.raises(OSError, match=r"File too large: '.*out\.\d+\.partial"):
            export_peft(exported["llama"].native, output, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    check()
    for owner, name in [(peft_writer, "write_tensors"), (peft_writer, "_check_written"), (os, "fsync"), (os, "rename")]:
        with patch.object(owner, name, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            export_peft(exported["llama"].native, output, replace=True)
        check()
    export_peft(exported["llama"].native, output, replace=True)
    assert (output / WEIGHTS_FILE).read_bytes() == (exported["llama"].peft / WEIGHTS_FILE).read_bytes()


def test_damaged_information_is_refused(exported: dict[str, Exported], tmp_path: Path) -> None:
    source = exported["llama"].native
    info = json.loads((source / INFO_FILE).read_text())
    for number, (change, words) in enumerate(
        [
            ({"projections": []}, "which nothing in its mlora.json accounts for"),
            ({"projections": [{"module": "m"}]}, "projections are incomplete"),
            ({"projections": None}, "projections are incomplete"),
            ({"projections": info["projections"][:-1]}, "which nothing in its mlora.json accounts for"),
            ({"format": 9}, "format 9"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / INFO_FILE).unlink()
        (folder / INFO_FILE).write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=words):
            export_peft(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
