"""The merge tool: what it writes, says and refuses."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from mlora.conversion import shards
from mlora_tools.merge_lora import main
from tests.mlora.conversion.adapters import weights, write_base, write_peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in (("one", 1), ("two", 2)):
        write_peft(folder / name, base, target_modules=["q_proj", "down_proj"], seed=seed)
    return folder / "one", folder / "two"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_merge_says_what_it_did(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("--base", base, "--adapter", adapters[0], "--output", out, "--verify") == 0
    said = capsys.readouterr().out
    assert f"1 x {adapters[0]} (Hugging Face PEFT directory, adapter_model.safetensors)" in said
    assert "4 modules changed, 0 adapted by zero" in said
    assert f"verified {len(weights(base))} parameters; rounding took at most 0.00% of a delta" in said
    assert f"{out} written in" in said


def test_weights_dtype_and_force(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = adapters
    words = ["--base", base, "--output", tmp_path / "out", "--dtype", "bfloat16"]
    assert run(*words, "--adapter", f"{one}:0.5", "--adapter", f"{two}:-2") == 0
    assert "0.5 x" in (said := capsys.readouterr().out) and "-2 x" in said
    both = weights(tmp_path / "out")
    assert run(*words, "--adapter", one, two) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} exists already\n"
    assert run(*words, "--adapter", f"{one}:0.5", f"{two}:-2", "--force") == 0
    for key, value in weights(tmp_path / "out").items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, both[key])


def test_a_path_with_a_colon_is_a_path(base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x:2").symlink_to(adapters[0])
    assert run("--base", base, "--adapter", tmp_path / "x:2", "--output", tmp_path / "plain") == 0
    assert run("--base", base, "--adapter", f"{tmp_path / 'x:2'}:3", "--output", tmp_path / "thrice") == 0
    before, plain, thrice = (weights(path) for path in (base, tmp_path / "plain", tmp_path / "thrice"))
    key = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(thrice[key] - before[key], 3 * (plain[key] - before[key]), rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_one_line(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, text in (
        (["--base", base, "--adapter", tmp_path / "nothing", "--output", tmp_path / "out"], "nothing does not exist"),
        (["--base", tmp_path, "--adapter", adapters[0], "--output", tmp_path / "out"], "it has no config.json"),
        (["--base", base, "--adapter", adapters[0], "--output", base, "--force"], "are in each other's way"),
        (["--base", base, "--adapter", f"{adapters[0]}:0", "--output", tmp_path / "out"], "has weight 0: leave it out"),
        (
            ["--base", base, "--adapter", adapters[0], "--output", tmp_path / "out", "--device", "cuda:99"],
            "--device cuda:99: ",
        ),
        (["--base", base, "--adapter", f"{adapters[0]}:x", "--output", tmp_path / "out"], "one:x does not exist"),
    ):
        assert run(*words) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and text in error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as exit:
        run("--base", base)
    assert exit.value.code == 2


def _merge_slowly(words: list[str], writing: Event) -> None:
    """In a child process: a merge that takes its time over each row."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it, tests in one too.

    def slow(tensor: torch.Tensor) -> bool:
        writing.set()
        time.sleep(0.5)
        return True

    shards.is_finite, shards.BLOCK = slow, 1
    sys.exit(main(words))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing(base: Path, adapters: tuple[Path, Path], tmp_path: Path, number: int) -> None:
    context = multiprocessing.get_context("fork")
    words, writing = ["--base", base, "--adapter", adapters[0], "--output", tmp_path / "out"], context.Event()
    process = context.Process(target=_merge_slowly, args=([str(word) for word in words], writing))
    process.start()
    assert writing.wait(20)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    os.kill(process.pid or 0, number)
    process.join(20)
    assert process.exitcode == 130
    assert list(tmp_path.iterdir()) == []
