"""Ranks that are killed in every phase or stop answering, checkpoints that were damaged, disks that are full: what is whole stays
whole, every rank ends, and the run goes on from there as if nothing had been."""

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

import mlora_tools.run  # noqa: F401  # Likewise.
from mlora.description import checkpoints, latest_checkpoint
from parallel.reader import Reader
from tests.tools.killed import arm
from tests.tools.runs import Ranks, metrics, run, write_base, write_pairs

TP2 = ("--tensor-model-parallel-size", 2)
SIX = ("--train-iters", 6, "--save-interval", 2, "--lora-dropout", 0.1)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("files")
    return [
        *("--model", write_base(folder / "base"), "--data", write_pairs(folder / "train.jsonl", 50)),
        *("--seq-length", 24, "--global-batch-size", 8, "--lr", 0.02, "--log-interval", 1, *SIX, *TP2),
    ]


@pytest.fixture(scope="module")
def straight(given: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without accidents."""
    folder = tmp_path_factory.mktemp("straight")
    ranks = run(2, [*given, "--output", folder / "run"], folder / "log")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
    return folder / "run"


def _on_rank_one(action: Any) -> None:
    if os.environ["RANK"] == "1":
        action()


def _files(output: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for each in checkpoints(output / "checkpoints") for path in each.iterdir()}


def test_a_rank_killed_in_any_phase_ends_all_and_costs_nothing_that_was_saved(
    given: list[Any], straight: Path, tmp_path: Path
) -> None:
    """One run, in which a rank is killed again and again."""
    output = tmp_path / "run"
    argv = [*given, "--resume", "--output", output]
    saved: dict[str, str] = {}
    for phase in ("save", "forward", "load", "backward"):
        before = _files(output)
        ranks = Ranks(2, argv, tmp_path / phase, partial(_on_rank_one, partial(arm, phase)))
        ends = ranks.wait(60)
        assert [end.code for end in ends] == [1, -signal.SIGKILL], (phase, ends[0].text)
        assert ends[0].text.splitlines()[-1].startswith("error: another rank has ended or cannot be reached"), phase
        assert before.items() <= _files(output).items()
        saved[phase] = latest_checkpoint(output / "checkpoints").name if checkpoints(output / "checkpoints") else ""
    assert saved == {"save": "", "forward": "iter_0000002", "load": "iter_0000002", "backward": "iter_0000004"}
    ends = run(2, argv, tmp_path / "last")
    assert [end.code for end in ends] == [0, 0], ends[0].text
    assert metrics(output) == metrics(straight)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / "peft" / name).read_bytes() == (straight / "peft" / name).read_bytes()


def test_a_rank_that_stops_answering_is_an_error_after_the_timeout(given: list[Any], tmp_path: Path) -> None:
    argv = [*given, "--output", tmp_path / "run", "--distributed-timeout-minutes", 0.25]
    ranks = Ranks(2, argv, tmp_path / "log", partial(_on_rank_one, partial(arm, "forward", signal.SIGSTOP)))
    ranks.wait_for("iteration 2/")
    began = time.monotonic()
    ranks.processes[0].join(60)
    assert ranks.processes[0].exitcode == 1 and time.monotonic() - began < 40, ranks.logs[0].read_text()
    ranks.signal(signal.SIGKILL, [1])
    ends = ranks.wait()
    assert "another rank has ended or cannot be reached" in ends[0].text.splitlines()[-1]
    assert "Timed out" in ends[0].text.splitlines()[-1] or "timeout" in ends[0].text.splitlines()[-1].lower()


def test_ranks_that_torchrun_starts_anew_go_on_by_themselves(given: list[Any], straight: Path, tmp_path: Path) -> None:
    """Also where the count of restarts is another host's."""
    output = tmp_path / "run"
    again = partial(_on_rank_one, partial(os.environ.update, {"TORCHELASTIC_RESTART_COUNT": "1"}))
    argv = [*given, "--output", output]
    stopped = run(2, [*argv, "--exit-interval", 4], tmp_path / "0", again)
    assert [end.code for end in stopped] == [0, 0], stopped[0].text
    assert f"nothing to resume in {output}: the run starts at iteration 0" in stopped[0].text
    ends = run(2, argv, tmp_path / "1", again)
    assert [end.code for end in ends] == [0, 0], ends[0].text
    assert f"resumed from {output / 'checkpoints' / 'iter_0000004'}" in ends[0].text
    assert metrics(output) == metrics(straight)


def _change_a_number(checkpoint: Path) -> None:
    """One bit of the greatest tensor in rank 1's shard, which only its checksum shows."""
    path = checkpoint / "__1_0.distcp"
    with Reader(checkpoint) as reader:
        places = [place for place in reader.metadata.storage_data.values() if place.relative_path == path.name]
    place = max(places, key=lambda place: place.length)
    content = bytearray(path.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoints_are_named_passed_over_and_kept(given: list[Any], straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    two, four, six = checkpoints(output / "checkpoints")
    os.truncate(six / "__0_0.distcp", 1000)
    _change_a_number(four)
    whole = {path: path.read_bytes() for path in two.iterdir()}
    ends = run(2, [*given, "--resume", "--output", output], tmp_path / "log")
    assert [end.code for end in ends] == [0, 0], ends[0].text
    said = ends[0].text
    assert (
        f"checkpoint iter_0000006 is damaged and is passed over: {six / '__0_0.distcp'} is truncated: 1000 by" in said
    )
    assert f"checkpoint iter_0000004 is damaged and is passed over: {four / '__1_0.distcp'}: " in said
    assert "wrong checksum" in said and f"resumed from {two}" in said
    assert f"damaged checkpoint {six} is kept as iter_0000006.damaged" in said
    assert metrics(output) == metrics(straight)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        "iter_0000002", "iter_0000004", "iter_0000006", "iter_0000004.damaged", "iter_0000006.damaged"
    }  # fmt: skip
    assert {path: path.read_bytes() for path in two.iterdir()} == whole

    for checkpoint in checkpoints(output / "checkpoints"):
        (checkpoint / ".metadata").unlink()
    before = sorted(output.rglob("*"))
    ends = run(2, [*given, "--resume", "--output", output], tmp_path / "log2")
    assert [end.code for end in ends] == [1, 1]
    error = ends[0].text.splitlines()[-1]
    assert "is whole, so there is nothing to go on from" in error and error.count(".metadata is missing") == 3
    assert sorted(output.rglob("*")) == before


def test_a_full_disk_and_a_folder_that_cannot_be_written(given: list[Any], straight: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    shutil.copytree(straight, full)
    shutil.rmtree(full / "checkpoints" / "iter_0000006")
    (full / "metrics.jsonl.partial").symlink_to("/dev/full")
    before = _files(full)
    ends = run(2, [*given, "--resume", "--output", full], tmp_path / "log")
    assert [end.code for end in ends] == [1, 1]
    assert "No space left on device: '" in ends[0].text.splitlines()[-1] and "metrics.jsonl" in ends[0].text, ends[0]
    assert _files(full) == before
    ends = run(2, [*given, "--output", "/proc/run"], tmp_path / "log2")
    assert [end.code for end in ends] == [1, 1]
    assert ends[0].text.splitlines()[-1].startswith("error: ") and "/proc/run" in ends[0].text.splitlines()[-1]
