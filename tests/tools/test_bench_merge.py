"""The benchmark runs, and what it makes is what it says."""

import re
from pathlib import Path

import pytest

from mlora.conversion import open_adapter
from mlora.conversion.base import BaseModel
from mlora.conversion.coverage import misfits
from mlora_tools import bench_merge
from mlora_tools.bench_merge import Shape, main, make_adapter, make_base, shape_of


@pytest.mark.parametrize("gigabytes", [1, 4, 16])
def test_the_base_has_about_the_size_asked_for(gigabytes: float) -> None:
    elements = sum(rows * columns for _, (rows, columns) in shape_of(gigabytes).parameters())
    assert 2e-9 * elements == pytest.approx(gigabytes, rel=0.1)
    if gigabytes == 16:
        assert shape_of(gigabytes) == Shape(4096, 14336, 1024, 32)  # Llama-3-8B


def test_base_and_adapter_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_merge, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(bench_merge, "VOCABULARY", 100)
    shape = Shape(32, 48, 16, 2)
    size = make_base(tmp_path / "base", shape)
    make_adapter(tmp_path / "adapter", shape, 4)
    base = BaseModel(tmp_path / "base")
    assert len(base.files) == 3
    assert size == sum(entry.nbytes for file in base.files.values() for entry in file.entries.values())
    assert list(misfits(open_adapter(tmp_path / "adapter"), base)) == []


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_merge, "shape_of", lambda gigabytes: Shape(32, 48, 16, 2))
    monkeypatch.setattr(bench_merge, "VOCABULARY", 100)
    monkeypatch.setattr(bench_merge, "START_METHOD", "fork")  # importing everything anew takes many seconds
    assert main(["--rounds", "1", "--rank", "4", "--folder", str(tmp_path)]) == 0
    head, columns, copy, merged = capsys.readouterr().out.splitlines()
    assert head.startswith("base 0.0 GB, 2 layers of 32; adapter of rank 4") and "peak GB" in columns
    assert re.match(r"copy \+ fsync +\d+\.\d +\d+ +1\.00x +0\.\d\d$", copy)
    assert re.match(r"merge +\d+\.\d +\d+ +\d+\.\d\dx +0\.\d\d$", merged)
    assert list(tmp_path.iterdir()) == []
