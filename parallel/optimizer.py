"""Megatron's distributed optimizer, made to save and load where a rank holds nothing, or nothing yet.

With torch's Adam (no Transformer Engine or Apex), Megatron reads the step count from the state of a rank's parameters: a rank that
holds none (a pipeline stage without trainable parameters, more data-parallel ranks than a small buffer feeds) and an optimizer that
has made no step yet have none to read.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import distrib_optimizer

_MOVING = ("params", "step")
_FIXED = ("max_lr", "min_lr", "lr_mult", "wd_mult", "betas", "eps")
_PLACEHOLDER = "no parameter on this rank"


def _inner(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's, where they are torch's own."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return []
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


def allocate_adam_state(optimizer: Any) -> None:
    """Give every parameter of a fresh optimizer the zero state that torch's Adam gives it at the first step."""
    for inner in _inner(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


@contextlib.contextmanager
def _own_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Keep what the parameter groups were made with: learning rates, weight decay.

    Megatron looks a group's values up among the loaded ones by fields in which groups that differ only in their learning rates
    are equal, so that one would get another's.
    """
    kept = [{key: value for key, value in group.items() if key not in _MOVING} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


@contextlib.contextmanager
def saveable(optimizer: Any) -> Iterator[None]:
    """While it lasts, every rank can make the optimizer's state dict, and all say the same step. Collective over the world."""
    inner, groups = _inner(optimizer), optimizer.param_groups
    steps = [float(state["step"]) for part in inner for state in part.state.values()]
    steps += [float(group["step"]) for group in groups if "step" in group]  # Transformer Engine's and Apex's Adam
    latest = torch.tensor(max(steps, default=0.0), device=torch.cuda.current_device())
    dist.all_reduce(latest, op=dist.ReduceOp.MAX)
    empty = [part for part in inner if not part.state]
    for part in empty:
        part.state[_PLACEHOLDER] = {"step": latest.cpu()}  # type: ignore[index]
    # Rank 0's groups are the ones that are saved; where it holds no parameter, they would know no step.
    counting = [
        number for number, group in enumerate(groups) if distrib_optimizer.HAVE_APEX_OR_TE and "step" not in group
    ]
    for number in counting:
        groups[number]["step"] = int(latest)
    try:
        with _own_hyperparameters(optimizer):
            yield
    finally:
        for part in empty:
            part.state.pop(_PLACEHOLDER, None)  # type: ignore[call-overload]
        for number in counting:
            optimizer.param_groups[number].pop("step", None)
        for _, held in _torch_states(optimizer):
            # A count of its own: Megatron leaves all parameters one, which each of them would advance.
            held["step"] = held["step"].clone()


def check_settings(optimizer: Any, scheduler: Any, loaded: Mapping[str, Any]) -> None:
    """Compare with what a checkpoint was trained with, before anything is loaded.

    Args:
        optimizer, scheduler: Megatron's.
        loaded: with the states of both as ``optimizer`` and ``scheduler``.

    Raises:
        ValueError: a learning rate, a schedule, Adam's betas or such is another; both values are named. Not if the scheduler was
            made to override the checkpoint's values.
    """
    if scheduler.override_opt_param_scheduler:
        return
    saved = loaded["scheduler"]
    for name, value in scheduler.state_dict().items():
        if name != "num_steps" and saved.get(name) != value:
            raise ValueError(f"the checkpoint was trained with {name} = {saved.get(name)!r}, this run has {value!r}")
    states = [part for _, part in _parts(optimizer, loaded["optimizer"])]
    theirs = [group for state in states for group in state["optimizer"]["param_groups"]]
    ours, theirs = [sorted(map(_fixed, groups), key=str) for groups in (optimizer.param_groups, theirs)]
    if ours != theirs:
        raise ValueError(f"the checkpoint was trained with the parameter groups {theirs}, this run has {ours}")


def _fixed(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in _FIXED if group.get(name) is not None}


def _parts(optimizer: Any, state: dict[Any, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(each optimizer of a chain, its part of the state): Megatron keeps one optimizer's state without a number."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    return list(zip(parts, states, strict=True))


def load(optimizer: Any, state: dict[Any, Any]) -> None:
    """``optimizer.load_state_dict`` for the fully reshardable format, also with torch's Adam.

    That one counts its steps in each parameter's state, where Megatron's loader expects nothing but tensors of the checkpoint.
    The scheduler, loaded after it, sets the hyperparameters that move.
    """
    for part, saved in _parts(optimizer, state):
        saved = dict(saved)
        tensors = saved.pop("param_state", {})  # Left out of the file where a rank has none.
        with _own_hyperparameters(part):
            part.load_state_dict(saved)
        counts = {parameter: held.pop("step") for parameter, held in _torch_states(part)}
        part.load_parameter_state_from_fully_reshardable(tensors)
        for parameter, count in counts.items():
            # A count of its own: Megatron's loader gives all parameters one tensor, which each of them would then advance.
            part.optimizer.state[parameter]["step"] = count.clone()


def _torch_states(optimizer: Any) -> list[tuple[Any, dict[str, Any]]]:
    return [item for inner in _inner(optimizer) for item in inner.state.items() if "step" in item[1]]
