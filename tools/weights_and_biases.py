"""A run's numbers for Weights & Biases."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlora_tools.options import UsageError
from mlora_tools.output import Output
from mlora_tools.reports import Reports


def open_wandb(reports: Reports, output: Output) -> "WandbRun | None":
    """The run that the options ask for."""
    if reports.wandb_project is None:
        return None
    name = reports.wandb_exp_name or output.path.resolve().name
    return WandbRun(reports.wandb_project, name, output.path, output.read_config())


class WandbRun:
    """Logs to one run there; a resumed run goes on with it.

    Args:
        project, name: where, and what the run is called.
        output: of the run: ``wandb/`` in it gets the library's files and the run's id.
        config: what the run uses.

    Raises:
        UsageError: the library refuses, for example because nobody is logged in.
    """

    def __init__(self, project: str, name: str, output: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = output / "wandb" / "run-id"
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        run_id = identity.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=project, name=name, id=run_id, resume="allow", dir=str(output), config=dict(config)
            )
        except wandb.Error as error:
            raise UsageError(f"--wandb-project {project}: {' '.join(str(error).split())}") from error
        # Iterations that are made again after a checkpoint come twice; its own count of steps would refuse them.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def __call__(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Log numbers of an iteration."""
        self._run.log({**numbers, "iteration": iteration})

    def close(self) -> None:
        """Send what is left, and say that the run has ended."""
        self._run.finish()
