"""The trainer with `--objective dpo`: the same numbers at every layout, resumed, and against a frozen adapter."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

import mlora_tools.run  # noqa: F401  # Likewise.
from mlora_tools.arguments import Arguments
from mlora_tools.options import UsageError
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.tools.runs import LETTERS, metrics, run, write_base, write_records

TP2_PP2_SP = (
    "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel"
)  # fmt: skip


def write_preferences(path: Path, count: int, first: int = 0) -> Path:
    """Pairs in which capital letters are preferred."""

    def record(number: int) -> dict[str, str]:
        letter = LETTERS[number % 26]
        return {
            "prompt": f"{letter * (1 + number % 5)}: ",
            "chosen": letter.upper() * (2 + number % 3),
            "rejected": f"{letter * 2}.",
        }

    return write_records(path, map(record, range(first, first + count)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    base = write_base(made / "base")
    write_preferences(made / "train.jsonl", 30)
    write_preferences(made / "heldout.jsonl", 7, first=30)
    write_with_peft(made / "reference", base, target_modules=["q_proj", "down_proj"])
    return made


def argv(folder: Path, output: str, *words: Any) -> list[Any]:
    return [
        *("--model", folder / "base", "--data", folder / "train.jsonl", "--eval-data", folder / "heldout.jsonl"),
        *("--objective", "dpo", "--seq-length", 24, "--global-batch-size", 8, "--micro-batch-size", 2, "--lr", 0.02),
        *("--train-iters", 6, "--save-interval", 3, "--lora-dropout", 0.1, "--output", folder / output, *words),
    ]


@pytest.fixture(scope="module")
def straight(folder: Path) -> list[dict[str, Any]]:
    """The records of six iterations at TP 2 x PP 2 with sequence parallelism."""
    ranks = run(4, argv(folder, "straight", *TP2_PP2_SP), folder / "log")
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].text
    return metrics(folder / "straight")


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    return ours == [pytest.approx(record, rel=1e-4, abs=1e-6) for record in theirs]


def test_pairs_come_apart_and_are_on_record(folder: Path, straight: list[dict[str, Any]]) -> None:
    steps = [record for record in straight if "loss" in record]
    before, after = [record for record in straight if "eval_loss" in record]
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: the adapter does nothing yet.
    assert abs(before["eval_reward_margin"]) < 1e-4
    assert after["eval_loss"] < 0.6 and after["eval_reward_margin"] > 0.2
    assert after["eval_reward_accuracy"] == pytest.approx(1.0)
    assert after["eval_reward_margin"] == pytest.approx(
        after["eval_reward_chosen"] - after["eval_reward_rejected"], rel=1e-4
    )
    assert all(
        {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"} <= step.keys() for step in steps
    )
    config = json.loads((folder / "straight" / "config.json").read_text())
    assert config["settings"]["--objective"] == "dpo" and config["data"]["files"][0]["samples"] == 30
    assert (folder / "straight" / "peft" / "adapter_model.safetensors").is_file()


def test_one_process_goes_on_where_four_stopped(folder: Path, straight: list[dict[str, Any]]) -> None:
    ranks = run(4, argv(folder, "half", *TP2_PP2_SP, "--exit-interval", 3), folder / "log-half")
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].text
    (rank,) = run(1, argv(folder, "half", "--resume"), folder / "log-rest")
    assert rank.code == 0, rank.text
    assert close(metrics(folder / "half"), straight)


def test_a_frozen_adapter_can_be_the_reference(folder: Path, straight: list[dict[str, Any]]) -> None:
    """Started from the reference itself, the rewards start at nothing; a resumed run must have the same one."""
    words = ("--reference-adapter", folder / "reference", "--resume-from-peft", folder / "reference")
    given = [word for word in argv(folder, "named") if word not in ("--lora-dropout", 0.1)]
    ranks = run(2, [*given, *words, "--tensor-model-parallel-size", 2, "--exit-interval", 3], folder / "log-named")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
    assert re.search(r"iteration 1/6 \| loss 0\.6931 \| reward chosen \S+ \| reward rejected ", ranks[0].text)
    assert "iteration 0/6 | reward chosen " in ranks[0].text
    found = metrics(folder / "named")
    assert found[0]["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert found[-1]["loss"] < 0.69
    (rank,) = run(1, [*given, *words[2:], "--resume"], folder / "log-other")
    assert rank.code == 1 and "--reference-adapter was given" in rank.text, rank.text
    (rank,) = run(1, [*given, *words, "--resume"], folder / "log-same")
    assert rank.code == 0, rank.text


def test_preferences_that_are_none_are_refused_under_file_and_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (rank,) = run(1, [*argv(folder, "bad"), "--data", tmp_path / "bad.jsonl"], tmp_path / "log")
    assert rank.code == 1 and rank.text.count("\n") == 1
    assert 'bad.jsonl:1: the object has no "chosen"; it needs "prompt", "chosen" and "rejected"' in rank.text
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dpo-beta", 0.2], "--dpo-beta goes with --objective dpo"),
        (["--reference-adapter", "a"], "--reference-adapter goes with --objective dpo"),
        (["--objective", "dpo", "--packing"], "--packing does not go with --objective dpo"),
        (["--objective", "dpo", "--dpo-beta", 0], "--dpo-beta 0.0 must be above 0"),
        (
            ["--objective", "dpo", "--dpo-label-smoothing", 0.5],
            "--dpo-label-smoothing 0.5 must be at least 0 and below 0.5",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Arguments.parse(["--model", "m", "--data", "d", "--output", "o", *map(str, words)])
    assert str(error.value).startswith(message)
