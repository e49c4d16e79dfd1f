"""Loaded models against Hugging Face's own, in float32: logits and per-token losses of every family at every layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from tests.ranks import run_ranks
from tests.tiny import KINDS, VOCAB, hf_logits, tokens, write_model

ONE = ParallelSizes()
LAYOUTS = [
    ONE,
    ParallelSizes(tensor=2),
    ParallelSizes(tensor=2, sequence_parallel=True),
    ParallelSizes(pipeline=2),
    ParallelSizes(pipeline=2, virtual_pipeline=2),
    ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True),
]
Floats = npt.NDArray[np.float32]


def forward(chunks: list[torch.nn.Module], ids: torch.Tensor, labels: torch.Tensor | None) -> list[torch.Tensor]:
    """The model's output for each row of ids [b, s], a micro batch each; on the last stage only."""

    def step(data: Iterator[int], model: Any) -> tuple[torch.Tensor, Any]:
        row = next(data)
        given = None if labels is None else labels[row : row + 1]
        return model(ids[row : row + 1], None, None, labels=given), lambda output, **_: output

    rows = range(len(ids))
    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(ids),
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def outputs_of(
    rank: int, paths: dict[str, Path], sizes: ParallelSizes, ids: torch.Tensor, labels: torch.Tensor
) -> dict[str, tuple[Floats, Floats] | None]:
    """Kind -> (this rank's columns of the logits [b, s, padded/t], losses [b, s]); None before the last stage."""
    results: dict[str, tuple[Floats, Floats] | None] = {}
    for kind, path in paths.items():
        chunks = build_model(Pretrained.open(path), sizes)
        with torch.no_grad():
            logits, losses = forward(chunks, ids, None), forward(chunks, ids, labels)
        results[kind] = (torch.cat(logits).numpy(), torch.cat(losses).numpy()) if logits else None
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, torch.Tensor]:
    return {kind: hf_logits(path, tokens()) for kind, path in models.items()}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_logits_and_losses_are_hugging_faces(
    models: dict[str, Path], references: dict[str, torch.Tensor], sizes: ParallelSizes
) -> None:
    ids, labels = tokens(), tokens(seed=2)
    world = sizes.tensor * sizes.pipeline
    last_stage = run_ranks(world, outputs_of, models, sizes, ids, labels, sizes=sizes)[-sizes.tensor :]
    for kind, expected in references.items():
        logits = torch.cat([torch.from_numpy(rank[kind][0]) for rank in last_stage], dim=-1)
        assert logits.shape[-1] % (128 * sizes.tensor) == 0
        assert (logits[..., :VOCAB] - expected).abs().max() < 1e-5 * expected.abs().max(), kind
        assert logits.argmax(-1).max() < VOCAB, kind
        losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="none")
        for rank in last_stage:
            assert (torch.from_numpy(rank[kind][1]) - losses).abs().max() < 1e-5, kind
