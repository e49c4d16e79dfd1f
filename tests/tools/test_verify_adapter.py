"""The tool that verifies adapters: it passes what is right at any layout, and fails what is wrong or does nothing."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mlora.conversion import open_adapter
from mlora.conversion.importing import plan_import
from mlora.conversion.merge import merge
from mlora.conversion.native_writer import write_import
from mlora.pretrained import Pretrained
from mlora.saved import SavedAdapter
from mlora_tools.verify_adapter import Row, judge, main
from tests.mlora.conversion.adapters import write_peft
from tests.tools.runs import Finished, Ranks, write_base
from tests.tools.test_torchrun import ROOT, torchrun

PROMPTS = ("abc def", "A longer one, of several words.")
LAYOUT = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel")


@dataclass(frozen=True)
class Files:
    """A base, an adapter for it in two formats, one that does nothing, the adapter merged, and another one merged."""

    base: Path
    peft: Path
    checkpoints: Path
    idle: Path
    merged: Path
    other: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("verify")
    base = write_base(folder / "base")
    for name, seed in (("peft", 1), ("another", 2), ("idle", 3)):
        write_peft(folder / name, base, seed=seed, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=3)
    tensors = load_file(folder / "idle" / "adapter_model.safetensors")
    zero = {key: tensor * ("lora_A" in key) for key, tensor in tensors.items()}
    save_file(zero, folder / "idle" / "adapter_model.safetensors", metadata={"format": "pt"})
    plan = plan_import(open_adapter(folder / "peft"), Pretrained.open(base))
    write_import(plan, folder / "checkpoints" / "iter_0000005")
    for name, output in (("peft", "merged"), ("another", "other")):
        merge(base, [(open_adapter(folder / name), 1.0)], folder / output)
    return Files(*(folder / name for name in ("base", "peft", "checkpoints", "idle", "merged", "other")))


def run(
    size: int, folder: Path, files: Files, *words: object, before: Callable[[], None] | None = None
) -> list[Finished]:
    argv = (
        ("--base", files.base, *words)
        if "--prompts" in words
        else ("--base", files.base, *words, "--prompts", *PROMPTS)
    )
    return Ranks(size, argv, folder / "log", before, main).wait()


def numbers(text: str) -> list[tuple[float, float]]:
    """(difference, effect) of each row of the table."""
    found = re.findall(r"^ +\d+ +(\S+) +(\S+)  '", text, re.MULTILINE)
    return [(float(difference), float(effect)) for difference, effect in found]


def test_a_native_checkpoint_at_four_ranks(files: Files, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join((*PROMPTS, "", "x")))
    words = ("--adapter", files.checkpoints, *LAYOUT, "--prompts", tmp_path / "prompts.txt", "one more")
    ranks = run(4, tmp_path, files, *words)
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].text
    said, rows = ranks[0].text, numbers(ranks[0].text)
    assert "reading the newest, iter_0000005" in said and "they agree: " in said
    assert len(rows) == 4 and "'A longer one, of several words.'" in said
    for difference, effect in rows:
        assert difference < 1e-5 * effect and effect > 0.1
    assert [rank.text for rank in ranks[1:]] == [""] * 3


@pytest.mark.parametrize("against", ["peft", "merged"])
def test_a_peft_directory_on_one_rank(files: Files, tmp_path: Path, against: str) -> None:
    words = ("--merged", files.merged) if against == "merged" else ()
    (rank,) = run(1, tmp_path, files, "--adapter", files.peft, *words)
    assert rank.code == 0, rank.text
    assert f"greatest |here - {'the merged model' if words else 'PEFT'}| of a logit" in rank.text
    assert all(difference < 1e-5 * effect and effect > 0.1 for difference, effect in numbers(rank.text))


def test_another_adapters_model_fails(files: Files, tmp_path: Path) -> None:
    (rank,) = run(1, tmp_path, files, "--adapter", files.checkpoints, "--merged", files.other)
    assert rank.code == 1 and "error: the logits differ from those of the merged model by " in rank.text
    assert max(difference for difference, _ in numbers(rank.text)) > 0.1


def test_an_adapter_that_does_nothing_fails(files: Files, tmp_path: Path) -> None:
    (rank,) = run(1, tmp_path, files, "--adapter", files.idle)
    assert rank.code == 1 and "error: the adapter does nothing in PEFT: its logits are the base's" in rank.text
    assert [effect for _, effect in numbers(rank.text)] == [0, 0]


def _load_nothing() -> None:
    SavedAdapter.load = lambda self, model: None  # type: ignore[method-assign, assignment, misc]


def test_an_adapter_that_is_not_loaded_here_fails(files: Files, tmp_path: Path) -> None:
    (rank,) = run(1, tmp_path, files, "--adapter", files.peft, before=_load_nothing)
    assert rank.code == 1 and "error: the logits differ from those of PEFT" in rank.text


def test_torchrun_fails_with_it(files: Files, tmp_path: Path) -> None:
    argv: list[Any] = ["--base", files.base, "--adapter", files.peft, "--merged", files.other, "--prompts", *PROMPTS]
    script = ROOT / "tools" / "verify_adapter.py"
    with torchrun(
        tmp_path / "log", "--standalone", "--nproc-per-node", 2, script, *argv, "--tensor-model-parallel-size", 2
    ) as launcher:
        code = launcher.wait(150)
    said = (tmp_path / "log").read_text()
    assert code == 1, said
    # Rank 0 says it, and torchrun finds it in the file that it reads.
    assert said.count("the logits differ from those of the merged model by ") == 2, said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tolerance", 1), "--tolerance 1.0 must be above 0 and below 1"),
        (("--prompts", ""), "--prompts '' holds no text"),
        (("--adaptor", "x"), "unknown option --adaptor; did you mean --adapter?"),
    ],
)
def test_a_wrong_command_line_is_two(
    words: tuple[object, ...], message: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--base",
        files.base,
        "--adapter",
        files.peft,
        *(() if "--prompts" in words else ("--prompts", "a")),
        *words,
    ]
    assert main([str(word) for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_compared_fails() -> None:
    for bad in (Row("a", 1, float("nan"), 1.0), Row("a", 1, 0.0, float("inf"))):
        with pytest.raises(ValueError, match="the logits of 'a' are not finite"):
            judge([Row("b", 1, 0.0, 1.0), bad], "PEFT", 1e-3)
    judge([Row("a", 1, 0.0009, 0.1), Row("b", 1, 0.0, 1.0)], "PEFT", 1e-3)
    with pytest.raises(ValueError, match=r"by 0\.0011, which is 0\.0011 of what"):
        judge([Row("a", 1, 0.0011, 0.1), Row("b", 1, 0.0, 1.0)], "PEFT", 1e-3)
