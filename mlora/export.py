"""A native checkpoint to a Hugging Face PEFT directory, in one process: no process group, no model, no base weights.

The portable profile: one rank and one alpha for every module, no rsLoRA, split projections, leaf names. It loads in PEFT, vLLM
and SGLang. Ranks that differ are padded with zeros, and a scaling that differs is folded into B; both are exact in float32.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mlora.adapter import SHARED
from mlora.checkpoint import INFO_FILE, PREFIX, read_info
from mlora.conversion.output import new_directory
from mlora.tensor_file import write_tensors
from parallel.storage import Reader, naming

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Projection:
    """One of the ``projections`` of a checkpoint's ``mlora.json``; ``hf_row`` is its first row in the Hugging Face module."""

    module: str
    part: str
    hf_name: str
    rank: int
    scaling: float
    hf_row: int = 0


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of the PEFT file and how it comes from native matrices.

    Attributes:
        name: in the PEFT file.
        sources: keys in the native checkpoint: of one matrix, or of the B of each part of a fused module, in order of rows.
        shape: A is [r, in], B [out, r], r being the one rank of the file.
        factor: that the matrix is multiplied with.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    factor: float

    def of(self, *matrices: torch.Tensor) -> torch.Tensor:
        """The tensor, from the native matrices of the same or a smaller rank.

        Raises:
            ValueError: the result is not finite.
        """
        matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        if self.factor != 1.0:
            matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32)) * self.factor
        if matrix.shape == self.shape:
            result = matrix.to(self.dtype)
        else:
            result = torch.zeros(self.shape, dtype=self.dtype)
            result[: matrix.shape[0], : matrix.shape[1]].copy_(matrix)
        if not torch.isfinite(result).all():
            raise ValueError(f"{self.name} is not finite")
        return result


def peft_tensors(
    shapes: Shapes, projections: Sequence[Projection], *, dtype: torch.dtype | None = None
) -> tuple[list[PeftTensor], int, float]:
    """(tensors in order of their names, rank, alpha) of the portable profile.

    Args:
        shapes: (shape, dtype) of each native matrix ``<module>.<projection>.lora_A`` and ``lora_B``.
        projections: all that the matrices belong to.
        dtype: of the result. None keeps each matrix's, unless a factor that is no power of two goes into a B of lower precision
            than float32: then all become float32.

    Raises:
        ValueError: the adapter is DoRA; a matrix is missing, left over or of another rank; two projections claim the same rows of a
            Hugging Face module.
    """
    for key in shapes:
        if key.endswith("lora_magnitude_vector"):
            raise ValueError(
                f"the adapter has DoRA's magnitudes ({key}), which not every reader knows: use the peft profile"
            )
        if key.endswith(("lora_A0", "lora_B0")):
            raise ValueError(
                f"the adapter keeps its start ({key}): use mlora.conversion, which exports what it has become"
            )
    _check_keys(shapes, projections)
    rank = max(projection.rank for projection in projections)
    modules = _by_hf_module(projections)
    counts = Counter(parts[0].scaling for parts in modules.values())
    scaling = min(counts, key=lambda value: (-counts[value], value))
    found: list[PeftTensor] = []
    for hf_name, parts in modules.items():
        name = f"base_model.model.{hf_name}"
        a_key, b_keys = _keys(shapes, parts[0])[0], tuple(_keys(shapes, part)[1] for part in parts)
        _check_shapes(name, shapes, a_key, b_keys, parts)
        (A, a_dtype), (_, b_dtype) = shapes[a_key], shapes[b_keys[0]]
        rows = sum(shapes[key][0][0] for key in b_keys)
        found.append(PeftTensor(f"{name}.lora_A.weight", (a_key,), (rank, A[1]), dtype or a_dtype, 1.0))
        factor = parts[0].scaling / scaling
        found.append(PeftTensor(f"{name}.lora_B.weight", b_keys, (rows, rank), dtype or b_dtype, factor))
    if dtype is None and any(math.frexp(tensor.factor)[0] != 0.5 and tensor.dtype.itemsize < 4 for tensor in found):
        return peft_tensors(shapes, projections, dtype=torch.float32)
    return sorted(found, key=lambda tensor: tensor.name), rank, _alpha(scaling, rank)


def export_peft(
    checkpoint: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, replace: bool = False
) -> dict[str, Any]:
    """Write a native checkpoint as a PEFT directory, which appears under its name only when it is complete and checked.

    Memory holds one matrix at a time.

    Args:
        checkpoint: a native checkpoint of any layout.
        output: the directory to make.
        dtype: of the tensors; None as in :func:`peft_tensors`.
        replace: replace an ``output`` that is a PEFT directory.

    Returns:
        The ``adapter_config.json`` that was written.

    Raises:
        FileExistsError: ``output`` exists, and ``replace`` is false or it is something else.
        FileNotFoundError: ``checkpoint`` is none of mlora's.
        OSError: it cannot be written.
        ValueError: the checkpoint is not whole, or what was written does not read back key for key.
    """
    checkpoint = Path(checkpoint)
    info = read_info(checkpoint)
    projections = _projections(info, checkpoint / INFO_FILE)
    with (
        Reader(checkpoint) as reader,
        new_directory(output, replace=replace, marker=CONFIG_FILE, keep=(checkpoint,)) as folder,
        naming(folder),
    ):
        shapes = {key.removeprefix(PREFIX): value for key, value in reader.tensors(PREFIX).items()}
        tensors, rank, alpha = peft_tensors(shapes, projections, dtype=dtype)
        config = _peft_config(info, projections, rank, alpha)
        _write(folder, reader, tensors, config)
    return config


def _projections(info: Mapping[str, Any], path: Path) -> list[Projection]:
    try:
        projections = [Projection(**row) for row in info["projections"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its projections are incomplete: {error}") from error
    if not projections:
        raise ValueError(f"{path}: it names no projection")
    return projections


def _keys(shapes: Shapes, projection: Projection) -> tuple[str, str]:
    shared = f"{projection.module}.{SHARED}.lora_A"
    own = f"{projection.module}.{projection.part}"
    return shared if shared in shapes else f"{own}.lora_A", f"{own}.lora_B"


def _check_keys(shapes: Shapes, projections: Sequence[Projection]) -> None:
    expected = {key for projection in projections for key in _keys(shapes, projection)}
    for key in sorted(expected - shapes.keys()):
        raise ValueError(f"the checkpoint lacks {key}")
    for key in sorted(shapes.keys() - expected):
        raise ValueError(f"the checkpoint holds {key}, which no projection of its {INFO_FILE} accounts for")


def _by_hf_module(projections: Sequence[Projection]) -> dict[str, list[Projection]]:
    """Name of each Hugging Face module -> its projections, in order of their rows."""
    found: dict[str, list[Projection]] = {}
    for projection in sorted(projections, key=lambda projection: projection.hf_row):
        found.setdefault(projection.hf_name, []).append(projection)
    return found


def _check_shapes(name: str, shapes: Shapes, a_key: str, b_keys: Sequence[str], parts: Sequence[Projection]) -> None:
    """The matrices of one Hugging Face module fit together."""
    A, row = shapes[a_key][0], 0
    for part, b_key in zip(parts, b_keys, strict=True):
        B = shapes[b_key][0]
        if (A[0], B[1]) != (part.rank,) * 2:
            raise ValueError(f"{name}: matrices of rank {A[0]} and {B[1]}, configured {part.rank}")
        if part.hf_row != row or _keys(shapes, part)[0] != a_key or part.scaling != parts[0].scaling:
            raise ValueError(
                f"{len(parts)} projections of the checkpoint are called {name} and do not make up one module"
            )
        row += B[0]


def _alpha(scaling: float, rank: int) -> float:
    """The alpha with ``alpha / rank == scaling``; an ``int`` if there is one, as PEFT writes it."""
    nearest = round(scaling * rank)
    return nearest if nearest / rank == scaling else scaling * rank


def _peft_config(info: Mapping[str, Any], projections: Sequence[Projection], rank: int, alpha: float) -> dict[str, Any]:
    return {
        "base_model_name_or_path": info.get("base", {}).get("path"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **_where({projection.hf_name for projection in projections}, info["layers"]),
    }


def _where(names: set[str], layer_count: int) -> dict[str, Any]:
    """PEFT's targets: leaf names if they say it, the layers beside them if not all have them, full paths if layers differ."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    layers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    if {_in_layer(name, layer) for name in names for layer in layers} != names:
        return {"target_modules": sorted(names)}
    if layers != list(range(layer_count)):
        return {"target_modules": leaves, "layers_to_transform": layers}
    return {"target_modules": leaves}


def _in_layer(name: str, layer: int) -> str:
    return ".".join(str(layer) if part.isdigit() else part for part in name.split("."))


def _write(folder: Path, reader: Reader, tensors: Sequence[PeftTensor], config: Mapping[str, Any]) -> None:
    entries = [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]
    made = (tensor.of(*(reader.tensor(PREFIX + key) for key in tensor.sources)) for tensor in tensors)
    write_tensors(folder / WEIGHTS_FILE, entries, made)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    _check_written(folder / WEIGHTS_FILE, tensors)


def _check_written(path: Path, tensors: Sequence[PeftTensor]) -> None:
    expected = {tensor.name: list(tensor.shape) for tensor in tensors}
    with safe_open(path, framework="pt") as file:
        written = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    for key in sorted(expected.keys() | written.keys()):
        if expected.get(key) != written.get(key):
            raise ValueError(f"{path}: {key} has shape {written.get(key)}, exported {expected.get(key)}")
