"""What a checkpoint says of its adapter, and finding checkpoints by it; in one process.

Ours say it in two files beside the sharded ones. Those that Megatron's own training scripts save (:mod:`mlora.megatron`) say it
inside, in one object, because there nothing but the sharded state is ours to write.
"""

import json
import re
from pathlib import Path
from typing import Any

from mlora.config import LoraConfig
from parallel.errors import DamagedError
from parallel.reader import DIRECTORY, FORMAT_FILE, Reader, object_key, read_directory

CONFIG_FILE = "adapter_config.json"
INFO_FILE = "mlora.json"
PREFIX = "adapter."  # of the keys of an adapter's tensors
FORMAT = 1
ITERATION = re.compile(r"iter_(\d{7,})")
# What INFO_FILE holds elsewhere, and under "lora" what CONFIG_FILE does.
INSIDE = "mlora"


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    found = [path for path in Path(folder).glob("iter_*") if ITERATION.fullmatch(path.name) and is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")))


def latest_checkpoint(folder: str | Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    return found[-1]


def read_info(checkpoint: str | Path) -> dict[str, Any]:
    """What ``mlora.json`` says, or the object inside.

    Raises:
        FileNotFoundError: it is no checkpoint of mlora's.
        DamagedError: it cannot be read.
        ValueError: it was written in another format.
    """
    path = Path(checkpoint) / INFO_FILE
    if not path.is_file():
        return _read_inside(Path(checkpoint))
    try:
        info: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if info.get("format") != FORMAT:
        raise ValueError(f"{path}: format {info.get('format')!r}; this version reads format {FORMAT}")
    return info


def read_lora_config(checkpoint: str | Path) -> LoraConfig:
    """The configuration with which the adapter of a checkpoint is attached.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_info`, or it is not valid; the message names the file.
    """
    path = Path(checkpoint) / CONFIG_FILE
    if path.is_file():
        return LoraConfig.from_json(path)
    return LoraConfig.from_dict(read_info(checkpoint)["lora"], source=str(checkpoint))


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the directory of one whole adapter checkpoint, ours or of a Megatron script."""
    return (path / INFO_FILE).is_file() or _describes_itself(path)


def _read_inside(checkpoint: Path) -> dict[str, Any]:
    if not _describes_itself(checkpoint):
        raise FileNotFoundError(f"{checkpoint} is no mlora checkpoint: it has no {INFO_FILE}")
    with Reader(checkpoint) as reader:
        info: dict[str, Any] = dict(reader.object(object_key(INSIDE)))
    if info.get("format") != FORMAT:
        raise ValueError(f"{checkpoint}: format {info.get('format')!r}; this version reads format {FORMAT}")
    iteration = ITERATION.fullmatch(checkpoint.name)
    return info | {"iteration": int(iteration[1]) if iteration else 0}


def _describes_itself(folder: Path) -> bool:
    if not (folder / FORMAT_FILE).is_file():
        return False
    try:
        return object_key(INSIDE) in read_directory(folder / DIRECTORY).state_dict_metadata
    except (OSError, DamagedError):
        return False
