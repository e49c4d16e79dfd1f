"""What a run has left is read as far as it is there, and what is not is said."""

import json
from pathlib import Path

import pytest

from mlora_tools.heatmap import MOST_TIMES, Heatmap
from mlora_tools.recording import Recording


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 0, "eval_loss": 3.0}\n{"iteration": 1, "loss": 2.5}\n{"iteration": 2, "lo'
    )
    found = Recording.read(tmp_path)
    assert found.series("loss") == ([1], [2.5]) and found.series("eval_loss") == ([0], [3.0])
    assert found.missing == [
        "config.json is missing: no configuration.",
        "Line 3 of metrics.jsonl, its last, is half a record: it is being written.",
        "ranks.json is missing: no ranks, hosts and collectives.",
    ]
    assert found.written is not None
    for later, words in ((5, "5 s"), (125, "2 min"), (7300, "2 h"), (200_000, "2 d")):
        assert found.state(found.written + later) == f"iteration 1, last written {words} before this report"


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "ranks.json").write_text('{"ranks": [')
    lines = ["{", '{"iteration": 1, "loss": 1.0}', "7", '{"loss": 1}', '{"iteration": 2, "loss": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = Recording.read(tmp_path)
    assert found.series("loss") == ([1], [1.0])  # What is no number has no place on a curve.
    assert found.missing[0] == "config.json is no JSON object: no configuration."
    assert found.missing[1] == "metrics.jsonl: no records in lines 1, 3, 4; they are left out."
    assert found.missing[2].startswith("ranks.json cannot be read (")


def test_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"train_iters": 2}')
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 1}\n{"iteration": 2, "loss": 1}\n')
    assert Recording.read(tmp_path).state().startswith("iteration 2 of 2, last written")
    (tmp_path / "peft").mkdir()
    assert Recording.read(tmp_path).state() == "finished"
    (tmp_path / "metrics.jsonl").unlink()
    assert Recording.read(tmp_path).state() == "nothing recorded yet"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no directory"):
        Recording.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run: config\.json is missing"):
        Recording.read(tmp_path)


def norms(value: float) -> dict[str, float]:
    return {"A": 1.0, "B": value, "BA": value, "W": 4.0}


def test_norms_stand_by_projection_and_layer_at_every_time(tmp_path: Path) -> None:
    names = ["model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.qkv_proj.q"]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for time in range(1, 101):
            record = {name: norms(time + number) for number, name in enumerate(names)}
            file.write(json.dumps({"iteration": time, "adapter_norms": record}) + "\n")
    found = Heatmap.of(Recording.read(tmp_path))
    assert found is not None
    assert found.rows == ["up_proj", "qkv_proj.q"] and found.columns == [2, 10]
    assert found.last == [[101 / 4, 100 / 4], [102 / 4, None]] and found.peak == 102 / 4
    assert found.iterations[0] == 1 and found.iterations[-1] == 100 and len(found.iterations) <= MOST_TIMES
    assert found.values["B"][0] == [[2.0, 1.0], [3.0, None]]
    assert found.greatest[0] == (names[2], 25.5) and len(found.greatest) == 3


def test_without_norms_there_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "adapter_norms": {}}\n')
    assert Heatmap.of(Recording.read(tmp_path)) is None
