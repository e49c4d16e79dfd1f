"""DPO at every layout against PEFT and the published formula in plain torch: losses, metrics, gradients, updated weights."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers  # noqa: F401  # Imported once here, not in every forked rank.
from megatron.core import parallel_state

import mlora
from mlora import LoraConfig
from mlora.dpo.objective import Dpo
from mlora.logits import whole_logits
from mlora.pretrained import Pretrained
from mlora.sft.batches import BatchPlan, EvalPlan
from mlora.sft.feed import Feed
from mlora.sft.packing import Rows, single_rows
from mlora.sft.samples import Sample
from mlora.train import Trainer
from tests.gpt import pieces
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.peft_oracle import padded, train_with_peft
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tokens, write_model
from tests.training import (
    LAYOUTS,
    LENGTH,
    PADDING,
    ROWS,
    Case,
    Layout,
    Share,
    adapt,
    failures,
    join,
    main_gradients,
    optimizer_elements,
    peft_names,
)

PAIRS = 19  # not a multiple of the global batch: an evaluation ends with padding
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


@dataclass(frozen=True)
class Run:
    """What is trained, and against what."""

    case: Case
    beta: float
    smoothing: float = 0.0
    named: bool = False

    def objective(self) -> Dpo:
        return Dpo(self.beta, self.smoothing, "reference" if self.named else None)


RUNS = {
    # The masks of dropout are those of the row's number in the global batch, at every layout.
    "base": Run(Case(lora=LoraConfig(**LORA, lora_dropout=0.2, seed=3), steps=3), beta=0.5),
    "named": Run(
        # Recomputed, backward runs layers again when the reference is off already.
        Case(kind="qwen2-tied", lora=LoraConfig(**LORA), steps=3, overrides=RECOMPUTE),
        beta=0.1,
        smoothing=0.2,
        named=True,
    ),
}
CHOSEN_LAYOUTS = ("TP1", "TP2+SP", "PP2", "PP2xVPP2", "TP2xPP2+SP", "DP2", "TP2xDP2")


def samples() -> list[Sample]:
    """Chosen, rejected, chosen, rejected, ...: the same prompt with answers of several lengths."""
    random = np.random.default_rng(8)
    made = []
    for _ in range(PAIRS):
        prompt = random.integers(0, VOCAB, random.integers(2, 9))
        for _ in range(2):
            answer = random.integers(0, VOCAB, random.integers(1, LENGTH - 8))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            made.append(Sample(ids, np.arange(len(ids)) >= len(prompt)))
    return made


def rows() -> Rows:
    return single_rows(samples(), LENGTH, PADDING)


def plan() -> BatchPlan:
    return BatchPlan(num_rows=PAIRS, global_batch_size=ROWS, seed=11)


def train_run(
    chunks: list[torch.nn.Module], run: Run, folder: Path, layout: Layout
) -> tuple[Share, list[dict[str, float]], list[float]]:
    """This rank's share of a run of adapted ``chunks``, with the metrics of every step and the evaluation at the end: (loss, pairs,
    target tokens)."""
    if run.named:
        base = Pretrained.open(folder / run.case.kind)
        mlora.load_adapter(chunks, folder / "reference", "reference", base=base)
    trainer = Trainer(chunks, run.case.optimizer, run.objective())
    feed = Feed(
        rows(),
        micro_batch_size=layout.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=torch.device(torch.cuda.current_device()),
        packed=False,
        rows_of_item=2,
    )
    ids = tokens(length=LENGTH)
    initial, before = pieces(chunks), whole_logits(chunks, ids, VOCAB).cpu()
    steps, metrics, gradients = [], [], {}
    for iteration in range(run.case.steps):
        result = trainer.step(feed.batch(plan().rows(iteration)), iteration)
        steps.append((result.loss, result.grad_norm, result.lr))
        metrics.append(dict(result.metrics))
        if iteration == 0:
            gradients = main_gradients(chunks)
    held = EvalPlan(PAIRS, ROWS)
    first, *more = [trainer.evaluate(feed.batch(held.rows(number))) for number in range(held.num_batches)]
    totals = sum(more, first)
    logits = whole_logits(chunks, ids, VOCAB).cpu()
    share = Share(
        steps, peft_names(chunks), initial, gradients, pieces(chunks), before, logits, optimizer_elements(trainer)
    )
    return share, metrics, [totals.mean_loss, totals.units, totals.target_tokens]


def train_pairs(
    rank: int, folder: Path, names: list[str], layout: Layout
) -> dict[str, tuple[Share, list[dict[str, float]], list[float]]]:
    """This rank's shares of the runs."""
    found = {}
    for name in names:
        case = RUNS[name].case
        found[name] = train_run(adapt(folder / case.kind, case, layout.sizes), RUNS[name], folder, layout)
    return found


def log_ratio(model: Any, batch: list[Sample]) -> torch.Tensor:
    """log π of every sample's answer, [b]."""
    logits, labels = padded(model, batch)
    taken = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (taken * (labels >= 0)).sum(1)


def formula(model: Any, run: Run, batch: list[Sample], folder: Path) -> tuple[torch.Tensor, dict[str, float]]:
    """The DPO loss of a global batch in PEFT, and the mean metrics."""
    policy = log_ratio(model, batch)
    training = model.training
    model.eval()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if run.named:
            if "reference" not in model.peft_config:
                model.load_adapter(str(folder / "reference"), "reference")
            model.base_model.set_adapter("reference")
            stack.callback(back_to_default, model)
        else:
            stack.enter_context(model.disable_adapter())
        reference = log_ratio(model, batch)
    model.train(training)
    chosen, rejected = (run.beta * (policy - reference)).view(-1, 2).unbind(1)
    good, bad = ((chosen - rejected).sigmoid().log(), (rejected - chosen).sigmoid().log())
    loss = -((1 - run.smoothing) * good + run.smoothing * bad).mean()
    metrics = {
        "chosen": chosen,
        "rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
    }
    return loss, {f"reward_{name}": float(value.detach().mean()) for name, value in metrics.items()}


def back_to_default(model: Any) -> None:
    model.base_model.set_adapter("default")


def batch_of(indices: Any) -> list[Sample]:
    made = samples()
    return [made[2 * int(pair) + which] for pair in indices for which in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for run in RUNS.values():
        write_model(made / run.case.kind, run.case.kind, shard_size="1GB")
    write_with_peft(made / "reference", made / RUNS["named"].case.kind, seed=4, target_modules=["q_proj", "up_proj"])
    return made


Shares = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def shares(folder: Path) -> Shares:
    @functools.cache
    def run(name: str) -> list[dict[str, Any]]:
        layout = LAYOUTS[name]
        return run_ranks(layout.world, train_pairs, folder, list(RUNS), layout, sizes=layout.sizes)

    return run


@pytest.fixture(scope="module")
def references(folder: Path, shares: Shares) -> dict[str, tuple[Any, list[dict[str, float]]]]:
    found = {}
    for name, run in RUNS.items():
        seen: list[dict[str, float]] = []

        def loss_of(model: Any, iteration: int, run: Run = run, seen: list[dict[str, float]] = seen) -> torch.Tensor:
            loss, metrics = formula(model, run, batch_of(plan().rows(iteration)), folder)
            seen.append(metrics)
            return loss

        initial = join([shares("TP1")[0][name][0]]).initial
        found[name] = train_with_peft(folder / run.case.kind, run.case, initial, loss_of), seen
    return found


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("layout", CHOSEN_LAYOUTS)
def test_training_is_pefts_with_the_published_loss(
    shares: Shares, references: dict[str, tuple[Any, list[dict[str, float]]]], layout: str, name: str
) -> None:
    ranks = shares(layout)
    theirs, metrics = references[name]
    assert not failures(join([rank[name][0] for rank in ranks]), theirs)
    for rank in ranks:
        for ours, expected in zip(rank[name][1], metrics, strict=True):
            assert ours == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in expected.items()}
    assert max(abs(step["reward_margin"]) for step in metrics) > 0.01  # The adapter is not the reference.


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("layout", CHOSEN_LAYOUTS)
def test_an_evaluation_is_over_every_pair_once(shares: Shares, layout: str, name: str) -> None:
    alone = shares("TP1")[0][name][2]
    for rank in shares(layout):
        assert rank[name][2] == pytest.approx(alone, rel=1e-5)
        assert rank[name][2][1:] == [PAIRS, sum(int(sample.is_target.sum()) for sample in samples())]


def test_settings_that_mean_nothing_are_refused() -> None:
    for beta, smoothing in ((0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (0.1, 0.5), (0.1, -0.1)):
        with pytest.raises(ValueError, match="it must be"):
            Dpo(beta, smoothing)
