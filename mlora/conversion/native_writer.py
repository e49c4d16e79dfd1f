"""A native checkpoint from an imported adapter, written in one process without ranks.

Beside what every native checkpoint has lies ``imported.json``: the adapter's own configuration and keys, so that exporting it gives
back what was imported.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mlora.conversion.importing import Import
from mlora.conversion.output import new_directory
from mlora.conversion.peft_config import read_config
from mlora.conversion.workers import one_thread
from mlora.description import CONFIG_FILE, FORMAT, INFO_FILE, PREFIX
from mlora.names import DEFAULT_ADAPTER
from parallel.errors import naming
from parallel.reader import Reader
from parallel.stream import write_stream

IMPORTED_FILE = "imported.json"


@dataclass(frozen=True)
class Original:
    """What ``imported.json`` keeps of a PEFT adapter: its configuration, and by module its keys for A, B and DoRA's magnitudes."""

    config: Mapping[str, Any]
    keys: Mapping[str, Sequence[str]]


def write_import(
    plan: Import,
    output: str | Path,
    *,
    replace: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write the native checkpoint ``output``, which appears when it is complete; memory holds one matrix at a time.

    Args:
        replace: replace an ``output`` that is a native checkpoint.
        progress: told the bytes of the tensors as they are done.

    Raises:
        FileExistsError: ``output`` exists, and may not be replaced.
        ValueError: a tensor is not finite.
    """

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in plan.matrices.items():
            yield PREFIX + name, tensor.load()
            progress(tensor.nbytes)

    keep = (plan.source, plan.base.path)
    with new_directory(output, replace=replace, marker=INFO_FILE, keep=keep) as folder, naming(folder), one_thread():
        write_stream(tensors(), folder)
        for name, content in (
            (CONFIG_FILE, plan.config.to_dict()),
            (INFO_FILE, _info(plan)),
            (IMPORTED_FILE, {"config": plan.original, "keys": plan.keys}),
        ):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _check_written(folder, plan)


def _info(plan: Import) -> dict[str, Any]:
    """What :func:`mlora.checkpoint.save_checkpoint` would say of the model with this adapter attached, on one rank."""
    rows = [
        {
            "module": target.projection.module,
            "part": target.projection.part,
            "hf_name": target.projection.hf_name,
            "hf_row": plan.base.family.rows(plan.base.architecture, target.projection.module, target.projection.part)[
                0
            ],
            "rank": target.rank,
            "scaling": plan.config.scaling(target.rank, target.alpha),
        }
        for target in plan.targets
    ]
    return {
        "format": FORMAT,
        "adapter_name": DEFAULT_ADAPTER,
        "iteration": 0,
        "parallel": {"tensor": 1, "pipeline": 1, "data": 1},
        "base": {"path": str(plan.base.path), "model_type": plan.base.family.model_type},
        "layers": plan.base.architecture.counts["layer"],
        "projections": rows,
        "modules_to_save": [
            {"module": module, "hf_name": plan.base.family.hf_name(module)}
            for module in sorted(name.removesuffix(".weight") for name in plan.matrices if name.endswith(".weight"))
        ],
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "training": False,
    }


def _check_written(folder: Path, plan: Import) -> None:
    expected = {PREFIX + name: (tensor.shape, tensor.dtype) for name, tensor in plan.matrices.items()}
    written = Reader(folder).tensors()
    for key in sorted(expected.keys() | written.keys()):
        if expected.get(key) != written.get(key):
            raise ValueError(f"{folder}: {key} is {written.get(key)}, imported {expected.get(key)}")


def read_original(checkpoint: Path) -> Original | None:
    """What was imported into a native checkpoint; None for one that was trained.

    Raises:
        ValueError: ``imported.json`` is damaged.
    """
    path = checkpoint / IMPORTED_FILE
    if not path.is_file():
        return None
    values = read_config(path)
    if not all(isinstance(values.get(name), dict) for name in ("config", "keys")):
        raise ValueError(f"{path} lacks the configuration or the keys of the adapter that was imported")
    return Original(values["config"], values["keys"])
