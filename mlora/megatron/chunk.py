"""Model chunks whose sharded checkpoints hold the adapter alone, as Megatron's own saving and loading calls them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch.nn.modules.module import _IncompatibleKeys

from mlora.adapter import Factor
from mlora.attach import DEFAULT_ADAPTER, banks
from mlora.checkpoint import PREFIX, adapter_config, adapter_sharded_state, describe
from mlora.description import INSIDE

DESCRIPTION = INSIDE.key
_classes: dict[type, type] = {}


class AdapterChunk:
    """Comes before the class of a model chunk: Megatron saves, and loads, its adapter and not its base.

    The base's parameters keep their names in ``state_dict``; a state dict of them loads as before.
    """

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This chunk's adapter parameters by global name, and the description of the whole adapter.

        Every rank of the pipeline calls it for as many chunks, as Megatron does.
        """
        mine = dict(_saved(self))
        model: Sequence[torch.nn.Module] = self._mlora_chunks  # type: ignore[attr-defined]
        state: dict[str, Any] = {
            prefix + name: piece for name, piece in adapter_sharded_state(model).items() if name in mine
        }
        state[prefix + DESCRIPTION] = replace(INSIDE, data=description(model), replica_id=_replica(model, self))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what :meth:`sharded_state_dict` describes, all of it whatever ``strict`` says; or the base, as before.

        Raises:
            ValueError: the adapter in the checkpoint lacks a parameter, has more, or has other ranks or scalings: it is named.
        """
        if DESCRIPTION not in state_dict:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        given = dict(state_dict)
        check_description(given.pop(DESCRIPTION), description(self._mlora_chunks))  # type: ignore[attr-defined]
        mine = dict(_saved(self))
        if wrong := sorted(mine.keys() ^ given.keys()):
            raise ValueError(
                f"the checkpoint's adapter is not the attached one: {', '.join(wrong[:5])} is in one of them only"
            )
        with torch.no_grad():
            for name, factor in mine.items():
                factor.parameter.copy_(given[name])
        return _IncompatibleKeys([], [])


def save_adapter_only(chunks: Sequence[torch.nn.Module]) -> None:
    """Let the checkpoints of these adapted chunks, all of this rank's, hold the adapter alone."""
    for chunk in chunks:
        base = type(chunk)
        if base not in _classes:
            _classes[base] = type(f"Lora{base.__name__}", (AdapterChunk, base), {"__module__": base.__module__})
        chunk.__class__ = _classes[base]
        # In a tuple, so that no chunk becomes a module of the others.
        chunk._mlora_chunks = tuple(chunks)  # type: ignore[assignment]


def description(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Plain facts of the adapter over all stages: a native checkpoint's ``mlora.json``, and the configuration as ``lora``."""
    info = describe(chunks, DEFAULT_ADAPTER, iteration=0, base=None)
    return {**info, "training": False, "lora": adapter_config(chunks).to_dict()}


def check_description(saved: Mapping[str, Any], attached: Mapping[str, Any]) -> None:
    """Compare what decides the function that the parameters stand for.

    Raises:
        ValueError: a projection has another rank or scaling, or is missing, or the kind of adapter is another; it is named.
    """
    theirs, ours = ({(row["module"], row["part"]): row for row in facts["projections"]} for facts in (saved, attached))
    for key in sorted(theirs.keys() | ours.keys()):
        name = ".".join(key)
        if key not in theirs:
            raise ValueError(f"the checkpoint's adapter has no {name}, which the options ask for")
        if key not in ours:
            raise ValueError(f"the checkpoint's adapter has {name}, which the options do not ask for")
        for fact in ("rank", "scaling", "hf_name"):
            if theirs[key][fact] != ours[key][fact]:
                raise ValueError(
                    f"the checkpoint's adapter has {fact} {theirs[key][fact]!r} at {name}; the options say {ours[key][fact]!r}"
                )
    for field in ("use_dora", "shared_A", "init_lora_weights"):
        if saved["lora"][field] != attached["lora"][field]:
            raise ValueError(
                f"the checkpoint's adapter has {field} = {saved['lora'][field]!r}; the options say {attached['lora'][field]!r}"
            )


def _saved(chunk: Any) -> Iterator[tuple[str, Factor]]:
    """What a checkpoint holds of one chunk, by key."""
    for bank in banks(chunk):
        adapter = bank.adapter(DEFAULT_ADAPTER)
        if adapter is not None:
            for factor in (*adapter.factors(), *adapter.start()):
                yield PREFIX + factor.name, factor


def _replica(chunks: Sequence[Any], chunk: Any) -> tuple[int, int, int]:
    """All zero on the one rank, and for the one chunk, whose copy is written."""
    number = next(number for number, candidate in enumerate(chunks) if candidate is chunk)
    stage = parallel_state.get_pipeline_model_parallel_rank() * len(chunks) + number
    return (
        stage,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
