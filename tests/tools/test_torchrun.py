"""The trainer under torchrun itself: as one command, on two hosts, and ended by a signal to the launcher."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

import mlora_tools.run  # noqa: F401  # Likewise.
from tests.ports import free_port
from tests.tools.runs import metrics, run, write_base, write_pairs

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 150


@contextlib.contextmanager
def torchrun(log: Path, *words: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher, whose output goes to ``log``; it and its workers are gone when the context ends."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [launcher := psutil.Process(process.pid), *launcher.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            process.wait()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("files")
    return [
        *(ROOT / "tools" / "finetune_lora.py", "--model", write_base(folder / "base")),
        *("--data", write_pairs(folder / "train.jsonl", 50), "--seq-length", 24, "--global-batch-size", 8),
        *("--log-interval", 1, "--lr", 0.01),
    ]


def test_two_hosts_train_as_one(given: list[Any], tmp_path: Path) -> None:
    """Two agents with a rank each, tensor parallel across them."""
    endpoint = f"localhost:{free_port()}"
    hosts = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    argv = [*given, "--output", tmp_path / "run", "--train-iters", 3, "--tensor-model-parallel-size", 2]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with torchrun(logs[0], *hosts, *argv) as one, torchrun(logs[1], *hosts, *argv) as other:
        codes = one.wait(LIMIT_S), other.wait(LIMIT_S)
    texts = [log.read_text() for log in logs]
    assert codes == (0, 0), "".join(texts)
    assert sorted("finished at iteration 3" in text for text in texts) == [False, True]
    assert [record["iteration"] for record in metrics(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "peft" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["starts"][0]["world_size"] == 2


def test_a_run_whose_rank_is_killed_is_started_anew_and_goes_on_by_itself(given: list[Any], tmp_path: Path) -> None:
    """Nothing but ``--max-restarts`` asks for it; the numbers are those of a run without accidents."""
    log = tmp_path / "log"
    argv = [*given[1:], "--train-iters", 6, "--save-interval", 2, "--lora-dropout", 0.1]
    words = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 2, ROOT / "tests" / "tools" / "killed.py"]
    with torchrun(log, *words, "backward,load", *argv, "--output", tmp_path / "run") as launcher:
        assert launcher.wait(LIMIT_S) == 0, log.read_text()
    text = log.read_text()
    # Of two ranks that end at once, torchrun names the one that it sees first.
    for phase in ("backward", "load"):
        assert text.count(f"rank 1 ends itself in {phase}\n") == 1, text
    assert text.count("failed (exitcode: ") == 2, text
    assert text.count(f"resumed from {tmp_path / 'run' / 'checkpoints' / 'iter_0000002'}") == 1
    assert "finished at iteration 6" in text
    ends = run(2, [*argv, "--output", tmp_path / "straight"], tmp_path / "straight-log")
    assert [end.code for end in ends] == [0, 0], ends[0].text
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    starts = json.loads((tmp_path / "run" / "config.json").read_text())["starts"]
    assert [start["iteration"] for start in starts] == [0, 2]


def test_a_lost_host_leaves_a_smaller_world_that_goes_on(given: list[Any], tmp_path: Path) -> None:
    endpoint = f"localhost:{free_port()}"
    hosts = ["--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 2, "--rdzv-backend", "c10d"]
    hosts += ["--rdzv-endpoint", endpoint, "--rdzv-conf"]
    soon = "last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=2"
    argv = [*given, "--output", tmp_path / "run", "--train-iters", 60, "--save-interval", 2, "--keep-last", 2]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with torchrun(logs[0], *hosts, f"is_host=1,{soon}", *argv) as one:
        with torchrun(logs[1], *hosts, f"is_host=0,{soon}", *argv):
            end = time.monotonic() + LIMIT_S
            while not any("iteration 4/" in log.read_text() for log in logs):
                assert time.monotonic() < end and one.poll() is None, "".join(log.read_text() for log in logs)
                time.sleep(0.1)
        # The second host is gone, its launcher and its rank at once.
        assert one.wait(LIMIT_S) == 0, logs[0].read_text()
    assert [record["iteration"] for record in metrics(tmp_path / "run") if "loss" in record] == list(range(1, 61))
    starts = json.loads((tmp_path / "run" / "config.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 1] and starts[1]["iteration"] >= 2
    assert "finished at iteration 60" in logs[0].read_text()


def test_torchrun_forwards_sigterm_and_the_run_is_saved(given: list[Any], tmp_path: Path) -> None:
    argv = [*given, "--output", tmp_path / "run", "--train-iters", 100_000, "--lr-decay-style", "constant"]
    log = tmp_path / "log"
    with torchrun(log, "--standalone", "--nproc-per-node", 2, *argv) as launcher:
        end = time.monotonic() + LIMIT_S
        while "iteration 2/" not in log.read_text():
            assert time.monotonic() < end and launcher.poll() is None, log.read_text()
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(60)
    done = metrics(tmp_path / "run")[-1]["iteration"]
    assert f"stopped after iteration {done} of 100000" in log.read_text()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"iter_{done:07d}"]


def test_torchrun_shows_the_one_line_of_a_wrong_option(given: list[Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = [*given, "--output", tmp_path / "run", "--micro-batch-size", 3]
    with torchrun(log, "--standalone", "--nproc-per-node", 2, *argv) as launcher:
        assert launcher.wait(LIMIT_S) == 1
    lines = log.read_text().splitlines()
    message = "--global-batch-size 8 is not a multiple of --micro-batch-size 3 x data-parallel size 2 = 6"
    assert [line for line in lines if line.startswith("error: ")] == [f"error: {message}"]
    assert any(line.strip().startswith("traceback") and message in line for line in lines)
    assert not (tmp_path / "run").exists()
