"""The command lines that import and export: exit codes, one-line errors, and nothing left behind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlora.conversion import open_adapter, peft_writer
from mlora.conversion.difference import compare
from mlora_tools import export_peft, import_peft
from tests.mlora.conversion.adapters import PREFIX, tensors_of, write_adapter, write_peft
from tests.tiny import write_model
from tests.tools.runs import Ranks

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "a"
    write_peft(
        folder, base, target_modules=["q_proj", "v_proj", "up_proj"], use_rslora=True, rank_pattern={"v_proj": 3}
    )
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, base: Path, peft: Path) -> Path:
    folder = tmp_path_factory.mktemp("native") / "checkpoint"
    assert import_peft.main(["--peft", str(peft), "--base", str(base), "--output", str(folder)]) == 0
    return folder


def _export(*words: Any) -> int:
    return export_peft.main([str(word) for word in words])


def test_there_and_back(
    tmp_path: Path, peft: Path, native: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _export("--adapter", native, "--output", tmp_path / "out", "--profile", "peft") == 0
    assert "24 tensors, " in (out := capsys.readouterr().out) and "MB, r 4, lora_alpha 6" in out
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", peft))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", peft)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("profile", ["portable", "sglang", "peft-v5"])
def test_profiles_and_their_readers(
    tmp_path: Path, peft: Path, native: Path, base: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readers = ["peft", "vllm", "trtllm", "llamacpp"] + (["sglang"] if profile == "sglang" else [])
    words = ["--adapter", native, "--output", tmp_path / "out", "--profile", profile, "--base", base]
    assert _export(*words, "--check-consumer", *readers) == 0
    out = capsys.readouterr().out
    assert "vLLM takes it\n" in out and out.count("takes it") == len(readers)
    found = compare(open_adapter(peft), open_adapter(tmp_path / "out"))
    assert max(difference.relative for difference in found) < 1e-7


def test_a_consumer_that_would_be_silent_is_not(
    tmp_path: Path, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--adapter",
        native,
        "--output",
        tmp_path / "out",
        "--profile",
        "peft",
        "--check-consumer",
        "peft",
        "sglang",
    )
    assert _export(*words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: SGLang cannot use it: rsLoRA: use_rslora: it is ignored")
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_replaced_only_when_asked(
    tmp_path: Path, native: Path, peft: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, words in (
        (export_peft.main, ["--adapter", str(native), "--output", str(tmp_path / "out")]),
        (import_peft.main, ["--peft", str(peft), "--base", str(base), "--output", str(tmp_path / "in")]),
    ):
        assert main(words) == 0
        assert main(words) == 1
        assert "exists already" in capsys.readouterr().err
        assert main([*words, "--force"]) == 0
    assert _export("--adapter", native, "--output", base, "--force") == 1
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert _export("--adapter", native, "--output", native / "out") == 1
    assert "in each other's way" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_rslora": True, "r": 5}, f"{PREFIX}{Q0}.lora_A.weight has shape [2, 32], of rank 2; adapter_config.json says rank 5"),
        ({"target_modules": ["q_proj"]}, "targets model.layers.1.self_attn.q_proj, but the file has no tensors for it"),
        ({"bias": "all", "lora_bias": True}, "lora_bias = true (a bias on lora_B) is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_line(
    tmp_path: Path, base: Path, change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "a", tensors_of((Q0, 2, 32, 32)), **{"target_modules": [Q0], **change})
    assert import_peft.main(["--peft", str(folder), "--base", str(base), "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and str(folder) in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_damaged_input_is_one_line(tmp_path: Path, base: Path, peft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for path in peft.iterdir():
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for words in (["--peft", str(tmp_path / "a"), "--base", str(base)], ["--peft", str(tmp_path), "--base", str(base)]):
        assert import_peft.main([*words, "--output", str(tmp_path / "out")]) == 1
        assert (captured := capsys.readouterr()).err.count("\n") == 1 and str(tmp_path) in captured.err
    assert _export("--adapter", tmp_path / "a", "--output", tmp_path / "out") == 1
    assert "is truncated" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _end_behind_the_tensors() -> None:
    peft_writer._check_written = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]


def test_a_killed_export_leaves_nothing_under_the_name(tmp_path: Path, native: Path) -> None:
    """SIGTERM before the output has its name: the program removes what it has written."""
    argv = ["--adapter", native, "--output", tmp_path / "folder" / "out"]
    finished = Ranks(1, argv, tmp_path / "log", _end_behind_the_tensors, entry=export_peft.main).wait()[0]
    assert finished.code == 130 and finished.text.splitlines()[-1] == "interrupted"
    assert list((tmp_path / "folder").iterdir()) == []
