"""Native adapter checkpoints: sharded files that any layout saves and any other loads.

A checkpoint is a directory of Megatron's ``torch_dist`` files (:mod:`parallel.storage`) with two JSON files beside:

| what | where |
|---|---|
| adapter parameters, whole, under ``adapter.<global Megatron module>.<projection>.lora_A`` | sharded files |
| weights of ``modules_to_save``, whole, under ``adapter.<global Megatron module>.weight`` | sharded files |
| for resuming: optimizer, scheduler, random states, the caller's training state | sharded files |
| :class:`~mlora.config.LoraConfig` | ``adapter_config.json`` |
| iteration, layout at save, projections, modules saved whole, base model | ``mlora.json`` |

It is written under a temporary name, checked and then renamed, so a directory ``iter_0000010`` is always whole.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from mlora.adapter import LinearAdapter
from mlora.attach import banks, factors, linear_adapters
from mlora.config import LoraConfig
from mlora.copies import copied_modules
from mlora.description import CONFIG_FILE, FORMAT, INFO_FILE, PREFIX, checkpoints, read_info
from mlora.factor import Factor
from mlora.folder import complete, make_empty, remove
from mlora.names import DEFAULT_ADAPTER
from parallel.optimizer import check_settings, saveable
from parallel.optimizer import load as load_optimizer
from parallel.random import random_states, restore_random_states
from parallel.reader import Reader
from parallel.stages import as_chunks, union_over_stages
from parallel.storage import read, read_pieces, write
from parallel.together import on_rank_zero, together

logger = logging.getLogger(__name__)

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
    """The adapter's parameters and what it keeps of its start on this rank, as Megatron's ``ShardedTensor``s by global name."""
    return sharded_tensors(_saved(model, adapter_name))


def sharded_tensors(factors: Iterable[Factor]) -> dict[str, ShardedTensor]:
    """Where these parameters of this rank stand in a checkpoint."""
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
        for factor in factors
    }


def _saved(model: Model, adapter_name: str) -> Iterator[Factor]:
    yield from factors(model, adapter_name)
    for adapter in linear_adapters(model, adapter_name):
        yield from adapter.start()


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
        keep_last: after the save, remove all but this many of the checkpoints up to this iteration.

    Returns:
        The checkpoint's directory.

    Raises:
        FileExistsError: there is a checkpoint of this iteration.
        OSError: a rank could not write.
        ValueError: a parameter is not finite (named); ``training.state`` is more than tensors and plain values.

    Every error is raised on every rank alike and leaves whole checkpoints in ``folder``: the earlier ones, and, if it came while
    old ones were removed, the new one.
    """
    if iteration < 0 or (keep_last is not None and keep_last < 1):
        raise ValueError(f"iteration is {iteration} and keep_last {keep_last}; they must be at least 0 and 1")
    final = Path(folder) / f"iter_{iteration:07d}"
    partial = final.with_name(final.name + ".partial")
    adapters = adapter_sharded_state(model, adapter_name)
    _check_finite({name: piece.data for name, piece in adapters.items()}, "not saved")
    info = describe(model, adapter_name, iteration, base) | {"training": training is not None}
    texts = {CONFIG_FILE: _json(adapter_config(model, adapter_name).to_dict()), INFO_FILE: _json(info)}
    state = {"adapter": adapters, **(_training_state(training, adapters, is_loading=False) if training else {})}
    on_rank_zero(lambda: make_empty(partial, final))
    try:
        write(state, partial)
        on_rank_zero(lambda: complete(partial, final, texts))
    except Exception:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep_last is not None:
        on_rank_zero(lambda: _remove_earlier(final, keep_last))
    return final


def _remove_earlier(newest: Path, keep_last: int) -> None:
    """Of the checkpoints up to ``newest``, remove all but the last ones."""
    found = checkpoints(newest.parent)
    remove(found[: found.index(newest) + 1][:-keep_last])


def load_checkpoint(
    checkpoint: str | Path, model: Model, *, adapter_name: str = DEFAULT_ADAPTER, training: Training | None = None
) -> dict[str, Any]:
    """Load an adapter, and with ``training`` its optimizer and scheduler, from a checkpoint saved at any layout.

    The adapter must be attached already, with the same targets, ranks and scalings. Random states are restored when the layout is
    the one that saved them. Without ``training``, load before the optimizer is made: it may keep float32 copies of the parameters.

    Returns:
        The training state that was saved; empty without ``training``.

    Raises:
        FileNotFoundError: it is no checkpoint of mlora's.
        DamagedError: a file is missing or damaged.
        ValueError: the adapter's keys, shapes or scalings differ from the model's, or a tensor is not finite; the optimizer or the
            scheduler has other settings. What differs is named.

    Every error is raised on every rank alike, before anything in the model, the optimizer or the scheduler has changed.
    """
    checkpoint = Path(checkpoint)
    info = together(lambda: read_info(checkpoint))
    adapters = adapter_sharded_state(model, adapter_name)
    _check_same(adapters, together(lambda: _stored(checkpoint)), checkpoint)
    _check_scalings(describe(model, adapter_name, 0, None)["projections"], info["projections"], checkpoint)
    state: dict[str, Any] = {"adapter": adapters}
    if training:
        if not info["training"]:
            raise ValueError(f"{checkpoint} holds an adapter without training state; it cannot be resumed from")
        state |= _training_state(training, adapters, is_loading=True)
        if info["parallel"] != _parallel():
            del state["random"]
    loaded = together(lambda: read(state, checkpoint) if training else read_pieces(state, checkpoint))
    weights = loaded.get("adapter", {})  # A stage may hold none of the adapter.
    _check_finite(weights, f"{checkpoint} is not loaded")
    if training:
        together(lambda: check_settings(training.optimizer, training.scheduler, loaded))
    with torch.no_grad():
        for factor in _saved(model, adapter_name):
            factor.parameter.copy_(weights[PREFIX + factor.name])
    if not training:
        return {}
    load_optimizer(training.optimizer, loaded["optimizer"])
    training.scheduler.load_state_dict(loaded["scheduler"])
    if "random" in loaded:
        restore_random_states(loaded["random"])
    else:
        logger.info(
            "resuming at another layout than TP %(tensor)d x PP %(pipeline)d x DP %(data)d: random states start anew",
            info["parallel"],
        )
    return dict(loaded["state"])


def _training_state(training: Training, adapters: dict[str, ShardedTensor], is_loading: bool) -> dict[str, Any]:
    with saveable(training.optimizer):
        optimizer = training.optimizer.sharded_state_dict(adapters, is_loading=is_loading, metadata=_OPTIMIZER_METADATA)
    places = tuple(_parallel().values())
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    return {
        "optimizer": optimizer,
        "scheduler": training.scheduler.state_dict(),
        "random": ShardedObject("random", random_states(), places, ranks),
        "state": dict(training.state),
    }


def _parallel() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def describe(model: Model, adapter_name: str, iteration: int, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of ``mlora.json``, on every stage alike. A collective of the pipeline group."""
    adapters: list[LinearAdapter] = [a for bank in banks(model) if (a := bank.adapter(adapter_name)) is not None]
    rows = {
        json.dumps([a.layout.name, part, a.hf_names[part], a.hf_rows[part], a.ranks[part], a.scaling[part]])
        for a in adapters
        for part in a.parts
    }
    names = ("module", "part", "hf_name", "hf_row", "rank", "scaling")
    projections = [dict(zip(names, json.loads(row), strict=True)) for row in sorted(union_over_stages(rows))]
    wholes = {f"{bank.name} {bank.hf_name}" for _, bank in copied_modules(model) if adapter_name in bank.adapters}
    saved = [dict(zip(("module", "hf_name"), row.split(), strict=True)) for row in sorted(union_over_stages(wholes))]
    return {
        "format": FORMAT,
        "adapter_name": adapter_name,
        "iteration": iteration,
        "parallel": _parallel(),
        "base": dict(base or {}),
        "layers": getattr(getattr(as_chunks(model)[0], "config", None), "num_layers", 0),
        "projections": projections,
        "modules_to_save": saved,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def _check_finite(tensors: Mapping[str, torch.Tensor], failing: str) -> None:
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist() if tensors else []
    bad = {name.removeprefix(PREFIX) for name, good in zip(tensors, finite, strict=True) if not good}
    named = sorted(_union(bad, dist.group.WORLD))
    if named:
        raise ValueError(f"{failing}: {len(named)} parameters are not finite: {', '.join(named[:3])}")


def _stored(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    with Reader(checkpoint) as reader:
        return reader.tensors(PREFIX)


def _check_same(
    adapters: Mapping[str, ShardedTensor],
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    checkpoint: Path,
) -> None:
    # Over the whole model, because ranks of one stage hold different keys where a projection has fewer rows than ranks.
    group = parallel_state.get_model_parallel_group()
    shapes = dict(_union({(name, tuple(tensor.global_shape)) for name, tensor in adapters.items()}, group))
    problems = []
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in stored:
            problems.append(f"it lacks {name}")
        elif name not in shapes:
            problems.append(f"it holds {name}, which the adapter has not")
        elif stored[name][0] != shapes[name]:
            problems.append(f"{name} has shape {list(stored[name][0])}, in the adapter {list(shapes[name])}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{checkpoint} does not fit the attached adapter: {'; '.join(problems[:5])}{more}")
    for theirs, ours in {(stored[name][1], tensor.dtype) for name, tensor in adapters.items()}:
        if theirs != ours:
            logger.warning("%s holds the adapter in %s; it is loaded into %s", checkpoint, theirs, ours)


def _check_scalings(
    attached: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], checkpoint: Path
) -> None:
    """Of projections that are known to be the same: with another scaling the same parameters are another function."""
    theirs = {(row["module"], row["part"]): row["scaling"] for row in saved}
    for row in attached:
        scaling = theirs.get((row["module"], row["part"]), row["scaling"])
        if not math.isclose(scaling, row["scaling"], rel_tol=1e-12):  # Converters compute it another way.
            raise ValueError(
                f"{checkpoint} holds an adapter with a scaling of {scaling} at {row['module']}.{row['part']}; the attached one has "
                f"{row['scaling']}: attach it with the same lora_alpha, alpha_pattern and use_rslora"
            )


def _union(values: set[Any], group: dist.ProcessGroup | None) -> set[Any]:
    gathered: list[set[Any] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, values, group=group)
    return set().union(*(part for part in gathered if part))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
