"""An adapter on disk, in any format, as Hugging Face modules whose tensors are read one module at a time.

| what | shape of a linear | shape of an embedding |
|---|---|---|
| base weight W | [out, in] | [vocabulary, hidden] |
| ``A`` | [r, in] | [r, vocabulary] |
| ``B`` | [out, r] | [hidden, r] |
| ``magnitude`` m (DoRA) | [out] | [hidden] |
| delta | scaling · B A | scaling · (B A)ᵀ |

Nothing here knows a file format. Readers fill it in (:mod:`mlora.conversion.readers`); merging, inspecting, comparing and the
writers of other formats take it. Opening an adapter reads headers only, so memory is that of the module in hand.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Told of each problem that a reader finds; returns when the reader should go on without the item in question.
Report = Callable[[str], None]


def refuse(problem: str) -> None:
    """The report of everyone who needs a sound adapter: the first problem is an error.

    Raises:
        ValueError: always.
    """
    raise ValueError(problem)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite; unlike ``isfinite().all()`` it makes no tensor of the size of its input."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


@dataclass(frozen=True)
class LazyTensor:
    """One tensor in a file, not read yet.

    Attributes:
        key: its name in the file, as the file spells it.
        file: that holds it.
        shape: of the whole tensor.
        dtype: that it is stored in.
        read: reads it from the file; use :meth:`load`.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor] = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor, on the CPU, contiguous, in the file's dtype, sharing memory with nothing.

        Raises:
            ValueError: it is not finite, or not what the header said; file and key are named.
        """
        value = self.read()
        if tuple(value.shape) != self.shape or value.dtype != self.dtype:
            raise ValueError(
                f"{self.file}: {self.key} is {value.dtype} {list(value.shape)}, not {self.dtype} {list(self.shape)} as announced"
            )
        if not is_finite(value):
            raise ValueError(f"{self.file}: {self.key} has values that are not finite")
        return value


def joined(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The rows of several tensors of a file, one after the other, as one tensor."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
    keys = " + ".join(tensor.key for tensor in tensors)
    return LazyTensor(keys, first.file, shape, first.dtype, lambda: torch.cat([tensor.load() for tensor in tensors]))


@dataclass(frozen=True)
class Factors:
    """The loaded tensors of one :class:`AdapterModule`, as stored."""

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None


@dataclass(frozen=True)
class AdapterModule:
    """The low-rank term of one Hugging Face module.

    Attributes:
        name: full path in the base model, ``model.layers.0.self_attn.q_proj``.
        rank: r.
        scaling: factor of B A: alpha / r, or alpha / sqrt(r) with rsLoRA.
        A: [r, in].
        B: [out, r].
        magnitude: DoRA's m, [out]; None without DoRA.
        embedding: the module is an embedding, and A is [r, vocabulary].
        base_weight: PEFT writes a targeted embedding's base weight along (``base_layer.weight``) and, reading, puts it in the
            base's place. None if the file has none.
    """

    name: str
    rank: int
    scaling: float
    A: LazyTensor
    B: LazyTensor
    magnitude: LazyTensor | None = None
    embedding: bool = False
    base_weight: LazyTensor | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the base's weight."""
        rows, columns = self.B.shape[0], self.A.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """Every tensor of the module that the file holds."""
        return tuple(tensor for tensor in (self.A, self.B, self.magnitude, self.base_weight) if tensor is not None)

    def load(self) -> Factors:
        """A, B and magnitude.

        Raises:
            ValueError: a tensor is not finite or cannot be read.
        """
        return Factors(self.A.load(), self.B.load(), self.magnitude.load() if self.magnitude else None)


@dataclass(frozen=True)
class AdapterState:
    """A whole adapter.

    Attributes:
        source: the directory it was read from.
        format: "peft" or "mlora" (native).
        layout: in words, how it lies on disk.
        modules: in the model's order, names unique.
        full: whole parameters that replace the base's (``modules_to_save``, resized embeddings, trained biases), by the name
            of the parameter in the base: ``lm_head.weight``.
        config: the source's ``adapter_config.json``, unchanged: PEFT's for "peft", :class:`mlora.LoraConfig`'s for "mlora".
        ties_embeddings: input and output embedding were trained as one (PEFT's ``ensure_weight_tying``).
    """

    source: Path
    format: str
    layout: str
    modules: tuple[AdapterModule, ...]
    full: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    ties_embeddings: bool = False

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """Every tensor."""
        return (*(tensor for module in self.modules for tensor in module.tensors), *self.full.values())

    @property
    def by_name(self) -> dict[str, AdapterModule]:
        """The modules by their names."""
        return {module.name: module for module in self.modules}

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but low-rank terms on linears, which every reader knows."""
        return not self.full and not self.uses_dora and not any(module.embedding for module in self.modules)

    @property
    def uses_dora(self) -> bool:
        """Whether any module has a DoRA magnitude."""
        return any(module.magnitude is not None for module in self.modules)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
