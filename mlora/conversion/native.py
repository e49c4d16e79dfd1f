"""mlora's native checkpoints as an :class:`~mlora.conversion.state.AdapterState`."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlora.adapter import SHARED
from mlora.checkpoint import CONFIG_FILE, INFO_FILE, checkpoints, latest_checkpoint, read_info
from mlora.conversion.peft_config import read_config
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, Report, natural_order
from mlora.export import read_native

logger = logging.getLogger(__name__)


def is_native(path: Path) -> bool:
    """Whether ``path`` is a native checkpoint or a folder of them."""
    return (path / INFO_FILE).is_file() or bool(checkpoints(path))


def open_native(path: Path, report: Report) -> AdapterState:
    """The adapter of a native checkpoint, or of the newest in a folder of checkpoints (logged); problems go to ``report``.

    Raises:
        ValueError: the files cannot be read.
    """
    checkpoint = path if (path / INFO_FILE).is_file() else latest_checkpoint(path)
    if checkpoint != path:
        logger.info("%s holds %d checkpoints; reading the newest, %s", path, len(checkpoints(path)), checkpoint.name)
    info, tensors = read_info(checkpoint), read_native(checkpoint)
    modules, used = [], set()
    for projection in info["projections"]:
        A, B = _keys(tensors, projection)
        used |= {A, B}
        if missing := [key for key in (A, B) if key not in tensors]:
            report(f"{checkpoint} lacks {missing[0]}")
            continue
        module = _module(checkpoint, projection, tensors, A, B)
        if (ranks := (module.A.shape[0], module.B.shape[1])) != (module.rank,) * 2:
            report(f"{checkpoint}: {A} and {B} are of ranks {ranks}; {INFO_FILE} says rank {module.rank}")
            continue
        modules.append(module)
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


def _keys(tensors: Mapping[str, torch.Tensor], projection: Mapping[str, Any]) -> tuple[str, str]:
    module, part = projection["module"], projection["part"]
    shared = f"{module}.{SHARED}.lora_A"
    return shared if shared in tensors else f"{module}.{part}.lora_A", f"{module}.{part}.lora_B"


def _module(
    checkpoint: Path, projection: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], A: str, B: str
) -> AdapterModule:
    lazy_A, lazy_B = (
        LazyTensor(key, checkpoint, tuple(tensors[key].shape), tensors[key].dtype, partial(_copy, tensors, key))
        for key in (A, B)
    )
    return AdapterModule(projection["hf_name"], projection["rank"], projection["scaling"], lazy_A, lazy_B)


def _copy(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    return tensors[key].clone(memory_format=torch.contiguous_format)


def _layout(info: Mapping[str, Any]) -> str:
    sizes = info["parallel"]
    return (
        f"native checkpoint of iteration {info['iteration']}, saved at TP {sizes['tensor']} x PP {sizes['pipeline']} "
        f"x DP {sizes['data']}"
    )
