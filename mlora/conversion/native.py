"""mlora's native checkpoints as an :class:`~mlora.conversion.state.AdapterState`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mlora.config import decomposes
from mlora.conversion.peft_config import read_config
from mlora.conversion.state import AdapterModule, AdapterState, LazyTensor, Report, joined, natural_order
from mlora.description import (
    CONFIG_FILE,
    INFO_FILE,
    PREFIX,
    checkpoints,
    is_checkpoint,
    latest_checkpoint,
    read_info,
)
from mlora.names import EMBEDDING, SHARED
from parallel.reader import Reader

logger = logging.getLogger(__name__)


def is_native(path: Path) -> bool:
    """Whether ``path`` is a native checkpoint or a folder of them."""
    return is_checkpoint(path) or bool(checkpoints(path))


def open_native(path: Path, report: Report) -> AdapterState:
    """The adapter of a native checkpoint, or of the newest in a folder of checkpoints (logged); problems go to ``report``.

    Raises:
        ValueError: a file is missing or damaged as a whole.
    """
    checkpoint = path if is_checkpoint(path) else latest_checkpoint(path)
    if checkpoint != path:
        count = len(checkpoints(path))
        logger.info(
            "%s holds %d checkpoint%s; reading the newest, %s", path, count, "s" if count > 1 else "", checkpoint.name
        )
    info, reader = read_info(checkpoint), Reader(checkpoint)
    tensors = {
        key.removeprefix(PREFIX): _lazy(checkpoint, reader, key, *place)
        for key, place in reader.tensors(PREFIX).items()
    }
    config = info["lora"] if "lora" in info else read_config(checkpoint / CONFIG_FILE)
    uses_dora, has_start = bool(config.get("use_dora")), decomposes(config.get("init_lora_weights"))
    modules, used = [], set()
    for name, parts in _by_hf_module(_projections(info, checkpoint / INFO_FILE)).items():
        keys = [_keys(tensors, part, uses_dora) for part in parts]
        starts = [_start_keys(part) for part in keys] if has_start else []
        used |= {key for part in (*keys, *starts) for key in part}
        if missing := [key for part in (*keys, *starts) for key in part if key not in tensors]:
            report(f"{checkpoint} lacks {missing[0]}")
            continue
        try:
            modules.append(_module(name, parts, tensors, keys, starts))
        except ValueError as error:
            report(f"{checkpoint}: {error}")
    full = {}
    for module, name in _saved(info, checkpoint / INFO_FILE).items():
        key = f"{module}.weight"
        used.add(key)
        if key in tensors:
            full[f"{name}.weight"] = tensors[key]
        else:
            report(f"{checkpoint} lacks {key}")
    for key in sorted(tensors.keys() - used):
        report(f"{checkpoint} holds {key}, which nothing in its {INFO_FILE} accounts for")
    return AdapterState(
        source=checkpoint,
        format="mlora",
        layout=_layout(info),
        modules=tuple(sorted(modules, key=lambda module: natural_order(module.name))),
        full={name: full[name] for name in sorted(full, key=natural_order)},
        config=config,
    )


def _projections(info: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    fields = {"module": str, "part": str, "hf_name": str, "rank": int, "scaling": int | float}
    rows = info.get("projections")
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            raise ValueError(f"{path}: its projections are incomplete: {row}")
    return list(info["projections"])


def _saved(info: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Megatron module -> Hugging Face module of each weight that is saved whole."""
    rows = info.get("modules_to_save", [])
    for row in rows if isinstance(rows, list) else [None]:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("module", "hf_name")):
            raise ValueError(f"{path}: its modules saved whole are incomplete: {row}")
    return {row["module"]: row["hf_name"] for row in rows}


def _module(
    name: str,
    parts: list[dict[str, Any]],
    tensors: Mapping[str, LazyTensor],
    keys: Sequence[Sequence[str]],
    starts: Sequence[tuple[str, str]],
) -> AdapterModule:
    """A Hugging Face module from its projections, their keys and, if the adapter keeps its start, the keys of that.

    Raises:
        ValueError: the tensors are not those of one module.
    """
    As, Bs, *magnitudes = ([tensors[key] for key in same] for same in zip(*keys, strict=True))
    if problem := _misfit(name, parts, As, Bs, *magnitudes):
        raise ValueError(problem)
    rank, scaling = parts[0]["rank"], parts[0]["scaling"]
    magnitude = joined(magnitudes[0]) if magnitudes else None
    embedding = parts[0]["module"].rpartition(".")[2] == EMBEDDING
    module = AdapterModule(name, rank, scaling, As[0], joined(Bs), magnitude, embedding)
    if not starts:
        return module
    start = AdapterModule(name, rank, scaling, tensors[starts[0][0]], joined([tensors[key] for _, key in starts]))
    if (shape := start.weight_shape) != module.weight_shape or start.A.shape != module.A.shape:
        raise ValueError(f"{start.A.key} and {start.B.key} are for {list(shape)}, not {list(module.weight_shape)}")
    return _without_start(module, start)


def _by_hf_module(projections: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Name of each Hugging Face module -> its projections, in order of their rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for projection in sorted(projections, key=lambda projection: projection.get("hf_row", 0)):
        found.setdefault(projection["hf_name"], []).append(projection)
    return found


def _misfit(
    name: str,
    parts: list[dict[str, Any]],
    As: list[LazyTensor],
    Bs: list[LazyTensor],
    magnitudes: Sequence[LazyTensor] = (),
) -> str | None:
    """What keeps matrices, and DoRA's magnitudes, from being the ones of one Hugging Face module."""
    for B, magnitude in zip(Bs, magnitudes, strict=bool(magnitudes)):
        if magnitude.shape != B.shape[:1]:
            return f"{magnitude.key} has shape {list(magnitude.shape)}, not [{B.shape[0]}]"
    row = 0
    for part, A, B in zip(parts, As, Bs, strict=True):
        if (ranks := (A.shape[0], B.shape[1])) != (part["rank"],) * 2:
            return f"{A.key} and {B.key} are of ranks {ranks}; {INFO_FILE} says {part['rank']}"
        if part.get("hf_row", 0) != row or As[0] != A or part["scaling"] != parts[0]["scaling"]:
            return f"{len(parts)} projections are called {name} and do not make up one module"
        row += B.shape[0]
    return None


def _lazy(checkpoint: Path, reader: Reader, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    def read() -> torch.Tensor:
        with reader:  # Closes the files when it is left, and opens them again when they are needed.
            return reader.tensor(key)

    return LazyTensor(key, checkpoint, shape, dtype, read)


def _keys(tensors: Mapping[str, LazyTensor], projection: Mapping[str, Any], uses_dora: bool) -> tuple[str, ...]:
    """Of A, of B and, with DoRA, of the magnitudes."""
    module, part = projection["module"], projection["part"]
    shared = f"{module}.{SHARED}.lora_A"
    A = shared if shared in tensors else f"{module}.{part}.lora_A"
    return A, f"{module}.{part}.lora_B", *((f"{module}.{part}.lora_magnitude_vector",) if uses_dora else ())


def _start_keys(keys: Sequence[str]) -> tuple[str, str]:
    """Of A₀ and B₀, from those of A and B."""
    return f"{keys[0]}0", f"{keys[1]}0"


def _without_start(module: AdapterModule, start: AdapterModule) -> AdapterModule:
    """``B A - B₀ A₀`` as one term of twice the rank, ``[B, -B₀] [A; A₀]``."""
    B, B0 = module.B, start.B

    def beside() -> torch.Tensor:
        return torch.cat([B.load(), -B0.load()], dim=1)

    both = LazyTensor(f"{B.key} - {B0.key}", B.file, (B.shape[0], 2 * B.shape[1]), B.dtype, beside)
    return replace(module, rank=2 * module.rank, A=joined([module.A, start.A]), B=both)


def _layout(info: Mapping[str, Any]) -> str:
    sizes = info.get("parallel", {})
    words = " x ".join(
        f"{short} {sizes.get(name, '?')}" for name, short in (("tensor", "TP"), ("pipeline", "PP"), ("data", "DP"))
    )
    return f"native checkpoint of iteration {info.get('iteration')}, saved at {words}"
