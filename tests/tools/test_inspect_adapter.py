"""The inspection tool: its table, its JSON, its exit code."""

import json
from pathlib import Path

import pytest
import torch

from mlora_tools.inspect_adapter import main
from tests.mlora.conversion.adapters import SMALL, tensors_of, write_adapter, write_base, write_peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama")


def test_a_sound_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_peft(
        tmp_path / "a", base, target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["model.norm"]
    )
    assert main([str(tmp_path / "a")]) == 0
    head, count, empty, header, *rows, whole, _, verdict = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path / 'a'}: Hugging Face PEFT directory, adapter_model.safetensors"
    assert count.endswith("MB") and empty == "" and verdict == "no problems found"
    assert header.split() == ["module", "out", "x", "in", "r", "scaling", "dtype", "|A|", "|B|", "|sBA|"]
    assert [row.split()[0] for row in rows] == [
        f"model.layers.{layer}.{name}" for layer in range(2) for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert all("(DoRA)" in row and " 1.5 " in row and "float32" in row for row in rows)
    assert len({len(row) for row in rows}) == 1  # columns are aligned
    assert whole.startswith("model.norm.weight: whole, [32] float32, norm")
    assert main([str(tmp_path / "a"), "--base", str(base)]) == 0
    assert "|sBA|/|W|" in capsys.readouterr().out


def test_problems_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "a", tensors_of(*SMALL) | {"stray": torch.ones(1)}, kasa_config={"a": 1})
    assert main([str(tmp_path / "a")]) == 1
    said = capsys.readouterr().out
    assert "problem: " in said and "kasa_config" in said and "stray" in said and "2 problems found" in said


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "a")
    assert main([str(tmp_path / "a"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [module["rank"] for module in values["modules"]] == [2, 2] and values["problems"] == []


def test_nothing_to_look_at_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'a'} does not exist\n"
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"12345678")
    assert main([str(tmp_path / "a")]) == 2
    assert "truncated" in capsys.readouterr().err
