"""DPO on Transformer Engine's layers: against PEFT and the published formula, Megatron's local layers, and by command line."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlora import LoraConfig
from mlora.te import ways
from tests.gpu.test_training import BF16, FULL, ONE, TE, bf16, much_worse, off
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.mlora.dpo.test_objective import PAIRS, batch_of, formula, plan, train_run
from tests.mlora.dpo.test_objective import Run as Dpo
from tests.peft_oracle import train_with_peft
from tests.tiny import write_model
from tests.training import (
    Case,
    Run,
    adapt,
    failures,
    join,
)

LORA: dict[str, Any] = {"r": 5, "lora_alpha": 10, "init_lora_weights": False}
RUNS = {
    "base": Dpo(Case(lora=LoraConfig(**LORA, lora_dropout=0.2, seed=3), steps=3, overrides=TE), beta=0.5),
    "named": Dpo(
        # Recomputed, backward runs layers again when the reference is off already.
        Case(kind="qwen2-tied", lora=LoraConfig(**LORA), steps=3, overrides={**TE, **FULL}),
        beta=0.1,
        smoothing=0.2,
        named=True,
    ),
}
LOCAL = {"transformer_impl": "local"}
Metrics = list[dict[str, float]]


@dataclass
class Trained:
    """A run, the metrics of its steps, and (loss, pairs, target tokens) of the evaluation at its end."""

    run: Run
    metrics: Metrics
    evaluation: list[float]
    ways: set[str]


def train_pairs(folder: Path, dpo: Dpo) -> Trained:
    """The run of ``dpo``."""
    chunks = adapt(folder / dpo.case.kind, dpo.case, ONE.sizes)
    base = {name: p.detach().clone() for name, p in chunks[0].named_parameters() if ".lora." not in name}
    share, metrics, evaluation = train_run(chunks, dpo, folder, ONE)
    after = dict(chunks[0].named_parameters())
    assert all(torch.equal(after[name], bits) for name, bits in base.items())
    return Trained(join([share]), metrics, evaluation, {way.partition(":")[0] for way in ways(chunks).values()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for dpo in RUNS.values():
        write_model(made / dpo.case.kind, dpo.case.kind, shard_size="1GB")
    write_with_peft(made / "reference", made / RUNS["named"].case.kind, seed=4, target_modules=["q_proj", "up_proj"])
    return made


@pytest.fixture(scope="module")
def exact(folder: Path) -> Callable[[str], Trained]:
    """The runs in float32."""
    made: dict[str, Trained] = {}

    def run(name: str) -> Trained:
        if name not in made:
            made[name] = train_pairs(folder, RUNS[name])
        return made[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_training_is_pefts_with_the_published_loss(folder: Path, exact: Callable[[str], Trained], name: str) -> None:
    dpo, ours = RUNS[name], exact(name)
    expected: Metrics = []

    def loss_of(model: Any, iteration: int) -> torch.Tensor:
        loss, metrics = formula(model, dpo, batch_of(plan().rows(iteration)), folder)
        expected.append(metrics)
        return loss

    theirs = train_with_peft(folder / dpo.case.kind, dpo.case, ours.run.initial, loss_of)
    assert not failures(ours.run, theirs)
    for found, metrics in zip(ours.metrics, expected, strict=True):
        assert found == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in metrics.items()}
    assert max(abs(step["reward_margin"]) for step in expected) > 0.01  # The adapter is not the reference.
    assert ours.evaluation[1] == PAIRS


def test_in_bfloat16_it_is_as_exact_as_on_local_layers(folder: Path, exact: Callable[[str], Trained]) -> None:
    """The named reference is an adapter of float32, which is not fused and runs on the weights in their buffers."""
    references = {name: exact(name) for name in RUNS}
    ours, theirs = (
        {name: train_pairs(folder, replace(run, case=bf16(run.case, **impl))) for name, run in RUNS.items()}
        for impl in ({}, LOCAL)
    )
    assert not much_worse(*(errors_of(trained, references) for trained in (ours, theirs)), times=2)
    rewards, yardstick = (
        max(
            abs(a[key] - b[key])
            for name, reference in references.items()
            for a, b in zip(trained[name].metrics, reference.metrics, strict=True)
            for key in a
        )
        for trained in (ours, theirs)
    )
    assert rewards < 2 * yardstick + 0.02  # which are numbers of about 1
    assert all(run.ways == {"fused"} for run in ours.values())


def errors_of(trained: dict[str, Trained], references: dict[str, Trained]) -> dict[str, float]:
    found = off(*({name: one.run for name, one in runs.items()} for runs in (trained, references)))
    ends = [(trained[name].evaluation[0], reference.evaluation[0]) for name, reference in references.items()]
    return {**found, "losses": max(found["losses"], *(abs(loss - theirs) / theirs for loss, theirs in ends))}


def test_the_reference_is_the_policy_where_the_adapter_adds_nothing(folder: Path) -> None:
    """With B = 0 every reward is rounding and nothing else, in bfloat16 too: the loss is log 2."""
    lora = LoraConfig(r=5, lora_alpha=10)
    case = Case(lora=lora, steps=1, overrides={**TE, **BF16})
    trained = train_pairs(folder, Dpo(case, beta=0.1))
    assert trained.run.losses[0] == pytest.approx(0.693147, abs=2e-3)
    assert abs(trained.metrics[0]["reward_margin"]) < 4e-3


def test_the_command_line_trains_on_pairs(folder: Path, tmp_path: Path, no_world: None) -> None:
    """Start to end, in bfloat16: pairs come apart."""
    pytest.importorskip("tokenizers")
    from mlora_tools.finetune_lora import main
    from tests.tools.runs import metrics, write_base
    from tests.tools.test_dpo import write_preferences

    base = write_base(tmp_path / "base")
    write_preferences(tmp_path / "train.jsonl", 30)
    write_preferences(tmp_path / "heldout.jsonl", 7, first=30)
    words = [
        *("--model", base, "--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "heldout.jsonl"),
        *("--objective", "dpo", "--seq-length", 24, "--global-batch-size", 8, "--micro-batch-size", 4, "--lr", 0.02),
        *("--train-iters", 6, "--save-interval", 3, "--lora-rank", 5, "--lora-dropout", 0.2, "--bf16"),
        *("--transformer-impl", "transformer_engine", "--output", tmp_path / "run"),
    ]
    assert main([str(word) for word in words]) == 0
    records = metrics(tmp_path / "run")
    before, after = [record for record in records if "eval_loss" in record]
    assert before["eval_loss"] == pytest.approx(0.6931, abs=2e-3)  # log 2: the adapter does nothing yet.
    assert after["eval_loss"] < 0.6 and after["eval_reward_margin"] > 0.2
    assert (tmp_path / "run" / "peft" / "adapter_model.safetensors").is_file()
