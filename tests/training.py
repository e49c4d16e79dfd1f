"""Whole training runs on tiny Hugging Face models: what is trained, on which samples, and what is recorded of it.

:func:`train` is a rank's share of a run on Megatron; :mod:`tests.peft_oracle` does the same run with Hugging Face PEFT alone.
Both records become a :class:`Run`, whose parts :func:`errors` compares one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

import mlora
from mlora import LoraConfig
from mlora.attach import banks, factors
from mlora.copies import copied_modules
from mlora.embedding import EmbeddingAdapter
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.names import SHARED
from mlora.pretrained import Pretrained
from mlora.sft.batches import BatchPlan
from mlora.sft.feed import Feed
from mlora.sft.packing import Rows, packed_rows, single_rows
from mlora.sft.samples import Sample
from mlora.train import OptimizerSettings, Trainer
from parallel.sizes import ParallelSizes
from tests.gpt import Pieces, pieces, whole
from tests.tiny import VOCAB, tokens

LENGTH, ROWS = 24, 8  # of a row in tokens, of a global batch in rows
PADDING = 7  # a token that samples hold too


@dataclass(frozen=True)
class Layout:
    """A world, how it is divided, and rows in a micro batch."""

    world: int
    sizes: ParallelSizes
    micro_batch_size: int


LAYOUTS = {
    "TP1": Layout(1, ParallelSizes(), 4),
    "TP2": Layout(2, ParallelSizes(tensor=2), 8),
    "TP2+SP": Layout(2, ParallelSizes(tensor=2, sequence_parallel=True), 4),
    "PP2": Layout(2, ParallelSizes(pipeline=2), 2),
    "PP2xVPP2": Layout(2, ParallelSizes(pipeline=2, virtual_pipeline=2), 2),
    "TP2xPP2+SP": Layout(4, ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True), 2),
    "DP2": Layout(2, ParallelSizes(), 1),
    "TP2xDP2": Layout(4, ParallelSizes(tensor=2), 2),
}
# The schedule is not at its end after ten steps, and every step is clipped.
SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 3,
    "decay_iters": 12,
    "decay_style": "cosine",
    "weight_decay": 0.1,
    "clip_grad": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained and how.

    Attributes:
        kind: of the model, one of ``tests.tiny.KINDS``.
        settings: what differs from ``SETTINGS``.
        packed: rows hold several samples.
        overrides: of Megatron's configuration.
    """

    kind: str = "llama"
    lora: LoraConfig
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 5
    packed: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizer(self) -> OptimizerSettings:
        return OptimizerSettings(**SETTINGS | self.settings)


@dataclass
class Run:
    """A run's numbers: of every step, and of the whole model. Weights are under PEFT's keys."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    initial: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    logits_before: torch.Tensor
    logits_after: torch.Tensor


@dataclass
class Share:
    """What one rank knows of a run. Weights are pieces under Megatron's names; ``names`` has those under PEFT's keys, in order of
    their rows."""

    steps: list[tuple[float, float, float]]
    names: dict[str, list[str]]
    initial: Pieces
    gradients: Pieces
    final: Pieces
    logits_before: torch.Tensor
    logits_after: torch.Tensor
    optimizer_elements: int


def samples(packed: bool) -> list[Sample]:
    """Random samples, about half of their tokens targets: up to as long as a row, or short ones to pack."""
    count, longest = (60, LENGTH // 2) if packed else (20, LENGTH + 1)
    random = np.random.default_rng(5)
    made = []
    for length in random.integers(3, longest + 1, count):
        is_target = random.random(length) < 0.5
        is_target[0], is_target[-1] = False, True
        made.append(Sample(random.integers(0, VOCAB, length).astype(np.int32), is_target))
    return made


def rows(packed: bool) -> Rows:
    """The rows of the data."""
    return (packed_rows if packed else single_rows)(samples(packed), LENGTH, PADDING)


def plan(data: Rows) -> BatchPlan:
    """Which rows are in which global batch."""
    return BatchPlan(num_rows=len(data), global_batch_size=ROWS, seed=11)


def global_batch(packed: bool, iteration: int) -> list[Sample]:
    """All samples of a global batch."""
    data, made = rows(packed), samples(packed)
    return [made[sample] for row in plan(data).rows(iteration) for sample in data.bins[row]]


def adapt(path: Path, case: Case, sizes: ParallelSizes) -> list[torch.nn.Module]:
    """This rank's chunks of the model, with its adapter."""
    pretrained = Pretrained.open(path)
    return mlora.apply(build_model(pretrained, sizes, **case.overrides), case.lora, family=pretrained.family)


def train(chunks: list[torch.nn.Module], case: Case, layout: Layout) -> Share:
    """Train what :func:`adapt` made; this rank's share of the run."""
    trainer, data = Trainer(chunks, case.optimizer), rows(case.packed)
    feed = Feed(
        data,
        micro_batch_size=layout.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=torch.device(torch.cuda.current_device()),
        packed=case.packed,
        joined=case.overrides.get("transformer_impl", "local") != "local",
    )
    ids = tokens(length=LENGTH)
    initial, before = pieces(chunks), whole_logits(chunks, ids, VOCAB).cpu()
    steps, gradients = [], {}
    for iteration in range(case.steps):
        result = trainer.step(feed.batch(plan(data).rows(iteration)), iteration)
        steps.append((result.loss, result.grad_norm, result.lr))
        if iteration == 0:
            gradients = main_gradients(chunks)
    return Share(
        steps,
        peft_names(chunks),
        initial,
        gradients,
        pieces(chunks),
        before,
        whole_logits(chunks, ids, VOCAB).cpu(),
        optimizer_elements(trainer),
    )


def train_all(rank: int, models: dict[str, Path], cases: dict[str, Case], layout: Layout) -> dict[str, Share]:
    """This rank's share of several runs, one after the other."""
    return {name: train(adapt(models[case.kind], case, layout.sizes), case, layout) for name, case in cases.items()}


def main_gradients(chunks: Sequence[torch.nn.Module]) -> Pieces:
    """The gradients of the last step, complete and scaled, where one rank holds all rows; clipped if the step was."""
    if parallel_state.get_data_parallel_world_size() > 1:
        return {}  # The distributed optimizer leaves each rank a part of them.
    return {
        factor.name: (factor.shape, factor.offset, factor.parameter.main_grad[factor.inside].cpu().clone())  # type: ignore[attr-defined]
        for factor in factors(chunks)
    }


def peft_names(chunks: Sequence[torch.nn.Module]) -> dict[str, list[str]]:
    """PEFT's key -> our names of each of this rank's adapter parameters, in order of their rows."""
    names: dict[str, list[str]] = {}
    for bank in banks(chunks):
        adapter = bank.adapter("default")
        assert adapter is not None
        for part, hf_name in adapter.hf_names.items():
            if isinstance(adapter, EmbeddingAdapter):
                for factor in "AB":
                    names[f"base_model.model.{hf_name}.lora_embedding_{factor}"] = [
                        f"{bank.layout.name}.{part}.lora_{factor}"
                    ]
                continue
            shared = SHARED if adapter.shares_A else part
            names[f"base_model.model.{hf_name}.lora_A.weight"] = [f"{bank.layout.name}.{shared}.lora_A"]
            names.setdefault(f"base_model.model.{hf_name}.lora_B.weight", []).append(
                f"{bank.layout.name}.{part}.lora_B"
            )
            if adapter.uses_dora:
                magnitudes = names.setdefault(f"base_model.model.{hf_name}.lora_magnitude_vector", [])
                magnitudes.append(f"{bank.layout.name}.{part}.lora_magnitude_vector")
    for _, copies in copied_modules(chunks):
        names[f"base_model.model.{copies.hf_name}.weight"] = [f"{copies.name}.weight"]
    return names


def optimizer_elements(trainer: Trainer) -> int:
    """Elements of all parameters that this rank's optimizer steps."""
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return sum(
        parameter.numel() for part in parts for group in part.optimizer.param_groups for parameter in group["params"]
    )


def join(shares: Sequence[Share]) -> Run:
    """The whole run from all ranks' shares, which must agree where they say the same."""
    assert all(share.steps == shares[0].steps for share in shares), "ranks disagree on losses, norms or learning rates"
    names = {key: name for share in shares for key, name in share.names.items()}

    def under_keys(held: Sequence[Pieces]) -> dict[str, torch.Tensor]:
        joined = whole(held)
        return {key: torch.cat([joined[name] for name in parts]) for key, parts in names.items() if parts[0] in joined}

    return Run(
        *(list(column) for column in zip(*shares[0].steps, strict=True)),  # type: ignore[arg-type]
        initial=under_keys([share.initial for share in shares]),
        gradients=under_keys([share.gradients for share in shares]),
        final=under_keys([share.final for share in shares]),
        logits_before=shares[0].logits_before,
        logits_after=shares[0].logits_after,
    )


# Of each kind of number, relative to the largest (logits) or to the norm (matrices). Weights are held against how far training
# moved them, which is less than they are. Logits after training come from weights that were trained apart.
TOLERANCES = {
    "losses": 1e-5,
    "norms": 1e-4,
    "rates": 1e-12,
    "logits_before": 1e-5,
    "logits_after": 1e-4,
    "initial": 0.0,
    "gradients": 1e-4,
    "update": 1e-4,
}


def errors(ours: Run, theirs: Run) -> dict[str, float]:
    """Kind of number and which -> how far it is off."""
    found = {
        f"{name} {number}": abs(mine - other) / (abs(other) or 1.0)
        for name in ("losses", "norms", "rates")
        for number, (mine, other) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True))
    }
    for name in ("logits_before", "logits_after"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        found[name] = float((mine - other).abs().max() / other.abs().max())
    assert ours.initial.keys() == ours.final.keys() == theirs.final.keys()
    assert ours.gradients.keys() in (theirs.gradients.keys(), {}.keys())
    for key, other in theirs.final.items():
        start, moved = theirs.initial[key], (other - theirs.initial[key]).norm()
        found[f"initial {key}"] = float((ours.initial[key] - start).abs().max())
        found[f"update {key}"] = float((ours.final[key] - other).norm() / moved)
    for key in ours.gradients:
        gradient = theirs.gradients[key]
        found[f"gradients {key}"] = float((ours.gradients[key] - gradient).norm() / (gradient.norm() or 1.0))
    return found


def failures(ours: Run, theirs: Run) -> dict[str, float]:
    """The errors that are not within ``TOLERANCES``."""
    return {
        name: error for name, error in errors(ours, theirs).items() if not error <= TOLERANCES[name.partition(" ")[0]]
    }
