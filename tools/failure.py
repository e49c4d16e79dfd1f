"""What a person sees when a run fails: one line for what they can put right, a traceback for what only we can.

Rank 0 prints. The other ranks leave their words in the file that torchrun asks for, which it shows for the rank that failed
first; without torchrun they print too, unless rank 0 has the same to say.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from mlora_tools.options import UsageError

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_OURS = ("mlora", "mlora_tools", "parallel", "__main__")
_CHECKS = ("megatron.core.transformer.transformer_config",)  # Megatron's own of what the options say.


@dataclass
class Outcome:
    """How a run ended: the exit code."""

    code: int = 0


@contextlib.contextmanager
def one_line_errors(rank: int) -> Iterator[Outcome]:
    """Reports an error that leaves the context and keeps its exit code: 2 for a wrong command line, 130 for Ctrl-C, else 1."""
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        outcome.code = 130
        if rank == 0:
            print("interrupted", file=sys.stderr)
    except Exception as error:
        outcome.code = 2 if isinstance(error, UsageError) else 1
        _report(error, rank)


def _report(error: Exception, rank: int) -> None:
    text = _line(error) or "".join(traceback.format_exception(error)).rstrip()
    under_torchrun = _ERROR_FILE in os.environ
    if under_torchrun:
        _leave_words(os.environ[_ERROR_FILE], text)
    # A wrong command line is so on every rank, and so is what ``parallel.together`` has noted a rank on.
    if rank == 0 or not (under_torchrun or _notes(error) or isinstance(error, UsageError)):
        print(("" if rank == 0 else f"rank {rank}: ") + f"error: {text}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str | None:
    """The message, if it is for the person at the command line; None for what should not happen."""
    message = " ".join([*str(error).split(), *(note for note in _notes(error) if note != "(on rank 0)")])
    if isinstance(error, OSError | FloatingPointError | UsageError) or type(error).__name__ == "OutOfMemoryError":
        return message
    module = _raised_in(error)
    if isinstance(error, ValueError) and module.partition(".")[0] in _OURS:
        return message
    if isinstance(error, ValueError | AssertionError | RuntimeError) and module in _CHECKS:
        return message
    if _is_lost_contact(error):
        if "EADDRINUSE" in message:
            return (
                f"the port where the ranks should meet is in use on this host; choose another MASTER_PORT ({message})"
            )
        return f"another rank has ended or cannot be reached; checkpoints that are complete stay usable ({message})"
    return None


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed: NCCL's errors have a class for it, gloo's only the place in its source that they name."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or ("RuntimeError" in names and "/gloo/" in str(error))


def _notes(error: Exception) -> list[str]:
    """What ``parallel.together`` has noted: which rank the error comes from. It is raised on every rank."""
    return list(getattr(error, "__notes__", ()))


def _raised_in(error: Exception) -> str:
    """The module whose code raised it."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
    return module


def _leave_words(path: str, text: str) -> None:
    """Write the file that torchrun reads; without a call stack in it, it shows the message."""
    content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
