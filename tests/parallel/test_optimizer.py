"""Megatron's distributed optimizer on ranks that hold nothing, and before the first step: made, saved, loaded, stepped."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey

from parallel.optimizer import _inner, allocate_adam_state, load, saveable
from parallel.sizes import ParallelSizes
from parallel.stages import named_parameters
from parallel.storage import read, write
from tests import gpt
from tests.ranks import run_ranks

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
LR, FC2_LR = 1e-2, 3e-2
Trained = tuple[str, ...]
# One small matrix trains: with two stages the last has none, with four data-parallel ranks most have none.
LAYOUTS = {"PP2": (2, ParallelSizes(pipeline=2)), "DP4": (4, ParallelSizes()), "one": (1, ParallelSizes())}
TRAINED = ("decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.1.self_attention.linear_proj.weight")
# The first stage, whose rank 0 speaks for all of what is the same everywhere, has none.
AT_THE_END = ("decoder.layers.3.mlp.linear_fc2.weight", "decoder.layers.2.self_attention.linear_proj.weight")


class Model:
    """The small model with two matrices that train, at rates of their own, and Megatron's optimizer for it."""

    def __init__(self, sizes: ParallelSizes, trained: Trained = TRAINED) -> None:
        [self.chunk] = gpt.build(sizes, params_dtype=torch.float32, pipeline_dtype=torch.float32)
        for name, parameter in named_parameters(self.chunk):
            parameter.requires_grad_(name in trained)
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.wrapped = DistributedDataParallel(self.chunk.config, settings, module=self.chunk)
        config = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            weight_decay=0.1,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
            clip_grad=0.0,
        )
        overrides: Any = {ParamKey(name="*linear_fc2*"): {"max_lr": FC2_LR}}
        self.optimizer = get_megatron_optimizer(config, [self.wrapped], config_overrides=overrides)

    def step(self, seed: int) -> None:
        """One optimizer step with gradients that are the same at every layout."""
        self.wrapped.zero_grad_buffer()
        for name, parameter in named_parameters(self.chunk):
            if parameter.requires_grad:
                parameter.main_grad.copy_(gpt.values(f"{seed} {name}", *parameter.shape))  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"]
        self.wrapped.finish_grad_sync()
        assert self.optimizer.step()[0]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in named_parameters(self.chunk) if p.requires_grad}

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        replica = (0, 0, parallel_state.get_data_parallel_rank())
        trained = {name: p for name, p in named_parameters(self.chunk) if p.requires_grad}
        sharded = {name: ShardedTensor.from_rank_offsets(name, p, replica_id=replica) for name, p in trained.items()}
        with saveable(self.optimizer):
            return dict(self.optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=METADATA))

    def torch_states(self) -> list[dict[str, Any]]:
        return [state for inner in _inner(self.optimizer) for state in inner.state.values()]


def first_step(rank: int, sizes: ParallelSizes) -> dict[str, Any]:
    """What one step makes of the weights with the state that torch makes and with ours."""
    theirs, ours = Model(sizes), Model(sizes)
    allocate_adam_state(ours.optimizer)
    fresh = [(float(state["step"]), float(state["exp_avg"].abs().max())) for state in ours.torch_states()]
    before = ours.weights()
    theirs.step(1)
    ours.step(1)
    kept = [state["exp_avg"].clone() for state in ours.torch_states()]
    allocate_adam_state(ours.optimizer)  # What is there already stays.
    assert all(torch.equal(state["exp_avg"], value) for state, value in zip(ours.torch_states(), kept, strict=True))
    return {
        "fresh": fresh,
        "moved": [not torch.equal(before[name], weight) for name, weight in ours.weights().items()],
        "equal": [torch.equal(weight, theirs.weights()[name]) for name, weight in ours.weights().items()],
        "states": [sorted(state) for state in ours.torch_states()],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_allocated_state_is_what_torch_starts_from(layout: str) -> None:
    size, sizes = LAYOUTS[layout]
    ranks = run_ranks(size, first_step, sizes, sizes=sizes)
    for found in ranks:
        assert all(fresh == (0.0, 0.0) for fresh in found["fresh"])
        assert all(found["moved"]) and all(found["equal"])
        assert found["states"] == [["exp_avg", "exp_avg_sq", "step"]] * len(found["states"])
    assert sum(len(found["fresh"]) for found in ranks) >= 2
    if layout == "PP2":
        assert ranks[1]["fresh"] == [] and ranks[1]["moved"] == []


def save_then_step(
    rank: int, sizes: ParallelSizes, trained: Trained, folder: Path, steps: int
) -> dict[str, torch.Tensor]:
    """Save after ``steps`` steps; the weights after two more."""
    model = Model(sizes, trained)
    allocate_adam_state(model.optimizer)
    for seed in range(steps):
        model.step(seed)
    torch.save(model.weights(), folder / f"weights {rank}")
    write({"optimizer": model.state()}, folder / "state")
    assert all("step" in state and len(state) == 3 for state in model.torch_states())
    model.step(steps)
    model.step(steps + 1)
    return model.weights()


def load_then_step(
    rank: int, sizes: ParallelSizes, trained: Trained, folder: Path, steps: int
) -> dict[str, torch.Tensor]:
    model = Model(sizes, trained)
    allocate_adam_state(model.optimizer)
    weights = {key: value for path in folder.glob("weights *") for key, value in torch.load(path).items()}
    with torch.no_grad():
        for name, parameter in named_parameters(model.chunk):
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    model.optimizer.reload_model_params()
    load(model.optimizer, read({"optimizer": model.state(is_loading=True)}, folder / "state")["optimizer"])
    assert [float(state["step"]) for state in model.torch_states()] == [steps] * len(model.torch_states())
    assert {group["max_lr"] for group in model.optimizer.param_groups if group["params"]} <= {LR, FC2_LR}
    model.step(steps)
    model.step(steps + 1)
    counts = [state["step"] for state in model.torch_states()]
    assert [float(count) for count in counts] == [steps + 2] * len(counts)
    assert len({id(count) for count in counts}) == len(counts)
    return model.weights()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("saved", "loaded", "trained"),
    [
        ("PP2", "PP2", TRAINED),
        ("PP2", "one", TRAINED),
        ("one", "PP2", TRAINED),
        ("DP4", "DP4", TRAINED),
        ("DP4", "PP2", TRAINED),
        ("PP2", "PP2", AT_THE_END),
        ("PP2", "one", AT_THE_END),
    ],
)
def test_what_is_loaded_goes_on_as_if_it_had_not_stopped(
    saved: str, loaded: str, trained: Trained, steps: int, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    size, sizes = LAYOUTS[saved]
    on = run_ranks(size, save_then_step, sizes, trained, tmp_path, steps, sizes=sizes)
    size, sizes = LAYOUTS[loaded]
    again = run_ranks(size, load_then_step, sizes, trained, tmp_path, steps, sizes=sizes)
    theirs, ours = ({name: weight for rank in ranks for name, weight in rank.items()} for ranks in (on, again))
    assert sorted(theirs) == sorted(ours) == sorted(trained)
    for name in trained:
        assert torch.equal(ours[name], theirs[name]), name


def unsaveable(rank: int, sizes: ParallelSizes, steps: int) -> list[str]:
    """Errors without :func:`saveable`: the reason for it."""
    model = Model(sizes)
    for seed in range(steps):
        model.step(seed)
    try:
        model.optimizer.state_dict()
    except Exception as error:
        return [type(error).__name__]
    return []


def test_megatron_still_needs_it() -> None:
    sizes = ParallelSizes(pipeline=2)
    assert run_ranks(2, unsaveable, sizes, 1, sizes=sizes) != [[], []]


def error_inside(rank: int, sizes: ParallelSizes) -> None:
    model = Model(sizes)
    allocate_adam_state(model.optimizer)
    before = [list(inner.state) for inner in _inner(model.optimizer)]
    with pytest.raises(KeyError), saveable(model.optimizer):
        raise KeyError
    assert [list(inner.state) for inner in _inner(model.optimizer)] == before


def test_an_error_while_saving_leaves_the_optimizer_as_it_was() -> None:
    sizes = ParallelSizes(pipeline=2)
    run_ranks(2, error_inside, sizes, sizes=sizes)


class Counting:
    """What ``saveable`` sees of an optimizer of Transformer Engine's: it counts in the groups that have parameters."""

    def __init__(self, *steps: int | None) -> None:
        self.param_groups = [{"params": [], "lr": 1.0} | ({} if step is None else {"step": step}) for step in steps]


def _counts(rank: int) -> tuple[list[Any], list[Any]]:
    optimizer = Counting(None, None) if rank == 0 else Counting(7, None)
    with patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True):
        with saveable(optimizer):
            during = [group.get("step") for group in optimizer.param_groups]
        return during, [group.get("step") for group in optimizer.param_groups]


def test_groups_that_count_say_the_same_step_on_every_rank() -> None:
    first, second = run_ranks(2, _counts, sizes=ParallelSizes(pipeline=2))
    assert first == ([7, 7], [None, None])
    assert second == ([7, 7], [7, None])
