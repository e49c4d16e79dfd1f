"""Exit codes and one line for what is wrong, for every tool of one process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlora_tools import console
from tests.mlora.conversion.adapters import tensors_of, write_adapter
from tests.test_rooms import ADAPTER_TOOLS, ROOT


def _raising(error: BaseException) -> Callable[[Sequence[str] | None], int]:
    def main(argv: Sequence[str] | None) -> int:
        raise error

    return main


def test_what_the_tool_returns_is_the_exit_code() -> None:
    assert console.run(lambda argv: len(argv or ()), ["a", "b", "c"]) == 3


@pytest.mark.parametrize(("failure", "code"), [({}, 1), ({"failure": 2}, 2)])
def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], failure: dict[str, int], code: int) -> None:
    assert console.run(_raising(FileNotFoundError("there is no x")), [], **failure) == code
    assert capsys.readouterr().err == "error: there is no x\n"


def test_sigterm_ends_it_like_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[bool] = []

    def main(argv: Sequence[str] | None) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            return 0
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert console.run(main, []) == 130
    assert cleaned == [True] and signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "interrupted\n"


class Finalised:
    """Sends its process a signal when it goes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)  # Here the handler runs, and what it raises is dropped.


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT is not ignored, as it is in a shell's background jobs, tests in one too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_drops_ends_it_at_the_next_piece_of_work(number: int) -> None:
    reached: list[int] = []

    def main(argv: Sequence[str] | None) -> int:
        with console.progress(100, "merging") as advance:
            thing: Any = Finalised(number)
            del thing
            for piece in range(3):
                reached.append(piece)
                advance(1)
        return 0

    assert console.run(main, []) == 130
    assert reached == [0]
    assert console.run(lambda argv: 0, []) == 0


def test_a_bar_appears_after_two_seconds_only(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(100, "merging") as advance:
        advance(50)
        assert capsys.readouterr().err == ""
        time.sleep(2.1)
        advance(10)
        assert "merging:  60%" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_there_is_no_bar_without_tqdm_and_a_terminal_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with console.progress(100, "merging") as advance:
        advance(50)
    said = "merging: no progress bar, because tqdm is not installed\n" if is_terminal else ""
    assert capsys.readouterr().err == said


def test_the_tools_for_adapters_run_without_megatron(tmp_path: Path) -> None:
    """It takes seconds to import and warns of what is not installed."""
    module = ("model.layers.0.self_attn.q_proj", 2, 8, 8)
    write_adapter(tmp_path / "peft", tensors_of(module), target_modules=[module[0]])
    script = f"""
import sys, importlib
def code(name, argv):
    try:
        return importlib.import_module("mlora_tools." + name).main(argv)
    except SystemExit as exit:
        return exit.code
for name in {ADAPTER_TOOLS}:
    assert code(name, ["--help"]) == 0, name
assert code("inspect_adapter", [{str(tmp_path / "peft")!r}]) == 0
assert code("diff_adapters", [{str(tmp_path / "peft")!r}] * 2) == 0
print([name for name in sys.modules if name.startswith("megatron")])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_script_of_megatrons_says_which_megatron_it_needs() -> None:
    hidden = "import runpy, sys; sys.modules['megatron.training'] = None; runpy.run_path('tools/pretrain_gpt_lora.py')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    *_, line = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert line.startswith("error: ") and "megatron.training" in line and "megatron-core 0.18 or newer" in line
