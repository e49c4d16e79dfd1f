"""Where a run goes on from: the newest checkpoint that is whole, past those that are not."""

import logging
from pathlib import Path

from mlora.damage import check_files, newest_first, set_aside
from parallel.storage import DamagedError

logger = logging.getLogger(__name__)


class Resumption:
    """The checkpoints of a run, on rank 0.

    Args:
        folder: that holds them.

    Attributes:
        damaged: what is wrong with those that were passed over.
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

    def after(self, checkpoint: Path, error: Exception) -> Path | None:
        """The newest without ``checkpoint``, whose tensors could not be read."""
        self.pass_over(checkpoint, error)
        return self.newest()

    def set_aside(self) -> None:
        """Rename the damaged ones: the run will come to their iterations again."""
        for path in self.damaged:
            logger.error("damaged checkpoint %s is kept as %s", path, set_aside(path).name)
