"""mlora's native checkpoints as an :class:`~mlora.conversion.state.AdapterState`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlora.adapter import SHARED
from mlora.checkpoint import CONFIG_FILE, INFO_FILE, PREFIX, checkpoints, latest_checkpoint, read_info
from mlora.conversion.peft_config import read_config
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, Report, natural_order
from parallel.storage import Reader

logger = logging.getLogger(__name__)


def is_native(path: Path) -> bool:
    """Whether ``path`` is a native checkpoint or a folder of them."""
    return (path / INFO_FILE).is_file() or bool(checkpoints(path))


def open_native(path: Path, report: Report) -> AdapterState:
    """The adapter of a native checkpoint, or of the newest in a folder of checkpoints (logged); problems go to ``report``.

    Raises:
        ValueError: a file is missing or damaged as a whole.
    """
    checkpoint = path if (path / INFO_FILE).is_file() else latest_checkpoint(path)
    if checkpoint != path:
        logger.info("%s holds %d checkpoints; reading the newest, %s", path, len(checkpoints(path)), checkpoint.name)
    info, reader = read_info(checkpoint), Reader(checkpoint)
    tensors = {
        key.removeprefix(PREFIX): _lazy(checkpoint, reader, key, *place)
        for key, place in reader.tensors(PREFIX).items()
    }
    modules, used = [], set()
    for projection in _projections(info, checkpoint / INFO_FILE):
        keys = _keys(tensors, projection)
        used |= {*keys}
        if missing := [key for key in keys if key not in tensors]:
            report(f"{checkpoint} lacks {missing[0]}")
            continue
        A, B = (tensors[key] for key in keys)
        if (ranks := (A.shape[0], B.shape[1])) != (projection["rank"],) * 2:
            report(f"{checkpoint}: {keys[0]} and {keys[1]} are of ranks {ranks}; {INFO_FILE} says {projection['rank']}")
            continue
        modules.append(AdapterModule(projection["hf_name"], projection["rank"], projection["scaling"], A, B))
    for key in sorted(tensors.keys() - used):
        report(f"{checkpoint} holds {key}, which no projection of its {INFO_FILE} accounts for")
    return AdapterState(
        source=checkpoint,
        format="mlora",
        layout=_layout(info),
        modules=tuple(sorted(modules, key=lambda module: natural_order(module.name))),
        full={},
        config=read_config(checkpoint / CONFIG_FILE),
    )


def _projections(info: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    fields = {"module": str, "part": str, "hf_name": str, "rank": int, "scaling": int | float}
    rows = info.get("projections")
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            raise ValueError(f"{path}: its projections are incomplete: {row}")
    return list(info["projections"])


def _lazy(checkpoint: Path, reader: Reader, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    def read() -> torch.Tensor:
        with reader:  # Closes the files when it is left, and opens them again when they are needed.
            return reader.tensor(key)

    return LazyTensor(key, checkpoint, shape, dtype, read)


def _keys(tensors: Mapping[str, LazyTensor], projection: Mapping[str, Any]) -> tuple[str, str]:
    module, part = projection["module"], projection["part"]
    shared = f"{module}.{SHARED}.lora_A"
    return shared if shared in tensors else f"{module}.{part}.lora_A", f"{module}.{part}.lora_B"


def _layout(info: Mapping[str, Any]) -> str:
    sizes = info.get("parallel", {})
    words = " x ".join(
        f"{short} {sizes.get(name, '?')}" for name, short in (("tensor", "TP"), ("pipeline", "PP"), ("data", "DP"))
    )
    return f"native checkpoint of iteration {info.get('iteration')}, saved at {words}"
