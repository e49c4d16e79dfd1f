"""Modules that train whole beside the low-rank terms: PEFT's ``modules_to_save``, for the embedding, the output layer and norms.

Each adapter has a copy of its own of such a module's weight, below the module as its low-rank matrices are; the base keeps its
parameter, frozen. Whatever reads the module's ``weight`` gets the copy of the adapter that is on, so that forward, backward and
gradients are those of Megatron for a weight that trains:

| module | copy on a rank | gradient |
|---|---|---|
| embedding, output layer | its rows of the vocabulary, with padding | complete |
| norm | all of it | with sequence parallelism a partial sum, as the base's mark says |

The embedding's row of the pad token gets none: :func:`mlora.vocabulary.leave_pad_token`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding

from mlora.bank import Bank
from mlora.config import LoraConfig
from mlora.factor import Factor
from mlora.families import Family
from mlora.names import hf_module_name
from mlora.outside import OutsideParameters
from mlora.spec import fused_norm
from mlora.targets import Target, matches_saved
from mlora.vocabulary import is_embedding, is_output_layer, leave_pad_token, real_rows
from parallel.layout import WHOLE, read_layout
from parallel.stages import as_chunks, named_modules, union_over_stages
from parallel.together import together

_FUSED = "Transformer Engine has taken it into a linear, and it cannot be trained; with the local implementation it can"


@dataclass(frozen=True)
class Candidate:
    """A module with a weight, by its global name and by Hugging Face's; ``problem`` says why it cannot train whole, if so."""

    name: str
    hf_names: tuple[str, ...]
    module: torch.nn.Module
    problem: str | None


class CopyBank(Bank):
    """The copies of one module's weight, by adapter.

    Attributes:
        name: of the module, with global layer numbers.
        hf_name: in Hugging Face's model.
        rows: of the whole weight; padding of the vocabulary is none of them.
    """

    adapters: OutsideParameters

    def __init__(self, name: str, hf_name: str, rows: int) -> None:
        super().__init__()
        self.name = name
        self.hf_name = hf_name
        self.rows = rows
        self.adapters = OutsideParameters()

    def current(self) -> torch.nn.Parameter | None:
        """The copy that stands for the base's weight now."""
        return self.adapters[self.active] if self.active is not None and self.active in self.adapters else None

    def factors(self, adapter_name: str, module: torch.nn.Module) -> Iterator[Factor]:
        """The copy of an adapter, if it has one, and where it stands."""
        if adapter_name in self.adapters:
            copy: Any = self.adapters[adapter_name]
            split = bool(copy.tensor_model_parallel)
            first = module.tp_group.rank() * copy.shape[0] if split else 0  # type: ignore[union-attr,operator]
            shape = (self.rows, *copy.shape[1:])
            yield Factor(f"{self.name}.weight", copy, shape, (first, *(0 for _ in shape[1:])), not split)


class CopiedModule:
    """A module whose ``weight`` is that of the adapter that is on; comes before its class in the instance's class."""

    copies: CopyBank
    _parameters: dict[str, torch.nn.Parameter]

    @property
    def base_weight(self) -> torch.nn.Parameter:
        """The base's own, whatever is on."""
        return self._parameters["weight"]

    @property
    def weight(self) -> torch.nn.Parameter:
        """What forward uses."""
        copy = self.copies.current()
        return self.base_weight if copy is None else copy


class UntiedOutput:
    """A model whose tied output layer keeps the base's weight where the embedding trains whole, as Hugging Face's does under PEFT.

    Comes before the model's class in the instance's class.
    """

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The base's: what Megatron gives the output layer."""
        if self.pre_process:  # type: ignore[attr-defined]
            return base_weight(self.embedding.word_embeddings)  # type: ignore[attr-defined]
        return super().shared_embedding_or_output_weight()  # type: ignore[misc,no-any-return]


def base_weight(module: torch.nn.Module) -> torch.Tensor:
    """A module's weight without any adapter."""
    return module.base_weight if isinstance(module, CopiedModule) else module.weight  # type: ignore[return-value]


def copied_modules(
    model: torch.nn.Module | Sequence[torch.nn.Module],
) -> Iterator[tuple[torch.nn.Module, CopyBank]]:
    """Every module of this rank's chunks that trains whole in some adapter."""
    for chunk in as_chunks(model):
        for module in chunk.modules():
            if isinstance(module, CopiedModule):
                yield module, module.copies


def _candidates(chunks: Sequence[torch.nn.Module], family: Family | None) -> list[Candidate]:
    """Every module with a weight of this rank's chunks. The adapters' own are not among them."""
    found = []
    for chunk in chunks:
        for name, module in named_modules(chunk):
            if "layer_norm_weight" in module._parameters:
                norm = ".".join(fused_norm(name))
                found.append(Candidate(norm, (hf_module_name(norm, WHOLE, family),), module, _FUSED))
            if isinstance(module, torch.nn.ParameterDict) or "weight" not in module._parameters:
                continue
            layout = read_layout(name, module)
            parts = [part for part, _ in layout.parts] if layout else [WHOLE]
            names = tuple(dict.fromkeys(hf_module_name(name, part, family) for part in parts))
            found.append(Candidate(name, names, module, _problem(chunk, name, module)))
    return found


def _problem(chunk: torch.nn.Module, name: str, module: torch.nn.Module) -> str | None:
    vocabulary = is_embedding(name, module) or is_output_layer(name)
    tied = vocabulary and getattr(chunk, "share_embeddings_and_output_weights", False)
    if tied and getattr(getattr(chunk, "embedding", None), "word_embeddings", None) is not module:
        return "it is tied to the embedding, of which it has no weight to train"
    if vocabulary:
        known = isinstance(module, VocabParallelEmbedding | ColumnParallelLinear)
        return None if known and module._parameters.get("bias") is None else "its kind cannot be trained whole"
    if isinstance(module, torch.nn.RMSNorm):
        return None
    return "only the embedding, the output layer and norms that every rank holds whole can be trained whole"


def _select(modules: Sequence[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The modules that ``modules_to_save`` names.

    Raises:
        ValueError: one of them cannot be trained whole.
    """
    chosen = [
        module for module in modules if any(matches_saved(path, name) for path in module.hf_names for name in names)
    ]
    for module in chosen:
        if module.problem is not None:
            raise ValueError(f"modules_to_save: {', '.join(module.hf_names)} ({module.name}): {module.problem}")
    return chosen


def _check_all_match(modules: Sequence[str], names: Sequence[str]) -> None:
    """Raises ValueError for a name that matches none of ``modules``, the Hugging Face paths of all stages."""
    for name in names:
        if not any(matches_saved(path, name) for path in modules):
            kinds = sorted({re.sub(r"\.\d+\.", ".*.", path) for path in modules})
            raise ValueError(
                f"modules_to_save: {name!r} matches no module on any stage. Modules with a weight: {', '.join(kinds)}"
            )


def choose_copied(
    chunks: Sequence[torch.nn.Module], targets: Sequence[Target], config: LoraConfig, family: Family | None
) -> list[Candidate]:
    """The modules of ``modules_to_save``; changes nothing. A collective.

    Raises:
        ValueError: one of them cannot be trained whole or is a target too, or a name matches nothing; on every rank alike.
    """
    names = config.modules_to_save or ()
    modules = together(lambda: _candidates(chunks, family) if names else [])
    chosen = together(lambda: _select(modules, names))
    both = union_over_stages({whole.name for whole in chosen}) & union_over_stages(
        {target.projection.module for target in targets}
    )
    if both:
        raise ValueError(f"{', '.join(sorted(both))}: it is in target_modules and in modules_to_save; name it in one")
    _check_all_match(sorted(union_over_stages({path for module in modules for path in module.hf_names})), names)
    return chosen


def new_copy(name: str, module: torch.nn.Module) -> torch.nn.Parameter:
    """A copy of a module's base weight, with the marks by which Megatron counts its norm and completes its gradient."""
    weight = base_weight(module)
    copy: Any = torch.nn.Parameter(weight.detach().clone())
    vars(copy).update(vars(weight))
    split = is_embedding(name, module) or is_output_layer(name)
    copy.tensor_model_parallel = split
    copy.partition_dim = 0 if split else -1
    copy.partition_stride = 1
    copy.allreduce = True
    copy.sequence_parallel = bool(getattr(weight, "sequence_parallel", False))
    if is_embedding(name, module):
        leave_pad_token(module, copy, 0)
    return copy  # type: ignore[no-any-return]


def rows_of(name: str, module: torch.nn.Module) -> int:
    """Rows of the whole weight."""
    rows = base_weight(module).shape[0]
    if not (is_embedding(name, module) or is_output_layer(name)):
        return rows
    return real_rows(module) or rows * int(module.tp_group.size())  # type: ignore[operator,arg-type]
