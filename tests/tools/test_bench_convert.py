"""The benchmark runs, and the checkpoint that it converts is one that a parallel layout saves."""

import re
from pathlib import Path

import pytest
import torch

from mlora.conversion import open_adapter
from mlora.conversion.difference import compare
from mlora_tools import bench_convert, bench_merge
from mlora_tools.bench_convert import Layout, largest_group, main, make
from mlora_tools.bench_merge import Shape
from parallel.reader import Reader

SHAPE = Shape(hidden=256, ffn=96, keys=128, layers=4)


def test_the_checkpoint_is_in_the_pieces_of_its_layout(tmp_path: Path) -> None:
    make(tmp_path / "made", SHAPE, 4, Layout(tensor=2, pipeline=2))
    peft, pieces = tmp_path / "made" / "peft", tmp_path / "made" / "native"
    assert len(list(pieces.glob("*.distcp"))) == 4
    chunks = {
        key.removeprefix("adapter.decoder.layers.3."): [tuple(chunk.sizes) for chunk in entry.chunks]  # type: ignore[union-attr]
        for key, entry in Reader(pieces).metadata.state_dict_metadata.items()
        if ".layers.3." in key
    }
    assert chunks["self_attention.linear_qkv.k.lora_A"] == [(4, 256)]
    assert chunks["self_attention.linear_qkv.k.lora_B"] == [(64, 4)] * 2
    assert chunks["mlp.linear_fc2.whole.lora_A"] == [(4, 48)] * 2
    assert chunks["mlp.linear_fc2.whole.lora_B"] == [(256, 4)]
    assert open_adapter(pieces).layout == "native checkpoint of iteration 0, saved at TP 2 x PP 2 x DP 1"
    assert {difference.relative for difference in compare(open_adapter(peft), open_adapter(pieces))} == {0.0}


def test_a_group_is_gate_and_up() -> None:
    assert largest_group(SHAPE, 4) == 2 * sum(torch.zeros(shape).nbytes for shape in ((4, 256), (96, 4)))


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_convert, "WIDTHS", SHAPE)
    monkeypatch.setattr(bench_merge, "START_METHOD", "fork")  # importing everything anew takes many seconds
    words = ["--layers", "2", "--rounds", "1", "--rank", "4", "--tensor", "2", "--pipeline", "1"]
    assert main([*words, "--folder", str(tmp_path)]) == 0
    head, columns, *rows, group = capsys.readouterr().out.splitlines()
    assert head == "adapter 0.00 GB: 2 layers of 256, rank 4, float32; native at TP 2 x PP 1"
    assert "beyond tiny" in columns and group.startswith("a group is the matrices of gate and up: ")
    for row, name in zip(rows, ("copy + fsync", "PEFT to native", "native to PEFT"), strict=True):
        assert re.match(rf"{re.escape(name)} +\d+\.\d +\d+ +\d+\.\d\dx +\d+ +\d+\.\d MB +\d+\.\d\dx$", row)
    assert list(tmp_path.iterdir()) == []
