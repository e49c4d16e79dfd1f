"""What lies where in the directory of a run."""

from pathlib import Path


class RunFiles:
    """The files under ``--output``.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config(self) -> Path:
        """Everything that the run used, and each of its starts."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """A JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def ranks(self) -> Path:
        """Who the ranks are, and what they send in a step."""
        return self.path / "ranks.json"

    @property
    def checkpoints(self) -> Path:
        """One directory an iteration."""
        return self.path / "checkpoints"

    @property
    def peft(self) -> Path:
        """The adapter, exported at the end."""
        return self.path / "peft"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events, unless they go elsewhere."""
        return self.path / "tensorboard"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def report(self) -> Path:
        """The page of ``report.py``, unless it goes elsewhere."""
        return self.path / "report.html"
