"""What an inspection says: the numbers of plain matrices, and everything that is wrong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlora.conversion import open_adapter
from mlora.conversion.base import BaseModel
from mlora.conversion.inspection import Inspection, inspect
from tests.mlora.conversion.adapters import (
    DOWN,
    PREFIX,
    SMALL,
    Q,
    tensors_of,
    weights,
    write_adapter,
    write_base,
    write_peft,
)


def look(path: Path, base: Path | None = None) -> Inspection:
    problems: list[str] = []
    state = open_adapter(path, problems.append)
    return inspect(state, problems, None if base is None else BaseModel(base))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama")


def test_norms_and_counts(base: Path, tmp_path: Path) -> None:
    model = write_peft(
        tmp_path / "a", base, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_rslora=True
    )
    found, before = look(tmp_path / "a", base), weights(base)
    assert found.problems == []
    assert [module.name for module in found.modules] == [
        "model.embed_tokens", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))
    ]  # fmt: skip
    for module in found.modules:
        layer = model.base_model.model.get_submodule(module.name)
        update = layer.get_delta_weight("default").double()
        assert module.shape == tuple(update.shape) and (module.rank, module.scaling, module.dtype) == (
            4,
            3.0,
            "float32",
        )
        assert module.norm_delta == pytest.approx(float(update.norm()), rel=1e-6)
        assert module.relative == pytest.approx(float(update.norm() / before[f"{module.name}.weight"].norm()), rel=1e-6)
        A = layer.lora_embedding_A["default"] if "embed" in module.name else layer.lora_A["default"].weight
        B = layer.lora_embedding_B["default"] if "embed" in module.name else layer.lora_B["default"].weight
        assert (module.norm_A, module.norm_B) == pytest.approx((float(A.norm()), float(B.norm())), rel=1e-6)
    (whole,) = found.full
    saved = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert (whole.name, whole.shape) == ("lm_head.weight", tuple(saved.shape))
    assert whole.norm == pytest.approx(float(saved.norm()), rel=1e-6)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.layout == "Hugging Face PEFT directory, adapter_model.safetensors"
    assert look(tmp_path / "a").modules[0].relative is None


def test_every_problem_is_listed(tmp_path: Path) -> None:
    tensors = tensors_of(*SMALL)
    tensors[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = float("inf")
    tensors[f"{PREFIX}{DOWN}.lora_B.weight"].zero_()
    path = write_adapter(tmp_path / "a", tensors | {"stray": torch.ones(1)}, velora_config={"a": 1})
    found = look(path)
    assert [module.name for module in found.modules] == [DOWN]
    for problem, text in zip(
        found.problems,
        ("velora_config", "stray", "not finite", f"B A is zero in 1 of 1 modules, first {DOWN}"),
        strict=True,
    ):
        assert text in problem


def test_what_does_not_fit_the_base_is_listed(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "a", base, target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = {key: value for key, value in tensors.items() if "layers.1" not in key}
    save_file(gone, file)
    assert look(tmp_path / "a").problems == []
    (problem,) = look(tmp_path / "a", base).problems
    assert "targets model.layers.1.self_attn.q_proj, but the file has no tensors for it" in problem
    save_file({key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}, file)
    first, second = look(tmp_path / "a", base).problems
    assert "adapts model.layers.7.self_attn.q_proj.weight, which" in first and "targets model.layers.1" in second
    wide = write_base(tmp_path / "wide", hidden_size=64)
    save_file(tensors, file)
    assert all("another base, or another vocabulary" in problem for problem in look(tmp_path / "a", wide).problems)


def test_plain_values(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "a", base, target_modules=["q_proj"])
    values = look(tmp_path / "a", base).to_dict()
    assert set(values) == {"source", "layout", "parameters", "nbytes", "modules", "full", "problems"}
    assert values["modules"][0]["rank"] == 4
