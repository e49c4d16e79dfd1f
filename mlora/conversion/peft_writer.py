"""A Hugging Face PEFT directory, written tensor by tensor; it appears when it is complete and checked."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlora.conversion.output import new_directory
from mlora.conversion.peft import PREFIX, WEIGHTS_FILE
from mlora.conversion.peft_config import CONFIG_FILE
from mlora.conversion.safetensors_file import SafetensorsFile
from mlora.conversion.state import AdapterModule, LazyTensor, is_finite
from mlora.conversion.workers import one_thread
from mlora.tensor_file import write_tensors
from parallel.errors import naming


@dataclass(frozen=True)
class PeftTensor:
    """A tensor of the file, not made yet.

    Attributes:
        name: its key.
        shape: of it.
        dtype: that it is stored in.
        make: makes it.
        sound: what it makes is known to be finite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    sound: bool = False

    def load(self) -> torch.Tensor:
        """The tensor.

        Raises:
            ValueError: it is not finite in its dtype.
        """
        tensor = self.make().to(self.dtype)
        if not self.sound and not is_finite(tensor):
            raise ValueError(f"{self.name} is not finite in {str(self.dtype).removeprefix('torch.')}")
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def from_matrix(
    name: str,
    source: LazyTensor,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    factor: float = 1.0,
) -> PeftTensor:
    """``factor`` times a matrix that was read, padded with zeros to ``shape``; by default as it is."""
    shape, dtype = shape or source.shape, dtype or source.dtype

    def make() -> torch.Tensor:
        matrix = source.load()
        if factor != 1.0:
            matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32)) * factor
        if matrix.shape == shape:
            return matrix
        padded = torch.zeros(shape, dtype=dtype)
        padded[tuple(slice(size) for size in matrix.shape)].copy_(matrix)
        return padded

    # What is read as it is was looked at when it was read.
    return PeftTensor(name, shape, dtype, make, sound=factor == 1.0 and dtype == source.dtype)


def zero_module(name: str, shape: tuple[int, int], like: AdapterModule) -> AdapterModule:
    """A module that adds nothing to a weight [out, in], of rank 1, with the scaling and the dtypes of another."""

    def lazy(factor: str, size: tuple[int, int], other: LazyTensor) -> LazyTensor:
        return LazyTensor(
            f"{name}.{factor}", other.file, size, other.dtype, partial(torch.zeros, size, dtype=other.dtype)
        )

    A, B = lazy("lora_A", (1, shape[1]), like.A), lazy("lora_B", (shape[0], 1), like.B)
    return AdapterModule(name, 1, like.scaling, A, B)


def slots(module: AdapterModule) -> dict[str, LazyTensor]:
    """A module's tensors by the end of their keys in a PEFT file."""
    kind, end = ("lora_embedding_", "") if module.embedding else ("lora_", ".weight")
    found = {f"{kind}A{end}": module.A, f"{kind}B{end}": module.B}
    for slot, tensor in (("lora_magnitude_vector", module.magnitude), ("base_layer.weight", module.base_weight)):
        if tensor is not None:
            found[slot] = tensor
    return found


def peft_key(tensor: LazyTensor, module: str, slot: str) -> str:
    """The key of a tensor: as in the PEFT file that it comes from, unless only a wrapped model would find it there."""
    return tensor.key if tensor.key.startswith(f"{PREFIX}{module}.") else f"{PREFIX}{module}.{slot}"


@dataclass(frozen=True)
class PeftAdapter:
    """The content of a PEFT directory: its tensors, and its ``adapter_config.json``."""

    tensors: tuple[PeftTensor, ...]
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        # safetensors' own order: wide types first, so that every tensor is aligned.
        ordered = sorted(self.tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        object.__setattr__(self, "tensors", tuple(ordered))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def write_peft(
    adapter: PeftAdapter,
    output: str | Path,
    *,
    replace: bool = False,
    keep: tuple[Path, ...] = (),
    check: Callable[[Path], object] = lambda folder: None,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a PEFT directory; memory holds one tensor at a time.

    Args:
        output: appears when it is complete and on disk.
        replace: replace an ``output`` that is a PEFT directory.
        keep: inputs, which ``output`` must not touch.
        check: looks at the directory before it appears; raises if it must not.
        progress: told the bytes of the tensors as they are done.

    Raises:
        FileExistsError: ``output`` exists, and ``replace`` is false or it is something else.
        OSError: it cannot be written.
        ValueError: a tensor is not finite, or what was written does not read back key for key.
    """
    with new_directory(output, replace=replace, marker=CONFIG_FILE, keep=keep) as folder, naming(folder), one_thread():
        entries = [(tensor.name, tensor.shape, tensor.dtype) for tensor in adapter.tensors]
        write_tensors(folder / WEIGHTS_FILE, entries, map(_telling(progress), adapter.tensors))
        text = json.dumps(dict(adapter.config), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        _check_written(folder / WEIGHTS_FILE, adapter)
        check(folder)


def _telling(progress: Callable[[int], object]) -> Callable[[PeftTensor], torch.Tensor]:
    def load(tensor: PeftTensor) -> torch.Tensor:
        value = tensor.load()
        progress(tensor.nbytes)
        return value

    return load


def _check_written(path: Path, adapter: PeftAdapter) -> None:
    expected = {tensor.name: tensor.shape for tensor in adapter.tensors}
    written = {key: entry.shape for key, entry in SafetensorsFile(path).entries.items()}
    for key in sorted(expected.keys() | written.keys()):
        if expected.get(key) != written.get(key):
            raise ValueError(f"{path}: {key} has shape {written.get(key)}, exported {expected.get(key)}")
