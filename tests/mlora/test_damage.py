"""Checkpoints that were damaged: what is said of each kind of damage, and that they make way for new ones."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlora.checkpoint import save_checkpoint
from mlora.damage import check_files, newest_first, set_aside
from mlora.description import INFO_FILE, checkpoints
from parallel.errors import DamagedError
from tests.mlora.test_failures import PP2, _model
from tests.ranks import run_ranks


def _save(rank: int, folder: Path, iteration: int) -> None:
    save_checkpoint(folder, _model(), iteration=iteration)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of two pipeline stages."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, _save, folder, 4, sizes=PP2)
    return folder


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no information": (lambda path: (path / INFO_FILE).unlink(), "mlora.json is missing"),
    "cut information": (lambda path: os.truncate(path / INFO_FILE, 50), "mlora.json cannot be read"),
    "no object": (lambda path: (path / INFO_FILE).write_text("3"), "mlora.json cannot be read"),
    "cut configuration": (lambda path: os.truncate(path / "adapter_config.json", 9), "adapter_config.json cannot be"),
    "no configuration": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "missing shard": (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "cut shard": (lambda path: os.truncate(path / "__1_0.distcp", 900), "__1_0.distcp is truncated: 900 bytes"),
    "empty shard": (lambda path: os.truncate(path / "__0_0.distcp", 0), "__0_0.distcp is truncated: 0 bytes"),
    "no directory": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "cut directory": (lambda path: os.truncate(path / ".metadata", 100), ".metadata cannot be read"),
    "other directory": (lambda path: (path / ".metadata").write_bytes(b"\x80\x04N."), ".metadata cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said_with_the_file(saved: Path, tmp_path: Path, damage: str) -> None:
    checkpoint = Path(shutil.copytree(saved / "iter_0000004", tmp_path / "iter_0000004"))
    check_files(checkpoint)
    DAMAGES[damage][0](checkpoint)
    with pytest.raises(DamagedError) as caught:
        check_files(checkpoint)
    assert str(caught.value).startswith(str(checkpoint)) and DAMAGES[damage][1] in str(caught.value)
    assert newest_first(tmp_path) == [checkpoint]


def test_another_format_is_no_damage(saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved / "iter_0000004", tmp_path / "iter_0000004"))
    info = json.loads((checkpoint / INFO_FILE).read_text())
    (checkpoint / INFO_FILE).write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(ValueError, match="format 2; this version reads format 1") as caught:
        check_files(checkpoint)
    assert type(caught.value) is ValueError


def test_a_damaged_one_makes_way_and_is_kept(saved: Path, tmp_path: Path) -> None:
    for name in ("iter_0000004", "iter_0000010", "iter_10000000", "iter_0000011.partial", "other"):
        shutil.copytree(saved / "iter_0000004", tmp_path / name)
    assert [path.name for path in newest_first(tmp_path)] == ["iter_10000000", "iter_0000010", "iter_0000004"]
    assert set_aside(tmp_path / "iter_0000010") == tmp_path / "iter_0000010.damaged"
    run_ranks(2, _save, tmp_path, 10, sizes=PP2)
    assert set_aside(tmp_path / "iter_0000010") == tmp_path / "iter_0000010.damaged2"
    assert [path.name for path in checkpoints(tmp_path)] == ["iter_0000004", "iter_10000000"]
    run_ranks(2, _save, tmp_path, 11, sizes=PP2)  # Which removes what saves have left, not these.
    assert {path.name for path in tmp_path.iterdir()} >= {"iter_0000010.damaged", "iter_0000010.damaged2"}
