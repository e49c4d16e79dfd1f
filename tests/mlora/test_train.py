"""What the trainer promises beside the numbers of PEFT's training, which :mod:`tests.mlora.test_peft_parity` compares."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

import mlora
from mlora import LoraConfig
from mlora.attach import factors
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.sft.batches import EvalPlan
from mlora.sft.feed import Feed, MicroBatches
from mlora.train import OptimizerSettings, Trainer
from parallel.sizes import ParallelSizes
from tests.ranks import run_ranks
from tests.tiny import write_model
from tests.training import ROWS, plan, rows

ONE, PP2 = ParallelSizes(), ParallelSizes(pipeline=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


def adapted(base: Path, sizes: ParallelSizes, config: LoraConfig, **overrides: Any) -> list[torch.nn.Module]:
    pretrained = Pretrained.open(base)
    return mlora.apply(build_model(pretrained, sizes, **overrides), config, family=pretrained.family)


def batch(iteration: int) -> MicroBatches:
    feed = Feed(rows(False), micro_batch_size=2, dp_rank=0, dp_size=1, device=torch.device("cpu"), packed=False)
    return feed.batch(plan(rows(False)).rows(iteration))


def all_rows(number: int) -> MicroBatches:
    feed = Feed(rows(False), micro_batch_size=2, dp_rank=0, dp_size=1, device=torch.device("cpu"), packed=False)
    return feed.batch(EvalPlan(len(rows(False)), ROWS).rows(number))


def evaluate_between_steps(rank: int, base: Path, sizes: ParallelSizes, dropout: float) -> dict[str, Any]:
    """Losses of evaluations and of steps with and without an evaluation before them."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False)
    trainer = Trainer(adapted(base, sizes, config), OptimizerSettings(lr=1e-9))
    first = trainer.step(batch(0), 0).loss
    evaluations = [(found.loss, found.target_tokens) for found in map(trainer.evaluate, map(all_rows, (0, 1, 2)))]
    modes = {chunk.training for chunk in trainer.chunks}
    again = trainer.step(batch(0), 0).loss  # The learning rate is too small to change it.
    return {"first": first, "again": again, "evaluations": evaluations, "modes": modes}


def test_evaluation_has_no_dropout_and_leaves_training_as_it_was(base: Path) -> None:
    (alone,) = run_ranks(1, evaluate_between_steps, base, ONE, 0.5, sizes=ONE)
    (without,) = run_ranks(1, evaluate_between_steps, base, ONE, 0.0, sizes=ONE)
    assert alone["modes"] == {True}
    assert alone["first"] != pytest.approx(without["first"], rel=1e-5)
    assert alone["again"] == pytest.approx(alone["first"], rel=1e-6)
    evaluations = alone["evaluations"]
    assert evaluations == [(pytest.approx(total, rel=1e-6), tokens) for total, tokens in without["evaluations"]]
    assert sum(tokens for _, tokens in evaluations) == sum(int(row.loss_mask.sum()) for row in rows(False))
    for stage in run_ranks(2, evaluate_between_steps, base, PP2, 0.5, sizes=PP2):
        assert stage["evaluations"] == [(pytest.approx(total, rel=1e-5), tokens) for total, tokens in evaluations]


def rates_of_a_stage_without_adapters(rank: int, base: Path) -> tuple[int, list[float], list[float]]:
    """(adapter parameters of this stage, reported learning rates, norms); adapters are on the last layer only."""
    config = LoraConfig(r=4, lora_alpha=8, layers_to_transform=[3])
    chunks = adapted(base, PP2, config)
    settings = {"lr": 1e-2, "min_lr": 1e-3, "warmup_iters": 2, "decay_iters": 4, "decay_style": "linear"}
    trainer = Trainer(chunks, OptimizerSettings(**settings, lora_plus_ratio=16.0))
    steps = [trainer.step(batch(iteration), iteration) for iteration in range(5)]
    return len(list(factors(chunks))), [step.lr for step in steps], [step.grad_norm for step in steps]


def test_every_stage_reports_the_rate_of_A(base: Path) -> None:
    empty, full = run_ranks(2, rates_of_a_stage_without_adapters, base, sizes=PP2)
    assert empty[0] == 0 and full[0] > 0
    assert empty[1:] == full[1:]
    assert full[1] == pytest.approx([0.0, 5e-3, 1e-2, 5.5e-3, 1e-3])


def small_steps_in_bfloat16(rank: int, base: Path, dtype: str | None) -> tuple[float, float, set[str]]:
    """How far 20 steps, each under half of bfloat16's spacing, move B; the move one step would make; its dtypes."""
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, adapter_dtype=dtype)  # type: ignore[arg-type]
    chunks = adapted(base, ONE, config, dtype=torch.bfloat16)
    matrix = next(factor for factor in factors(chunks) if factor.name.endswith("lora_B")).parameter
    with torch.no_grad():
        matrix.fill_(1.0)  # Its neighbours are 2**-8 below and 2**-7 above.
    trainer = Trainer(chunks, OptimizerSettings(lr=2.0**-11, adam_beta1=0.0, adam_beta2=0.0, clip_grad=0.0))
    for _ in range(20):
        trainer.step(batch(0)[:1], 0)
    moved = float((matrix.float() - 1).abs().max())
    gradients = {str(factor.parameter.main_grad.dtype) for factor in factors(chunks)}  # type: ignore[attr-defined]
    return moved, 2.0**-11, gradients


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_bfloat16_weights_have_float32_copies_and_gradients(base: Path, dtype: str | None) -> None:
    ((moved, step, gradients),) = run_ranks(1, small_steps_in_bfloat16, base, dtype, sizes=ONE)
    assert moved >= 10 * step  # Added to bfloat16 one by one, every such step would be rounded away.
    assert gradients == {"torch.float32"}


def not_finite(rank: int, base: Path) -> tuple[str, bool]:
    """The error of a step whose loss is not a number, and whether the adapter is what it was."""
    chunks = adapted(base, ONE, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
    trainer = Trainer(chunks, OptimizerSettings(lr=1e-2))
    with torch.no_grad():
        next(chunks[0].decoder.layers[1].parameters()).fill_(math.inf)
    before = [factor.parameter.detach().clone() for factor in factors(chunks)]
    try:
        trainer.step(batch(6), 6)
    except FloatingPointError as error:
        same = all(torch.equal(factor.parameter, old) for factor, old in zip(factors(chunks), before, strict=True))
        return str(error), same
    return "none", False


def test_a_loss_that_is_no_number_is_named_before_any_weight_changes(base: Path) -> None:
    assert run_ranks(1, not_finite, base, sizes=ONE) == [("the loss of iteration 7 is nan", True)]


def refused(rank: int, base: Path) -> list[str]:
    messages = []
    for name, value in (("fp16", True), ("calculate_per_token_loss", False), ("finalize_model_grads_func", None)):
        chunks = adapted(base, ONE, LoraConfig())
        setattr(chunks[0].config, name, value)
        try:
            Trainer(chunks, OptimizerSettings(lr=1e-2)).step(batch(0), 0)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_models_that_it_cannot_train_right_are_refused(base: Path) -> None:
    ((half, mean, unsummed),) = run_ranks(1, refused, base, sizes=ONE)
    assert "float16, which needs a loss scale" in half
    assert "calculate_per_token_loss" in mean
    assert "must have Megatron's finalize_model_grads as" in unsummed


def no_target(rank: int, base: Path) -> str:
    trainer = Trainer(adapted(base, PP2, LoraConfig()), OptimizerSettings(lr=1e-2))
    micro_batches = [{**micro_batch, "loss_mask": micro_batch["loss_mask"] * 0} for micro_batch in batch(0)]
    assert parallel_state.get_pipeline_model_parallel_world_size() == 2
    try:
        trainer.step(micro_batches, 0)
    except ValueError as error:
        return str(error)
    return "none"


def test_a_batch_without_targets_is_an_error_on_every_stage(base: Path) -> None:
    assert run_ranks(2, no_target, base, sizes=PP2) == ["the global batch holds no target token"] * 2
