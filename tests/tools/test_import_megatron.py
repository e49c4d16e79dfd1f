"""The tool that imports adapters of Megatron-Bridge and ms-swift: what it writes, says and refuses."""

import json
from pathlib import Path

import pytest
import torch

from mlora.conversion import open_adapter
from mlora.conversion.difference import compare
from mlora_tools.import_megatron import main
from parallel.stream import write_stream
from tests.mlora.conversion.megatron_writers import CASES, RANK, write_sides
from tests.tiny import HIDDEN, LAYERS, write_model

QKV = "decoder.layers.self_attention.linear_qkv"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of iterations, of which the second has an adapter on linear_qkv."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    shapes = {"in": (LAYERS, RANK, HIDDEN), "out": (LAYERS, 2 * HIDDEN, RANK)}
    for name in ("iter_0000003", "iter_0000004"):
        (folder / name).mkdir(parents=True)
        tensors = {f"{QKV}.adapter.linear_{end}.weight": torch.randn(shape) for end, shape in shapes.items()}
        write_stream(tensors.items(), folder / name)
        write_sides(folder / name, CASES["bridge"])
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_it_writes_both_formats(
    checkpoint: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, peft = tmp_path / "native", tmp_path / "peft"
    assert run("--checkpoint", checkpoint, "--base", base, "--output", native, "--peft", peft) == 0
    said = capsys.readouterr().out
    assert f"Megatron-Bridge checkpoint iter_0000004: {3 * LAYERS} modules of rank {RANK}\n" in said
    assert f"{native} written\n{peft} written\n" in said
    assert max(difference.relative for difference in compare(open_adapter(native), open_adapter(peft))) == 0
    assert json.loads((peft / "adapter_config.json").read_text())["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_what_exists_is_replaced_on_request_only(
    checkpoint: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--checkpoint", checkpoint / "iter_0000003", "--base", base, "--peft", tmp_path / "peft")
    assert run(*words) == 0 and run(*words) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'peft'} exists already\n"
    assert run(*words, "--force") == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "nothing to make: give --output, --peft or both"),
        (("--output", "out", "--alpha", 3), 1, "alpha is given, and "),
        (("--output", "out", "--format", "mcore-bridge"), 1, "is no matrix of an adapter of mcore-bridge"),
    ],
)
def test_errors_are_one_line(
    words: tuple[object, ...],
    code: int,
    message: str,
    checkpoint: Path,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--checkpoint", checkpoint, "--base", base, *words) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in line
    assert not list(tmp_path.iterdir())
