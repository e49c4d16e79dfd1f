"""The trainer's options for evaluation, checkpoints and what it tells of itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mlora_tools.options import Help, UsageError, check_at_least


@dataclass(frozen=True, kw_only=True)
class Reports:
    """evaluation, checkpoints and logs"""

    eval_interval: Annotated[
        int | None, Help("iterations between evaluations (default: before and after training only)")
    ] = None
    eval_iters: Annotated[int | None, Help("global batches of an evaluation (default: all of --eval-data)")] = None
    save_interval: Annotated[int | None, Help("iterations between checkpoints (default: at the end only)")] = None
    keep_last: Annotated[int | None, Help("checkpoints to keep (default: all)")] = None
    exit_interval: Annotated[int | None, Help("save and exit after an iteration that this divides")] = None
    log_interval: Annotated[
        int, Help("iterations between lines of the log, where there is no terminal for a progress bar")
    ] = 10
    log_adapter_norms_interval: Annotated[
        int, Help("iterations between records of each projection's norms of A, B, BA and W; 0 for none")
    ] = 100
    tensorboard_dir: Annotated[Path | None, Help("default: OUTPUT/tensorboard", "DIR")] = None
    wandb_project: Annotated[
        str | None, Help("also log to this project of Weights & Biases (WANDB_MODE=offline: to OUTPUT/wandb)")
    ] = None
    wandb_exp_name: Annotated[str | None, Help("of the run there (default: the name of OUTPUT)")] = None

    def __post_init__(self) -> None:
        names = ("eval_interval", "eval_iters", "save_interval", "keep_last", "exit_interval", "log_interval")
        check_at_least(1, self, *names)
        check_at_least(0, self, "log_adapter_norms_interval")
        if self.wandb_exp_name and not self.wandb_project:
            raise UsageError("--wandb-exp-name goes with --wandb-project")
