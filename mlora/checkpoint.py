"""Native adapter checkpoints: sharded files that any layout saves and any other loads.

A checkpoint is a directory that ``megatron.core.dist_checkpointing`` (``torch_dist``) wrote, with two JSON files beside:

| what | where |
|---|---|
| adapter matrices, whole, under ``adapter.<global Megatron module>.<projection>.lora_A`` | sharded files |
| for resuming: optimizer, scheduler, random states, the caller's training state | sharded files, common.pt |
| :class:`~mlora.config.LoraConfig` | ``adapter_config.json`` |
| iteration, layout at save, projections, base model | ``mlora.json`` |

It is written under a temporary name and renamed when complete, so a directory ``iter_0000010`` is always whole.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from mlora.adapter import LinearAdapter
from mlora.attach import DEFAULT_ADAPTER, banks, factors
from mlora.config import LoraConfig
from mlora.names import hf_module_name
from parallel.optimizer import load as load_optimizer
from parallel.optimizer import saveable
from parallel.random import random_states, restore_random_states
from parallel.stages import as_chunks, union_over_stages

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
INFO_FILE = "mlora.json"
PREFIX = "adapter."
_FORMAT = 1
_ITERATION = re.compile(r"iter_(\d{7,})")
# The optimizer's layout in the file: one tensor a parameter, so that it loads at any layout.
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

Model = torch.nn.Module | Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Training:
    """What resuming needs besides the adapter. Optimizer and scheduler are Megatron's; ``state`` is the caller's plain data."""

    optimizer: Any
    scheduler: Any
    state: Mapping[str, Any]


def adapter_sharded_state(model: Model, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, ShardedTensor]:
    """The adapter's parameters on this rank as Megatron's ``ShardedTensor``s, by global name."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return {
        PREFIX + factor.name: ShardedTensor(
            key=PREFIX + factor.name,
            data=factor.parameter,
            dtype=factor.parameter.dtype,
            local_shape=tuple(factor.parameter.shape),
            global_shape=factor.shape,
            global_offset=factor.offset,
            axis_fragmentations=None,  # The pieces may differ in size: query groups need not divide by the ranks.
            replica_id=(0, tensor_rank if factor.replicated else 0, data_rank),
        )
        for factor in factors(model, adapter_name)
    }


def adapter_config(model: Model, adapter_name: str = DEFAULT_ADAPTER) -> LoraConfig:
    """The configuration with which an adapter was made, on every stage, also on one that holds none of it."""
    adapters = [adapter for bank in banks(model) if (adapter := bank.adapter(adapter_name)) is not None]
    found = union_over_stages({json.dumps(adapter.config.to_dict(), sort_keys=True) for adapter in adapters})
    if len(found) != 1:
        raise ValueError(f"adapter {adapter_name!r} has {len(found)} configurations over the stages; expected one")
    return LoraConfig.from_dict(json.loads(found.pop()))


def save_checkpoint(
    folder: str | Path,
    model: Model,
    *,
    iteration: int = 0,
    adapter_name: str = DEFAULT_ADAPTER,
    training: Training | None = None,
    base: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
) -> Path:
    """Save an adapter as ``folder/iter_0000010``. Every rank calls it; the folder is on storage that all ranks share.

    Args:
        folder: that holds the checkpoints of one run.
        model: this rank's chunks.
        iteration: names the checkpoint.
        training: to resume from it later.
        base: plain facts of the base model for the exporters: ``model_type``, ``path``.
        keep_last: after the save, remove all but this many newest checkpoints.

    Returns:
        The checkpoint's directory.

    Raises:
        FileExistsError: there is a checkpoint of this iteration.
        ValueError: a parameter is not finite (named), on every rank alike.
    """
    final = Path(folder) / f"iter_{iteration:07d}"
    partial = final.with_name(final.name + ".partial")
    adapters = adapter_sharded_state(model, adapter_name)
    _check_finite(adapters)
    info = _info(model, adapter_name, iteration, base)
    config = adapter_config(model, adapter_name)
    _on_rank_zero(lambda: _make_empty(partial, final))
    state = {"adapter": adapters, **(_training_state(training, adapters, is_loading=False) if training else {})}
    dist_checkpointing.save(state, str(partial))
    _on_rank_zero(lambda: _complete(partial, final, config, info, keep_last))
    return final


def load_checkpoint(
    checkpoint: str | Path, model: Model, *, adapter_name: str = DEFAULT_ADAPTER, training: Training | None = None
) -> dict[str, Any]:
    """Load an adapter, and with ``training`` its optimizer and scheduler, from a checkpoint saved at any layout.

    The adapter must be attached already, with the same targets and ranks. Random states are restored when the layout is the
    one that saved them.

    Returns:
        The training state that was saved; empty without ``training``.

    Raises:
        ValueError: the checkpoint's adapter differs from the model's: keys or shapes are named, and nothing is changed.
    """
    checkpoint = Path(checkpoint)
    info = read_info(checkpoint)
    adapters = adapter_sharded_state(model, adapter_name)
    _check_same(adapters, checkpoint)
    state: dict[str, Any] = {"adapter": adapters}
    if training:
        if not info["training"]:
            raise ValueError(f"{checkpoint} holds an adapter without training state; it cannot be resumed from")
        state |= _training_state(training, adapters, is_loading=True)
        if info["parallel"] != _parallel():
            del state["random"]
    loaded = dist_checkpointing.load(state, str(checkpoint))
    with torch.no_grad():
        for factor in factors(model, adapter_name):
            factor.parameter.copy_(loaded["adapter"][PREFIX + factor.name])
    if not training:
        return {}
    load_optimizer(training.optimizer, loaded["optimizer"])
    training.scheduler.load_state_dict(loaded["scheduler"])
    if "random" in loaded:
        restore_random_states(loaded["random"])
    else:
        logger.info("resuming at another layout than %s: random states start anew", info["parallel"])
    return dict(loaded["state"])


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    found = [
        path for path in Path(folder).glob("iter_*") if _ITERATION.fullmatch(path.name) and (path / INFO_FILE).is_file()
    ]
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
    """What ``mlora.json`` says.

    Raises:
        FileNotFoundError: it is no checkpoint of mlora's.
        ValueError: it was written by a later format.
    """
    path = Path(checkpoint) / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is no mlora checkpoint: it has no {INFO_FILE}")
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if info.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {info.get('format')!r}; this version reads format {_FORMAT}")
    return info


def _training_state(training: Training, adapters: dict[str, ShardedTensor], is_loading: bool) -> dict[str, Any]:
    with saveable(training.optimizer):
        optimizer = training.optimizer.sharded_state_dict(adapters, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
    sizes = _parallel()
    tensor, pipeline = sizes["tensor"], sizes["pipeline"]
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    random = ShardedObject(
        "random", random_states(), (tensor, pipeline), ranks, replica_id=parallel_state.get_data_parallel_rank()
    )
    return {
        "optimizer": optimizer,
        "scheduler": training.scheduler.state_dict(),
        "random": random,
        "state": dict(training.state),
    }


def _parallel() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def _info(model: Model, adapter_name: str, iteration: int, base: Mapping[str, Any] | None) -> dict[str, Any]:
    adapters: list[LinearAdapter] = [a for bank in banks(model) if (a := bank.adapter(adapter_name)) is not None]
    rows = {
        json.dumps([a.layout.name, part, hf_module_name(a.layout.name, part), a.ranks[part], a.scaling[part]])
        for a in adapters
        for part in a.parts
    }
    names = ("module", "part", "hf_name", "rank", "scaling")
    projections = [dict(zip(names, json.loads(row), strict=True)) for row in sorted(union_over_stages(rows))]
    return {
        "format": _FORMAT,
        "adapter_name": adapter_name,
        "iteration": iteration,
        "parallel": _parallel(),
        "base": dict(base or {}),
        "layers": getattr(getattr(as_chunks(model)[0], "config", None), "num_layers", 0),
        "projections": projections,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def _check_finite(adapters: Mapping[str, ShardedTensor]) -> None:
    bad = [name for name, tensor in adapters.items() if not torch.isfinite(tensor.data).all()]  # type: ignore[arg-type]
    everywhere: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, bad)
    named = sorted({name for part in everywhere for name in part or []})
    if named:
        raise ValueError(f"not saved: {len(named)} parameters are not finite, first {named[0]}")


def _check_same(adapters: Mapping[str, ShardedTensor], checkpoint: Path) -> None:
    stored = {
        name: tuple(tensor.global_shape)
        for name, tensor in dist_checkpointing.load_tensors_metadata(str(checkpoint)).items()
        if name.startswith(PREFIX)
    }
    ours = union_over_stages({f"{name} {list(tensor.global_shape)}" for name, tensor in adapters.items()})
    theirs = {f"{name} {list(shape)}" for name, shape in stored.items()}
    # Ranks of the same stage hold different keys where a projection has fewer rows than ranks; the file has them all.
    group = parallel_state.get_tensor_model_parallel_group()
    gathered: list[set[str] | None] = [None] * group.size()
    dist.all_gather_object(gathered, ours, group=group)
    ours = set().union(*(part for part in gathered if part))
    if ours != theirs:
        missing, unknown = sorted(ours - theirs), sorted(theirs - ours)
        raise ValueError(
            f"{checkpoint} does not fit the attached adapter: "
            f"{len(missing)} missing {missing[:3]}, {len(unknown)} not expected {unknown[:3]}"
        )


def _on_rank_zero(work: Callable[[], None]) -> None:
    """Do file work on rank 0; an error there is raised on every rank, so that none waits for it."""
    problem: list[BaseException | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            problem[0] = error
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


def _make_empty(partial: Path, final: Path) -> None:
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _complete(partial: Path, final: Path, config: LoraConfig, info: dict[str, Any], keep_last: int | None) -> None:
    info["training"] = (partial / "common.pt").is_file() and "state" in dist_checkpointing.load_common_state_dict(
        str(partial)
    )
    for name, content in ((CONFIG_FILE, config.to_dict()), (INFO_FILE, info)):
        (partial / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        sync(path)
    os.rename(partial, final)
    sync(final.parent)
    if keep_last is not None:
        for old in checkpoints(final.parent)[:-keep_last]:
            shutil.rmtree(old)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
