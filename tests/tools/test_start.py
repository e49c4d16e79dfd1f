"""Runs that start from an adapter: at its loss, with its ranks and targets, at any layout; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

import mlora_tools.run  # noqa: F401  # Likewise.
from mlora.conversion import open_adapter
from mlora.conversion.importing import plan_import
from mlora.conversion.native_writer import write_import
from mlora.pretrained import Pretrained
from mlora_tools.start import Start
from tests.mlora.conversion.adapters import tensors_of, write_adapter
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.tools.runs import metrics, run, write_base, write_pairs

Q0 = "model.layers.0.self_attn.q_proj"
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, an adapter that PEFT made, and what was imported of it."""
    folder = tmp_path_factory.mktemp("files")
    base = write_base(folder / "base")
    write_pairs(folder / "train.jsonl", 30)
    write_pairs(folder / "heldout.jsonl", 6, first=30)
    write_with_peft(
        folder / "peft", base, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 3}, use_rslora=True,
        lora_alpha=1, lora_dropout=0.1,
    )  # fmt: skip
    write_import(plan_import(open_adapter(folder / "peft"), Pretrained.open(base)), folder / "native")
    return folder


def _argv(files: Path, output: Path, *words: Any) -> list[Any]:
    return [
        *("--model", files / "base", "--data", files / "train.jsonl", "--eval-data", files / "heldout.jsonl"),
        *("--seq-length", 24, "--global-batch-size", 8, "--lr", 0.01, "--output", output, *words),
    ]


@pytest.fixture(scope="module")
def first(files: Path) -> Path:
    """Two iterations from the PEFT directory, at TP 2."""
    output = files / "first"
    ranks = run(2, _argv(files, output, *TP2, "--train-iters", 2, "--resume-from-peft", files / "peft"), files / "log")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
    return output


def _evaluations(output: Path) -> dict[int, float]:
    return {record["iteration"]: record["eval_loss"] for record in metrics(output) if "eval_loss" in record}


def test_ranks_and_targets_are_the_adapters(files: Path, first: Path) -> None:
    config = json.loads((first / "config.json").read_text())
    assert config["lora"]["lora_dropout"] == 0.1 and config["lora"]["use_rslora"] is True
    assert config["lora"]["adapter_dtype"] == "float32" and config["lora"]["seed"] == 1234
    theirs, ours = open_adapter(files / "peft").modules, open_adapter(first / "checkpoints").modules
    assert [(m.name, m.rank, m.scaling) for m in theirs] == [(m.name, m.rank, m.scaling) for m in ours]


def test_it_starts_where_the_adapter_is_and_goes_on_from_there(files: Path, first: Path, tmp_path: Path) -> None:
    """From the PEFT directory, its import and a run's own checkpoint alike, at every layout."""
    losses = _evaluations(first)
    assert losses[2] < losses[0]
    for number, (source, wanted) in enumerate(
        [(files / "native", losses[0]), (first / "peft", losses[2]), (first / "checkpoints", losses[2])]
    ):
        output = tmp_path / str(number)
        argv = _argv(files, output, *(PP2 if number else ()), "--train-iters", 1, "--resume-from-peft", source)
        ranks = run(2 if number else 1, argv, tmp_path / f"log{number}")
        assert [rank.code for rank in ranks] == [0] * len(ranks), ranks[0].text
        found = _evaluations(output)
        assert found[0] == pytest.approx(wanted, rel=1e-5) and found[1] != found[0]


def test_such_a_run_is_resumed_like_any_other(files: Path, first: Path, tmp_path: Path) -> None:
    argv = _argv(files, tmp_path / "out", "--train-iters", 2, "--resume-from-peft", files / "peft")
    stopped = run(1, [*argv, "--exit-interval", 1], tmp_path / "log1")
    assert stopped[0].code == 0 and "stopped after iteration 1 of 2" in stopped[0].text, stopped[0].text
    resumed = run(1, [*argv, "--resume"], tmp_path / "log2")
    assert resumed[0].code == 0, resumed[0].text
    assert _evaluations(tmp_path / "out")[2] == pytest.approx(_evaluations(first)[2], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--resume-from-peft", "PEFT", "--lora-rank", 4), 2, "--lora-rank is that of"),
        (("--resume-from-peft", "nowhere"), 1, "nowhere does not exist"),
        (("--resume-from-peft", "BASE"), 1, "is no adapter"),
        (("--resume-from-peft", "OTHER"), 1, "another base"),
    ],
)
def test_what_does_not_go_is_one_line_before_anything_is_written(
    files: Path, tmp_path: Path, words: tuple[Any, ...], code: int, message: str
) -> None:
    write_adapter(tmp_path / "other", tensors_of((Q0, 2, 64, 32)), target_modules=[Q0])
    places = {
        "PEFT": files / "peft",
        "BASE": files / "base",
        "OTHER": tmp_path / "other",
        "nowhere": tmp_path / "nowhere",
    }
    argv = _argv(files, tmp_path / "out", "--train-iters", 1, *(places.get(word, word) for word in words))
    finished = run(1, argv, tmp_path / "log")[0]
    assert finished.code == code and message in finished.text and finished.text.count("\n") == 1, finished.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stored", "model", "asked", "wanted"),
    [
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.bfloat16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_adapters_dtype_holds_the_files_and_the_models(
    files: Path, tmp_path: Path, stored: torch.dtype, model: torch.dtype, asked: torch.dtype | None, wanted: torch.dtype
) -> None:
    tensors = {key: tensor.to(stored) for key, tensor in tensors_of((Q0, 2, 32, 32)).items()}
    write_adapter(tmp_path / "a", tensors, target_modules=[Q0])
    start = Start.read(tmp_path / "a", Pretrained.open(files / "base"), 7, model, asked)
    assert (start.config.adapter_dtype, start.config.seed, start.saved and start.saved.source) == (
        wanted,
        7,
        tmp_path / "a",
    )
