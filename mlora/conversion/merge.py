"""Adapters into the weights of their base: a new model directory, written as a stream.

    W' = round(W + Σ weight · scaling · B A)            with DoRA: W' = round(m / ||W + scaling · B A|| · (W + scaling · B A))

The arithmetic is float32 (float64 where a tensor is), with one rounding, to the dtype of the result. Memory is that of a block of
rows for each thread and of one module's factors, whatever the size of a shard or of a tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlora.conversion.base import CONFIG_FILE, BaseModel
from mlora.conversion.beside import write_beside
from mlora.conversion.output import new_directory
from mlora.conversion.plan import plan
from mlora.conversion.shards import Progress, ShardWriter
from mlora.conversion.state import AdapterState
from mlora.conversion.verify import Verification, verify
from mlora.conversion.workers import Workers


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        changed: modules whose weight differs from the base's.
        unchanged: modules whose adapter is zero.
        unties: the output layer, tied to the embedding in the base, has become a parameter of its own.
        verification: what reading the result back showed, if that was asked for.
    """

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    unties: bool
    verification: Verification | None


def merge(
    base: str | Path,
    adapters: Sequence[tuple[AdapterState, float]],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    replace: bool = False,
    device: torch.device | str = "cpu",
    verified: bool = False,
    progress: Progress = lambda size: None,
) -> MergeReport:
    """Write ``base`` with ``adapters`` merged as the model directory ``output``: same shards, index and files beside.

    Args:
        base: a Hugging Face directory with safetensors weights.
        adapters: from :func:`~mlora.conversion.open_adapter`, each with the weight of its delta in the sum.
        output: appears when it is complete and on disk.
        dtype: of the result's floating-point tensors; None for each tensor's own in the base.
        replace: replace an ``output`` that is a model directory.
        device: of the arithmetic.
        verified: read the result back before it appears, and hold W' - W against the adapters.
        progress: told the bytes of the base as they are done; twice as many with ``verified``.

    Raises:
        FileExistsError: ``output`` exists, and may not be replaced.
        ValueError: the adapters do not fit the base; a merged value is not finite; rounding loses all of a module's delta, or
            the result equals the base; the result is not what it must be. The module is named, and nothing is left behind.
    """
    model = BaseModel(base)
    todo = plan(model, adapters)
    sources = tuple(state.source for state, _ in adapters)
    with new_directory(output, replace=replace, marker=CONFIG_FILE, keep=(model.path, *sources)) as partial:
        with Workers() as workers:
            writer = ShardWriter(model, todo, dtype, torch.device(device), workers, progress)
            for name in model.files:
                writer.write(name, partial / name)
        if not writer.changed:
            raise ValueError("the result equals the base: the adapters are zero in every module")
        write_beside(model, writer.layouts, dtype, todo.unties, partial)
        found = verify(model, todo, BaseModel(partial), torch.device(device), progress) if verified else None
    return MergeReport(tuple(writer.changed), tuple(writer.unchanged), todo.unties, found)
