"""The directory of a run: what lies where, whether it may be written, and whether a resumed run is still the same run."""

import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlora_tools.resumption import Resumption
from mlora_tools.run_files import RunFiles
from mlora_tools.text_file import partial_of, write_text
from parallel.errors import naming

logger = logging.getLogger(__name__)

_VERSIONS = ("megatron-mlora", "torch", "megatron-core", "transformers", "tokenizers", "numpy", "safetensors")
_DIGESTS = (
    "--model",
    "--data",
    "--eval-data",
    "--reference-adapter",
)  # Settings of which a digest stands for the content.
_SAMPLED = 2**20  # bytes at either end of a file of weights


class Output(RunFiles):
    """The directory of a run that is to be written.

    Attributes:
        resumption: the checkpoints that are there.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.resumption = Resumption(self.checkpoints)

    def check(self, resume: bool, must_exist: bool = False) -> Path | None:
        """The checkpoint to resume from, or None for a new run, also one that was stopped before it had a checkpoint.

        Args:
            resume: go on with what is there.
            must_exist: which has to be a checkpoint.

        Raises:
            FileExistsError: a new run, and there is something in the directory; a run to resume, and what is there is none.
            FileNotFoundError: there is nothing to resume from, where that is demanded, or no ``config.json`` to it.
            NotADirectoryError: the path is a file's.
            OSError: it cannot be written.
            DamagedError: there are checkpoints, and none of them is whole.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"--output {self.path} is a file")
        self._check_writable()
        # The first file of a run is all that a start leaves which was killed while it wrote that.
        has_content = self.path.exists() and any(path != partial_of(self.config) for path in self.path.iterdir())
        if not resume:
            if has_content:
                raise FileExistsError(
                    f"--output {self.path} exists and is not empty: give another one, or --resume to go on with it"
                )
            return None
        checkpoint = self.resumption.newest()
        if checkpoint is None and must_exist:
            raise FileNotFoundError(f"--resume: there is no checkpoint in {self.checkpoints}")
        if checkpoint is not None and not self.config.is_file():
            raise FileNotFoundError(f"--resume: {self.config}, which says what the run used, is missing")
        if checkpoint is None and has_content and not self.config.is_file():
            raise FileExistsError(
                f"--resume: {self.path} is not empty, and what is in it is no run: give another --output"
            )
        if checkpoint is None:
            logger.warning("nothing to resume in %s: the run starts at iteration 0", self.path)
        return checkpoint

    def _check_writable(self) -> None:
        """Make a file, and the directories that it needs, and take them away again: reading a model may take minutes."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with naming(self.path), tempfile.TemporaryFile(dir=self.path):
            pass
        for path in missing:
            path.rmdir()

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
        write_json(self.config, config)

    def check_visible(self) -> None:
        """Raises FileNotFoundError on a rank that does not see what rank 0 wrote."""
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.config} is not here: --output must be on storage that all hosts share")

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if a resumed run would not be the run that was started, if one was; what differs is named."""
        if not self.config.is_file():
            return
        before = self.read_config()["settings"]
        now = json.loads(json.dumps(settings))
        changes = [
            _change(name, before.get(name), now.get(name))
            for name in dict.fromkeys([*now, *before])
            if now.get(name) != before.get(name)
        ]
        if changes:
            raise ValueError(f"--resume: the run in {self.path} was started with other settings: {'; '.join(changes)}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that appears whole.

    Raises:
        OSError: it cannot be written; it is named.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")


def _change(name: str, before: Any, now: Any) -> str:
    if name in _DIGESTS:
        return f"{name} has other content" if before and now else f"{name} was{'' if before else ' not'} given"
    derived = " (without the option: --train-iters)" if name == "--lr-decay-iters" else ""
    return f"{name} was {json.dumps(before)}, is {json.dumps(now)}{derived}"


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
