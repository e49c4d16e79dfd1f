"""Training that was stopped and resumed against training that never stopped, at the same layout and at others."""

import pickle
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

import mlora
from mlora import LoraConfig
from mlora.checkpoint import Training, load_checkpoint, save_checkpoint
from mlora.description import latest_checkpoint
from mlora.train import OptimizerSettings, Trainer
from parallel.reader import Reader
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks
from tests.training import TOLERANCES

STOP, END = 2, 4
SETTINGS = {
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lora_plus_ratio": 4.0,
    "warmup_iters": 3,  # the stop falls into it
    "decay_iters": 8,
    "decay_style": "cosine",
    "weight_decay": 0.1,
    "clip_grad": 0.05,  # well below the norms here, so that every step is clipped
}
EVERYTHING = LoraConfig(r=5, lora_alpha=10, lora_dropout=0.2, rank_pattern={"v_proj": 3}, use_dora=True)
FIRST_STAGE = LoraConfig(r=2, layers_to_transform=[0, 1], lora_dropout=0.1)  # PP 2: the second stage trains nothing
# Smaller than what feeds every DP rank.
ONE_MATRIX = LoraConfig(r=1, target_modules=["model.layers.0.self_attn.o_proj"], init_lora_weights="pissa")


@dataclass(frozen=True)
class Layout:
    """A world and how it is divided."""

    size: int
    sizes: ParallelSizes


LAYOUTS = {
    "TP1": Layout(1, ParallelSizes()),
    "TP2+SP": Layout(2, ParallelSizes(tensor=2, sequence_parallel=True)),
    "DP2": Layout(2, ParallelSizes()),
    "DP4": Layout(4, ParallelSizes()),
    "PP2": Layout(2, ParallelSizes(pipeline=2)),
    "PP2xVPP2": Layout(2, ParallelSizes(pipeline=2, virtual_pipeline=2)),
    "TP2xPP2": Layout(4, ParallelSizes(tensor=2, pipeline=2)),
}


def _trainer(sizes: ParallelSizes, config: LoraConfig, dtype: torch.dtype, settings: dict[str, Any]) -> Trainer:
    chunks = gpt.build_to_train(sizes, dtype)
    mlora.apply(chunks, config)
    return Trainer(chunks, OptimizerSettings(**settings))


def _draw() -> list[float]:
    """One number from each of the generators whose states are saved."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return [random.random(), float(np.random.rand()), torch.rand(()).item(), tracked]


def _train(trainer: Trainer, first: int, end: int) -> list[list[float]]:
    record = []
    for iteration in range(first, end):
        result = trainer.step(gpt.global_batch(iteration), iteration)
        record.append([result.loss, result.grad_norm, result.lr, *_draw()])
    return record


def _training(trainer: Trainer, position: int) -> Training:
    return Training(trainer.optimizer, trainer.scheduler, {"position": position, "seen": (position, "rows")})


def _never_stop(
    rank: int, sizes: ParallelSizes, config: LoraConfig, dtype: torch.dtype, folder: Path
) -> list[list[float]]:
    """Train to the end, with a checkpoint on the way and one at the end."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank)
    trainer = _trainer(sizes, config, dtype, SETTINGS)
    _train(trainer, 0, STOP)
    save_checkpoint(folder, trainer.chunks, iteration=STOP, training=_training(trainer, 12))
    record = _train(trainer, STOP, END)
    save_checkpoint(folder, trainer.chunks, iteration=END, training=_training(trainer, 24))
    return record


def _resume(
    rank: int, sizes: ParallelSizes, config: LoraConfig, dtype: torch.dtype, checkpoint: Path, folder: Path, again: bool
) -> list[list[float]]:
    """Load, perhaps save at once, train to the end and save."""
    trainer = _trainer(sizes, config, dtype, SETTINGS)
    state = load_checkpoint(checkpoint, trainer.chunks, training=_training(trainer, 0))
    assert state == {"position": 12, "seen": (12, "rows")}
    if again:
        save_checkpoint(folder, trainer.chunks, iteration=STOP, training=_training(trainer, 12))
    record = _train(trainer, STOP, END)
    save_checkpoint(folder, trainer.chunks, iteration=END, training=_training(trainer, 24))
    return record


def _content(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(whole tensors, plain values) of a checkpoint."""
    with Reader(checkpoint) as reader:
        return {key: reader.tensor(key) for key in reader.tensors()}, reader.object("common_state/shard_0_1")


def _check_equal(one: Path, other: Path) -> None:
    (tensors, plain), (others, other_plain) = _content(one), _content(other)
    assert tensors.keys() == others.keys()
    different = [key for key, tensor in tensors.items() if not torch.equal(tensor, others[key])]
    assert not different, f"{len(different)} of {len(tensors)} tensors differ, first {different[:3]}"
    assert plain == other_plain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, adapter, dtype) -> (folder, record of the last steps) of a run that never stopped; each is made once."""
    made: dict[Any, tuple[Path, list[list[list[float]]]]] = {}

    def run(layout: str, config: LoraConfig, dtype: torch.dtype) -> tuple[Path, list[list[list[float]]]]:
        key = layout, config.r, dtype
        if key not in made:
            folder, place = tmp_path_factory.mktemp("run"), LAYOUTS[layout]
            record = run_ranks(place.size, _never_stop, place.sizes, config, dtype, folder, sizes=place.sizes)
            made[key] = folder, record
        return made[key]

    return run


SAME = [
    ("TP1", EVERYTHING, torch.float32),
    ("DP2", EVERYTHING, torch.float32),
    ("PP2xVPP2", EVERYTHING, torch.float32),
    ("TP2xPP2", EVERYTHING, torch.float32),
    ("DP2", EVERYTHING, torch.bfloat16),
    ("TP2+SP", EVERYTHING, torch.bfloat16),
    ("PP2", FIRST_STAGE, torch.float32),
    ("DP4", ONE_MATRIX, torch.float32),
]


def _name(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return {5: "everything", 2: "first_stage", 1: "one_matrix"}[value.r]
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("layout", "config", "dtype"), SAME, ids=_name)
def test_resumed_at_the_same_layout_is_never_stopped(
    runs: Any, tmp_path: Path, layout: str, config: LoraConfig, dtype: torch.dtype
) -> None:
    folder, record = runs(layout, config, dtype)
    place, stop, end = LAYOUTS[layout], folder / f"iter_{STOP:07d}", folder / f"iter_{END:07d}"
    resumed = run_ranks(place.size, _resume, place.sizes, config, dtype, stop, tmp_path, False, sizes=place.sizes)
    assert resumed == record  # losses, norms, learning rates and random numbers
    _check_equal(end, tmp_path / end.name)


OTHER = [
    ("TP1", "TP2xPP2", EVERYTHING, torch.float32),
    ("DP2", "TP2+SP", EVERYTHING, torch.float32),
    ("PP2xVPP2", "TP1", EVERYTHING, torch.float32),
    ("TP2xPP2", "DP2", EVERYTHING, torch.float32),
    ("TP1", "PP2xVPP2", EVERYTHING, torch.float32),
    ("DP2", "TP2+SP", EVERYTHING, torch.bfloat16),
    ("PP2", "DP2", FIRST_STAGE, torch.float32),
    ("DP4", "PP2", ONE_MATRIX, torch.float32),
]


@pytest.mark.parametrize(("saved", "resumed", "config", "dtype"), OTHER, ids=_name)
def test_resumed_at_another_layout_goes_on_from_the_same_state(
    runs: Any, tmp_path: Path, saved: str, resumed: str, config: LoraConfig, dtype: torch.dtype
) -> None:
    folder, record = runs(saved, config, dtype)
    place, stop, end = LAYOUTS[resumed], folder / f"iter_{STOP:07d}", folder / f"iter_{END:07d}"
    continued = run_ranks(place.size, _resume, place.sizes, config, dtype, stop, tmp_path, True, sizes=place.sizes)
    _check_equal(stop, tmp_path / stop.name)  # Adapter, float32 copies, Adam's moments and steps: the same bits.
    exact = dtype == torch.float32
    for expected, found in zip(record[0], continued[0], strict=True):
        assert found[:3] == pytest.approx(expected[:3], rel=1e-6 if exact else 2e-2, abs=0)
    if exact:
        before, tensors, others = (_content(checkpoint)[0] for checkpoint in (stop, end, tmp_path / end.name))
        for key, tensor in tensors.items():
            # By their norms: Adam makes a step of an element whose gradient is little but rounding, too.
            moved, off = (float((tensor - other[key]).norm()) for other in (before, others))
            assert off <= TOLERANCES["update"] * moved, f"{key}: {off} after {moved}"


def _tamper(rank: int, sizes: ParallelSizes, checkpoint: Path, incomplete: Path) -> list[str]:
    """What loading says with other settings and with a tensor missing, and whether it changed anything."""
    said = []
    changes = [{"lora_plus_ratio": 1.0}, {"lr": 2e-2}, {"adam_beta2": 0.99}, {"decay_iters": 9}, {}]
    for settings, source in zip(changes, [checkpoint] * 4 + [incomplete], strict=True):
        trainer = _trainer(sizes, EVERYTHING, torch.float32, SETTINGS | settings)
        before = _state(trainer)
        with pytest.raises(ValueError) as caught:
            load_checkpoint(source, trainer.chunks, training=_training(trainer, 0))
        assert _same(before, _state(trainer)), f"changed although it was refused: {caught.value}"
        _train(trainer, 0, 1)  # Still trains as if nothing had been tried.
        fresh = _trainer(sizes, EVERYTHING, torch.float32, SETTINGS | settings)
        _train(fresh, 0, 1)
        assert _same(_state(fresh), _state(trainer))
        said.append(str(caught.value))
    trainer = _trainer(sizes, EVERYTHING, torch.float32, SETTINGS | {"decay_iters": 9})
    trainer.scheduler.override_opt_param_scheduler = True
    trainer.scheduler.use_checkpoint_opt_param_scheduler = False
    load_checkpoint(checkpoint, trainer.chunks, training=_training(trainer, 0))
    assert (trainer.scheduler.lr_decay_steps, trainer.scheduler.num_steps) == (9, END)
    return said


def _state(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of all that a step changes on this rank."""
    inner = [part.optimizer for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])]
    moments = [tensor for part in inner for state in part.state.values() for tensor in state.values()]
    main = [parameter for part in inner for group in part.param_groups for parameter in group["params"]]
    weights = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    rates = torch.tensor([[group["lr"], group["weight_decay"]] for group in trainer.optimizer.param_groups])
    steps = torch.tensor(trainer.scheduler.num_steps)
    return [tensor.detach().clone() for tensor in (*moments, *main, *weights, rates, steps)]


def _same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_other_settings_are_refused_by_name_and_change_nothing(runs: Any, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(runs("DP2", EVERYTHING, torch.float32)[0])
    incomplete, lost = (
        tmp_path / "incomplete",
        "optimizer.state.exp_avg.adapter.decoder.layers.3.mlp.linear_fc2.whole.lora_B",
    )
    shutil.copytree(checkpoint, incomplete)
    metadata = pickle.loads((incomplete / ".metadata").read_bytes())
    del metadata.state_dict_metadata[lost]
    (incomplete / ".metadata").write_bytes(pickle.dumps(metadata))
    place = LAYOUTS["DP2"]
    said, other = run_ranks(2, _tamper, place.sizes, checkpoint, incomplete, sizes=place.sizes)
    assert said == other
    expected = ["parameter groups", "max_lr = 0.01", "0.999", "lr_decay_steps = 8", f"there is no tensor {lost}"]
    for text, words in zip(said, expected, strict=True):
        assert words in text


def _load_without_training_state(rank: int, sizes: ParallelSizes, folder: Path) -> None:
    trainer = _trainer(sizes, EVERYTHING, torch.float32, SETTINGS)
    checkpoint = save_checkpoint(folder, trainer.chunks)
    before = _state(trainer)
    with pytest.raises(ValueError, match="without training state"):
        load_checkpoint(checkpoint, trainer.chunks, training=_training(trainer, 0))
    assert _same(before, _state(trainer))
    with pytest.raises(ValueError, match=r"common_state.*tensors and plain values"):
        save_checkpoint(
            folder,
            trainer.chunks,
            iteration=1,
            training=Training(trainer.optimizer, trainer.scheduler, {"a": Fraction(1, 3)}),
        )
    assert [path.name for path in folder.iterdir()] == [checkpoint.name]


def test_training_state_that_is_missing_or_cannot_be_read_back(tmp_path: Path) -> None:
    run_ranks(1, _load_without_training_state, ParallelSizes(), tmp_path, sizes=ParallelSizes())
