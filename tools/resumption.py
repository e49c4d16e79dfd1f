"""Where a run goes on from: the newest checkpoint that is whole, past those that are not."""

import logging
import os
from functools import partial
from pathlib import Path

import torch.distributed as dist

from mlora.checkpoint import Training, load_checkpoint
from mlora.damage import check_files, newest_first, set_aside
from mlora.description import read_info
from mlora.train import Trainer
from parallel.errors import DamagedError
from parallel.together import from_rank_zero

logger = logging.getLogger(__name__)


def is_restart() -> bool:
    """Whether torchrun has started the ranks anew. A collective of the world.

    It counts a restart on the host whose ranks had failed, and on the others not.
    """
    counts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return any(count != "0" for count in counts)


def warn_of_restarts(save_interval: int | None) -> None:
    """Say what a restart would cost a run that saves at its end only."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and save_interval is None:
        logger.warning("torchrun may start the ranks anew, and without --save-interval they begin at iteration 0 then")


class Resumption:
    """The checkpoints of a run.

    Args:
        folder: that holds them.

    Attributes:
        damaged: on rank 0, what is wrong with those that were passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: dict[Path, str] = {}

    def newest(self) -> Path | None:
        """The newest checkpoint that is not known to be damaged; None if there has never been one.

        Raises:
            DamagedError: there are some, and none of them is whole; what is wrong with each is said.
        """
        for path in newest_first(self.folder):
            if path in self.damaged:
                continue
            try:
                check_files(path)
            except DamagedError as error:
                self.pass_over(path, error)
            else:
                return path
        if self.damaged:
            raise DamagedError(
                f"no checkpoint in {self.folder} is whole, so there is nothing to go on from: "
                + "; ".join(self.damaged.values())
            )
        return None

    def pass_over(self, checkpoint: Path, error: Exception) -> None:
        """Note what is wrong with a checkpoint."""
        self.damaged[checkpoint] = str(error)
        logger.error("checkpoint %s is damaged and is passed over: %s", checkpoint.name, error)

    def load(self, checkpoint: Path, trainer: Trainer) -> int:
        """Fill a trainer from a checkpoint or, where its tensors cannot be read, the newest before it. Every rank calls it.

        Returns:
            The iteration that the run has reached.

        Raises:
            DamagedError: none is whole.
            ValueError: it does not fit the trainer.
        """
        training = Training(trainer.optimizer, trainer.scheduler, {})
        while True:
            try:
                state = load_checkpoint(checkpoint, trainer.chunks, training=training)
            except DamagedError as error:
                checkpoint = from_rank_zero(partial(self._after, checkpoint, error))
                continue
            if state["iteration"] != read_info(checkpoint)["iteration"]:
                raise ValueError(f"{checkpoint}: its training state is of iteration {state['iteration']}")
            logger.info("resumed from %s", checkpoint)
            return int(state["iteration"])

    def _after(self, checkpoint: Path, error: DamagedError) -> Path:
        self.pass_over(checkpoint, error)
        left = self.newest()
        assert left is not None  # There has been one, so it raises where no other is left.
        return left

    def set_aside(self) -> None:
        """On rank 0: rename the damaged ones, since the run will come to their iterations again."""
        for path in self.damaged:
            logger.error("damaged checkpoint %s is kept as %s", path, set_aside(path).name)
