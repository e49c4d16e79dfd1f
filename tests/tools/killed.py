"""The trainer with a rank that is killed, or that stops answering, in a phase of its work.

As a script under torchrun, the first argument names the phases of the attempts, one after the other: rank 1 is killed in the first
of them, in the second after torchrun has started the ranks anew, and so on; then it is left alone.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

STEP = 3  # the step of a process in which it dies, counted from 1


def arm(phase: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Let this process send itself a signal in its third "forward" or "backward" pass, in its first "save" or "load"."""
    import mlora.checkpoint
    import mlora.linear
    import mlora.train
    import parallel.storage

    steps = 0

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            return step(*args, **kwargs)

        return call

    def dying(work: Callable[..., Any], first: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            if steps >= first:
                os.write(2, f"rank 1 ends itself in {phase}\n".encode())
                os.kill(os.getpid(), number)
            return result

        return call

    mlora.train.Trainer.step = counted(mlora.train.Trainer.step)  # type: ignore[method-assign]
    if phase == "forward":
        mlora.train._forward_step = dying(mlora.train._forward_step, STEP)
    elif phase == "backward":
        backward = dying(mlora.linear.LoraLinear.backward, STEP)
        mlora.linear.LoraLinear.backward = staticmethod(backward)  # type: ignore[method-assign, assignment]
    elif phase == "save":  # Its data are written; nobody knows of them yet.
        parallel.storage._Writer.write_data = dying(parallel.storage._Writer.write_data, 0)  # type: ignore[method-assign]
    else:
        assert phase == "load"
        mlora.checkpoint.read = dying(mlora.checkpoint.read, 0)  # type: ignore[attr-defined]


if __name__ == "__main__":
    from mlora_tools.finetune_lora import main

    phases, attempt = sys.argv[1].split(","), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "1" and attempt < len(phases):
        arm(phases[attempt])
    sys.exit(main(sys.argv[2:]))
