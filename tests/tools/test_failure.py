"""What is printed, and by whom, when a run fails."""

import json
from pathlib import Path

import pytest
import torch

from mlora.config import LoraConfig
from mlora_tools.failure import one_line_errors
from mlora_tools.options import UsageError


def noted(error: Exception, rank: int) -> Exception:
    """As :func:`parallel.together.together` raises it on every rank."""
    error.add_note(f"(on rank {rank})")
    return error


def fail(error: Exception, rank: int = 0) -> int:
    with one_line_errors(rank) as outcome:
        raise error
    return outcome.code


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)


def test_a_run_that_succeeds_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_errors(0) as outcome:
        pass
    assert outcome.code == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UsageError("--lr 0 must be\nabove 0"), 2, "error: --lr 0 must be above 0\n"),
        (FileNotFoundError(2, "No such file or directory", "d.jsonl"), 1, "No such file or directory: 'd.jsonl'\n"),
        (FloatingPointError("the loss of iteration 3 is nan"), 1, "error: the loss of iteration 3 is nan\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "error: CUDA out of memory.\n"),
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed"),
            1,
            "stay usable ([/x/gloo/transport/tcp/pair.cc:553] Connection closed)\n",
        ),
        (
            torch.distributed.DistBackendError("NCCL error"),
            1,
            "checkpoints that are complete stay usable (NCCL error)\n",
        ),
        (
            torch.distributed.DistNetworkError("failed to listen. port: 4, code: -98, name: EADDRINUSE"),
            1,
            "choose another MASTER_PORT (failed to listen. port: 4, code: -98, name: EADDRINUSE)\n",
        ),
        (noted(OSError("disk full"), 3), 1, "error: disk full (on rank 3)\n"),
        (noted(OSError("disk full"), 0), 1, "error: disk full\n"),
    ],
)
def test_what_a_person_can_put_right_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, expected: str
) -> None:
    assert fail(error) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.endswith(expected) and text.count("\n") == 1


def test_our_own_checks_are_one_line_and_other_errors_are_traced(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_errors(0):
        LoraConfig(r=0)
    assert capsys.readouterr().err.startswith("error: r is 0; a LoRA rank")
    for broken in (lambda: torch.zeros(2) @ torch.zeros(3), lambda: int("x"), lambda: {}["missing"]):
        with one_line_errors(0) as outcome:
            broken()
        text = capsys.readouterr().err
        assert outcome.code == 1 and "Traceback" in text and "test_failure.py" in text


def test_rank_0_speaks_for_all_where_all_have_the_same_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (noted(OSError("disk full"), 0), UsageError("--lr 0 must be above 0")):
        assert fail(error, rank=1) in (1, 2)
        assert capsys.readouterr().err == ""
    assert fail(OSError("disk full"), rank=1) == 1
    assert capsys.readouterr().err == "rank 1: error: disk full\n"


def test_under_torchrun_the_others_leave_their_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert fail(OSError("disk full"), rank=1) == 1
    assert capsys.readouterr().err == ""
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "disk full"
    assert int(message["extraInfo"]["timestamp"]) > 0 and "py_callstack" not in message["extraInfo"]


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, expected in ((0, "interrupted\n"), (1, "")):
        with one_line_errors(rank) as outcome:
            raise KeyboardInterrupt
        assert outcome.code == 130 and capsys.readouterr().err == expected


def test_help_is_no_failure() -> None:
    with pytest.raises(SystemExit), one_line_errors(0):
        raise SystemExit(0)
