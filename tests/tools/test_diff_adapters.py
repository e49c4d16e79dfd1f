"""The comparison tool: exit codes and the names of what differs."""

from pathlib import Path

import pytest

from mlora_tools.diff_adapters import main
from tests.mlora.conversion.adapters import DOWN, PREFIX, SMALL, Q, tensors_of, write_adapter


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "first")


def test_the_same(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(first), str(first)]) == 0
    assert capsys.readouterr().out == (
        "2 modules and whole parameters: 2 the same, 0 within 1e-06, 0 different; greatest relative difference 0\n"
    )


def test_a_difference_is_named_and_the_tolerance_decides(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensors_of(*SMALL)
    tensors[f"{PREFIX}{Q}.lora_B.weight"] *= 1.01
    second = write_adapter(tmp_path / "second", tensors)
    assert main([str(first), str(second)]) == 1
    line, total = capsys.readouterr().out.splitlines()
    assert line == f"{Q}: relative difference 0.0099" and "1 the same, 0 within 1e-06, 1 different" in total
    assert main([str(first), str(second), "--tolerance", "0.02"]) == 0
    assert "1 the same, 1 within 0.02, 0 different" in capsys.readouterr().out


def test_a_missing_module_is_named(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = write_adapter(tmp_path / "second", tensors_of(SMALL[0]))
    assert main([str(first), str(second)]) == 1
    assert f"{DOWN}: relative difference 1 (only in the first)" in capsys.readouterr().out


def test_an_unreadable_one_is_exit_code_2(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(first), str(tmp_path / "second")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'second'} does not exist\n"
