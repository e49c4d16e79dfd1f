"""`metrics.jsonl` over stops and resumptions."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlora_tools.metrics import Metrics


def write(folder: Path, start: int, end: int) -> Metrics:
    """A run from ``start`` to ``end`` that evaluates at every third iteration."""
    metrics = Metrics(folder / "metrics.jsonl", folder / "tensorboard", start)
    for iteration in range(start, end + 1):
        if iteration > start:
            metrics.add({"iteration": iteration, "loss": iteration + start / 100, "lr": 0.1})
        if iteration % 3 == 0 and iteration not in metrics.evaluated:
            metrics.add({"iteration": iteration, "eval_loss": 10.0 + iteration})
    metrics.close()
    return metrics


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_replaces_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    metrics = write(tmp_path, 3, 7)
    assert metrics.records == read(tmp_path)
    assert [record["iteration"] for record in read(tmp_path) if "loss" in record] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["iteration"] for record in read(tmp_path) if "eval_loss" in record] == [0, 3, 6]
    assert read(tmp_path)[-1]["loss"] == 7.03  # the second run's


def test_tensorboard_forgets_the_same_steps(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 2)) for event in events.Scalars("loss/train")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.03), (5, 5.03), (6, 6.03), (7, 7.03)
    ]  # fmt: skip
    assert [event.step for event in events.Scalars("loss/eval")] == [0, 3, 6]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lo')
    write(tmp_path, 4, 5)
    assert [record["iteration"] for record in read(tmp_path) if "loss" in record] == [1, 2, 3, 4, 5]


def test_a_damaged_line_is_named_and_the_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for bad in ('{"iteration"', "3", '{"loss": 1}', '{"iteration": "x"}'):
        text = f'{{"iteration": 1, "loss": 1}}\n{bad}\n{{"iteration": 3, "loss": 1}}\n'
        path.write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record"):
            Metrics(path, tmp_path / "tensorboard", 3)
        assert path.read_text() == text
