"""The directory of a run: what lies where, whether it may be written, and whether a resumed run is still the same run."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlora.checkpoint import latest_checkpoint

_VERSIONS = ("megatron-mlora", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "safetensors")
_DIGESTS = ("--model", "--data", "--eval-data")  # Settings of which a digest stands for the content.
_SAMPLED = 2**20  # bytes at either end of a file of weights


class Output:
    """The files under ``--output``.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.peft = path / "peft"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.plot = path / "loss.png"
        self.config = path / "config.json"

    def check(self, resume: bool) -> Path | None:
        """The checkpoint to resume from, or None for a new run.

        Raises:
            FileExistsError: a new run, and there is something in the directory.
            FileNotFoundError: a run to resume, and there is nothing to resume from.
            NotADirectoryError: the path is a file's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--output {self.path} is a file")
        if not resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise FileExistsError(
                    f"--output {self.path} exists and is not empty: give another one, or --resume to go on with it"
                )
            return None
        try:
            checkpoint = latest_checkpoint(self.checkpoints)
        except FileNotFoundError:
            raise FileNotFoundError(f"--resume: there is no checkpoint in {self.checkpoints}") from None
        if not self.config.is_file():
            raise FileNotFoundError(f"--resume: {self.config}, which says what the run used, is missing")
        return checkpoint

    def read_config(self) -> dict[str, Any]:
        """``config.json``.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
            if not isinstance(config["settings"], dict) or not isinstance(config["starts"], list):
                raise ValueError('"settings" and "starts" are not what they were')
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.config} is not as the trainer wrote it: {error!r}") from error
        return dict(config)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Make the directory and ``config.json`` in it, which appears whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.config.with_name(self.config.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(config, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.config)

    def check_visible(self) -> None:
        """Raises FileNotFoundError on a rank that does not see what rank 0 wrote."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.config} is not here: --output must be on storage that all hosts share")

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if a resumed run would not be the run that was started; what differs is named."""
        before = self.read_config()["settings"]
        now = json.loads(json.dumps(settings))
        changes = [
            _change(name, before.get(name), now.get(name))
            for name in dict.fromkeys([*now, *before])
            if now.get(name) != before.get(name)
        ]
        if changes:
            raise ValueError(f"--resume: the run in {self.path} was started with other settings: {'; '.join(changes)}")


def _change(name: str, before: Any, now: Any) -> str:
    if name in _DIGESTS:
        return f"{name} has other content" if before and now else f"{name} was{'' if before else ' not'} given"
    return f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


def versions() -> dict[str, str]:
    """Of Python and of every package that decides the numbers."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def model_digest(path: Path) -> str:
    """Of a Hugging Face directory: its ``config.json``, and names, sizes and either end of its files of weights.

    Enough to tell models and their fine-tuned versions apart without reading all of a large one.
    """
    total = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        total.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            total.update(weights.read(_SAMPLED))
            weights.seek(max(0, size - _SAMPLED))
            total.update(weights.read(_SAMPLED))
    return total.hexdigest()
