"""Model chunks whose sharded checkpoints hold the adapter alone, as Megatron's own saving and loading calls them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.nn.modules.module import _IncompatibleKeys

from mlora.attach import adapted_class, banks
from mlora.checkpoint import adapter_config, describe, sharded_tensors
from mlora.copies import copied_modules
from mlora.description import INSIDE as DESCRIPTION
from mlora.description import PREFIX
from mlora.factor import Factor
from mlora.names import DEFAULT_ADAPTER, EMBEDDING, OUTPUT_LAYER
from parallel.stages import union_over_stages


class AdapterChunk:
    """Comes before the class of a model chunk: Megatron saves, and loads, its adapter and not its base.

    The base's parameters keep their names in ``state_dict``; a state dict of them loads as before.
    """

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This chunk's adapter parameters by global name; with a rank's first chunk the description of the whole adapter."""
        state: dict[str, Any] = sharded_tensors(_saved(self))
        if self._mlora_is_first:  # type: ignore[attr-defined]
            facts = self._mlora_description  # type: ignore[attr-defined]
            state[DESCRIPTION] = ShardedObject(DESCRIPTION, facts, (1,), (0,), replica_id=_replica())
        return {prefix + key: piece for key, piece in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what :meth:`sharded_state_dict` describes, all of it whatever ``strict`` says; or the base, as before.

        Raises:
            ValueError: the adapter in the checkpoint lacks a parameter, has more, or has other ranks or scalings: it is named.
        """
        if not all(key == DESCRIPTION or key.startswith(PREFIX) for key in state_dict):
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        given = dict(state_dict)
        if DESCRIPTION in given:
            check_description(given.pop(DESCRIPTION), self._mlora_description)  # type: ignore[attr-defined]
        mine = {PREFIX + factor.name: factor.parameter for factor in _saved(self)}
        if wrong := sorted(mine.keys() ^ given.keys()):
            raise ValueError(
                f"the checkpoint's adapter is not the attached one: {', '.join(wrong[:5])} is in one of them only"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(given[name])
        return _IncompatibleKeys([], [])


def save_adapter_only(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Let the checkpoints of these adapted chunks, all of this rank's, hold the adapter alone. Every stage calls it.

    Returns:
        Plain facts of the adapter over all stages: a native checkpoint's ``mlora.json``, and the configuration as ``lora``.

    Raises:
        ValueError: the embedding or the output layer is adapted or trains whole.
    """
    _check_no_vocabulary(chunks)
    info = describe(chunks, DEFAULT_ADAPTER, iteration=0, base=None)
    facts = {**info, "training": False, "lora": adapter_config(chunks).to_dict()}
    for number, chunk in enumerate(chunks):
        chunk.__class__ = adapted_class(type(chunk), AdapterChunk)
        chunk._mlora_description = facts  # type: ignore[assignment]
        chunk._mlora_is_first = number == 0  # type: ignore[assignment]
    return facts


def check_description(saved: Mapping[str, Any], attached: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Compare what decides the function that the parameters stand for; ``source`` begins the messages.

    Raises:
        ValueError: a projection has another rank or scaling, or is missing, or the kind of adapter is another; it is named.
    """
    theirs, ours = ({(row["module"], row["part"]): row for row in facts["projections"]} for facts in (saved, attached))
    for key in sorted(theirs.keys() | ours.keys()):
        name = ".".join(key)
        if key not in theirs:
            raise ValueError(f"{source}: its adapter has no {name}, which the options ask for")
        if key not in ours:
            raise ValueError(f"{source}: its adapter has {name}, which the options do not ask for")
        for fact in ("rank", "scaling", "hf_name"):
            if theirs[key][fact] != ours[key][fact]:
                raise ValueError(
                    f"{source}: its adapter has {fact} {theirs[key][fact]!r} at {name}; the options say {ours[key][fact]!r}"
                )
    if saved["modules_to_save"] != attached["modules_to_save"]:
        raise ValueError(f"{source}: its adapter trains {_names(saved)} whole; the options say {_names(attached)}")
    for field in ("use_dora", "shared_A", "init_lora_weights"):
        if saved["lora"][field] != attached["lora"][field]:
            raise ValueError(
                f"{source}: its adapter has {field} = {saved['lora'][field]!r}; the options say {attached['lora'][field]!r}"
            )


def _names(facts: Mapping[str, Any]) -> str:
    return ", ".join(row["module"] for row in facts["modules_to_save"]) or "no module"


def _saved(chunk: Any) -> Iterator[Factor]:
    """What a checkpoint holds of one chunk."""
    for bank in banks(chunk):
        adapter = bank.adapter(DEFAULT_ADAPTER)
        if adapter is not None:
            yield from adapter.factors()
            yield from adapter.start()
    for module, copies in copied_modules(chunk):
        yield from copies.factors(DEFAULT_ADAPTER, module)


def _check_no_vocabulary(chunks: Sequence[torch.nn.Module]) -> None:
    names = {bank.layout.name for bank in banks(chunks)} | {copies.name for _, copies in copied_modules(chunks)}
    of_vocabulary = {name for name in names if name.rpartition(".")[2] in (EMBEDDING, OUTPUT_LAYER)}
    if found := sorted(union_over_stages(of_vocabulary)):
        raise ValueError(
            f"{found[0]}: Megatron's scripts pad the vocabulary, and their checkpoints do not say which rows are real: it can be "
            f"trained with mlora-finetune only"
        )


def _replica() -> tuple[int, int, int]:
    """All zero on the one rank whose copy is written."""
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
