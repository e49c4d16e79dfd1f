"""The training loop: steps, evaluations, checkpoints, and when to stop."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlora.checkpoint import Training, save_checkpoint
from mlora.norms import adapter_norms
from mlora.objective import Totals
from mlora.sft.batches import BatchPlan, EvalPlan
from mlora.sft.feed import Feed
from mlora.train import Trainer
from mlora_tools.data import Dataset
from mlora_tools.interruption import Interruption
from mlora_tools.metrics import Metrics
from mlora_tools.progress import Progress
from mlora_tools.reports import Reports
from mlora_tools.topology import write_ranks
from parallel.memory import peak_memory
from parallel.traffic import Traffic


@dataclass(frozen=True)
class TrainData:
    """What to train on: global batch i is ``plan.rows(i)``, of which ``feed`` makes this rank's part."""

    dataset: Dataset
    plan: BatchPlan
    feed: Feed


@dataclass(frozen=True)
class EvalData:
    """What to evaluate on: the first ``batches`` global batches of ``plan``."""

    plan: EvalPlan
    feed: Feed
    batches: int


class Loop:
    """Trains from one iteration to another. Every rank runs it; only rank 0 has ``metrics`` and ``progress``.

    Args:
        trainer: of the model.
        train: what to train on.
        heldout: what to evaluate on, if anything.
        reports: intervals.
        device: this rank's.
        checkpoints: folder of the checkpoints.
        ranks: file for who the ranks are and what they send in the first step.
        base: facts of the base model, for the checkpoints.
        start, end: iterations done before, and in the end.
        evaluated: iterations that were evaluated before.
    """

    def __init__(
        self,
        trainer: Trainer,
        train: TrainData,
        heldout: EvalData | None,
        reports: Reports,
        *,
        device: torch.device,
        checkpoints: Path,
        ranks: Path,
        base: Mapping[str, Any],
        start: int,
        end: int,
        evaluated: set[int],
    ) -> None:
        self.trainer = trainer
        self.train = train
        self.heldout = heldout
        self.reports = reports
        self.device = device
        self.checkpoints = checkpoints
        self.ranks = ranks
        self.base = base
        self.start, self.end = start, end
        self.iteration = start
        self.saved = start  # A resumed run's checkpoint; a new run has nothing to save at iteration 0.
        self.evaluated = set(evaluated)
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None

    def run(self, interruption: Interruption) -> None:
        """Train until the end, an exit interval or an interruption; what is done is then saved."""
        self._evaluate_if_due(interruption)
        while self.iteration < self.end and not interruption.requested():
            self._step()
            self._evaluate_if_due(interruption)
            if _divides(self.reports.save_interval, self.iteration):
                self._save()
            if _divides(self.reports.exit_interval, self.iteration):
                break
        self._save()

    @property
    def finished(self) -> bool:
        """Whether the end was reached, and what is due there done."""
        return self.iteration == self.end and (self.heldout is None or self.end in self.evaluated)

    def _step(self) -> None:
        indices = self.train.plan.rows(self.iteration)
        is_first = self.iteration == self.start
        began = time.perf_counter()
        with Traffic() if is_first else contextlib.nullcontext() as traffic:
            result = self.trainer.step(self.train.feed.batch(indices), self.iteration)
        seconds = time.perf_counter() - began
        self.iteration += 1
        if traffic is not None:
            write_ranks(self.ranks, self.device, self.iteration, traffic)
        tokens = int(self.train.dataset.tokens[indices].sum())
        record = {
            "iteration": self.iteration,
            "loss": result.loss,
            **result.metrics,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": tokens,
            "target_tokens": result.target_tokens,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory": peak_memory(self.device),
        }
        if self.metrics and self.progress:
            self.metrics.add(record)
            self.progress.step(record)
        self._measure_if_due()

    def _measure_if_due(self) -> None:
        if not _divides(self.reports.log_adapter_norms_interval or None, self.iteration):
            return
        norms = adapter_norms(self.trainer.chunks)
        if self.metrics:
            record = {projection: dataclasses.asdict(norm) for projection, norm in norms.items()}
            self.metrics.add({"iteration": self.iteration, "adapter_norms": record})

    def _evaluate_if_due(self, interruption: Interruption) -> None:
        due = self.iteration in (0, self.end) or _divides(self.reports.eval_interval, self.iteration)
        if self.heldout is None or not due or self.iteration in self.evaluated:
            return
        totals: Totals | None = None
        for number in range(self.heldout.batches):
            if interruption.requested():
                return  # It is made up for when the run is resumed.
            batch = self.trainer.evaluate(self.heldout.feed.batch(self.heldout.plan.rows(number)))
            totals = batch if totals is None else totals + batch
        assert totals is not None
        record = {
            "iteration": self.iteration,
            "eval_loss": totals.mean_loss,
            **{f"eval_{name}": value for name, value in totals.mean_metrics.items()},
            "eval_target_tokens": totals.target_tokens,
        }
        self.evaluated.add(self.iteration)
        if self.metrics and self.progress:
            self.metrics.add(record)
            self.progress.evaluation(record)

    def _save(self) -> None:
        if self.iteration == self.saved:
            return
        state = {"iteration": self.iteration}
        training = Training(self.trainer.optimizer, self.trainer.scheduler, state)
        save_checkpoint(
            self.checkpoints,
            self.trainer.chunks,
            iteration=self.iteration,
            training=training,
            base=self.base,
            keep_last=self.reports.keep_last,
        )
        self.saved = self.iteration


def _divides(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration > 0 and iteration % interval == 0
