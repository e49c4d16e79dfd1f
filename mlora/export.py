"""A native checkpoint to a Hugging Face PEFT directory, in one process: no process group, no model, no base weights.

The portable profile: one rank and one alpha for every module, no rsLoRA, split projections, leaf names. It loads in PEFT, vLLM
and SGLang. Ranks that differ are padded with zeros, and a scaling that differs is folded into B; both are exact in float32.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed import checkpoint as torch_checkpoint

from mlora.adapter import SHARED
from mlora.checkpoint import PREFIX, read_info, sync

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def read_native(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """The whole adapter matrices of a native checkpoint, by ``<module>.<projection>.lora_A`` and ``lora_B``.

    Raises:
        ValueError: the files cannot be read.
    """
    reader = torch_checkpoint.FileSystemReader(str(checkpoint))
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(PREFIX) and hasattr(entry, "properties")
    }
    try:
        torch_checkpoint.load(dict(tensors), storage_reader=reader, no_dist=True)
    except Exception as error:
        raise ValueError(f"{checkpoint} cannot be read: {error}") from error
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def to_peft(
    tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any], *, dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, adapter_config) of the portable profile from a native adapter and what its ``mlora.json`` says.

    Args:
        tensors: as :func:`read_native` gives them.
        info: with the ``projections``: each one's module, part, Hugging Face name, rank and scaling.
        dtype: of the result; None keeps each tensor's.

    Raises:
        ValueError: a projection's matrix is missing, left over, of another rank, or not finite; the key is named.
    """
    projections = info["projections"]
    _check_keys(tensors, projections)
    rank = max(projection["rank"] for projection in projections)
    scalings = Counter(projection["scaling"] for projection in projections)
    scaling = min(scalings, key=lambda value: (-scalings[value], value))
    result: dict[str, torch.Tensor] = {}
    for projection in projections:
        key = f"base_model.model.{projection['hf_name']}"
        A, B = (tensors[name] for name in _keys(tensors, projection))
        if (A.shape[0], B.shape[1]) != (projection["rank"],) * 2:
            raise ValueError(f"{key}: matrices of rank {A.shape[0]} and {B.shape[1]}, configured {projection['rank']}")
        if projection["scaling"] != scaling:
            B = (B.to(torch.promote_types(B.dtype, torch.float32)) * (projection["scaling"] / scaling)).to(B.dtype)
        pad = rank - projection["rank"]
        result[f"{key}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, pad)).to(dtype or A.dtype).contiguous()
        result[f"{key}.lora_B.weight"] = torch.nn.functional.pad(B, (0, pad)).to(dtype or B.dtype).contiguous()
    for key, tensor in result.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} is not finite")
    # Copies, because safetensors refuses tensors that share memory, as a shared A would.
    return {key: tensor.clone() for key, tensor in sorted(result.items())}, _peft_config(info, rank, scaling)


def _keys(tensors: Mapping[str, torch.Tensor], projection: Mapping[str, Any]) -> tuple[str, str]:
    module, part = projection["module"], projection["part"]
    shared = f"{module}.{SHARED}.lora_A"
    return shared if shared in tensors else f"{module}.{part}.lora_A", f"{module}.{part}.lora_B"


def _check_keys(tensors: Mapping[str, torch.Tensor], projections: list[dict[str, Any]]) -> None:
    expected = {key for projection in projections for key in _keys(tensors, projection)}
    for key in sorted(expected - tensors.keys()):
        raise ValueError(f"the checkpoint lacks {key}")
    for key in sorted(tensors.keys() - expected):
        raise ValueError(f"the checkpoint holds {key}, which no projection of its mlora.json accounts for")


def _peft_config(info: Mapping[str, Any], rank: int, scaling: float) -> dict[str, Any]:
    leaves = sorted({projection["hf_name"].rpartition(".")[2] for projection in info["projections"]})
    config: dict[str, Any] = {
        "base_model_name_or_path": info.get("base", {}).get("path"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    config |= _where(info, leaves)
    return config


def _where(info: Mapping[str, Any], leaves: list[str]) -> dict[str, Any]:
    """What of PEFT's targets the adapter needs: leaf names if it covers every layer, the fewest further words if not."""
    names = {projection["hf_name"] for projection in info["projections"]}
    layers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    if {_in_layer(name, layer) for name in names for layer in layers} != names:
        return {"target_modules": sorted(names)}  # Different projections in different layers: only full paths say that.
    if layers and layers != list(range(info["layers"])):
        return {"target_modules": leaves, "layers_to_transform": layers}
    return {"target_modules": leaves}


def _in_layer(name: str, layer: int) -> str:
    return ".".join(str(layer) if part.isdigit() else part for part in name.split("."))


def export_peft(
    checkpoint: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, replace: bool = False
) -> dict[str, Any]:
    """Write a native checkpoint as a PEFT directory, which appears under its name only when it is complete and checked.

    Args:
        checkpoint: a native checkpoint of any layout.
        output: the directory to make.
        dtype: of the tensors; None keeps the checkpoint's.
        replace: replace an ``output`` that exists.

    Returns:
        The ``adapter_config.json`` that was written.

    Raises:
        FileExistsError: ``output`` exists and ``replace`` is false.
        ValueError: the checkpoint is not whole, or what was written does not read back key for key.
    """
    output = Path(output)
    if output.exists() and not replace:
        raise FileExistsError(f"{output} exists already")
    info = read_info(checkpoint)
    tensors, config = to_peft(read_native(checkpoint), info, dtype=dtype)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _check_written(partial / WEIGHTS_FILE, tensors)
    for path in (*partial.iterdir(), partial):
        sync(path)
    _put_in_place(partial, output)
    return config


def _check_written(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        written = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        if written.keys() != tensors.keys():
            raise ValueError(
                f"{path}: keys differ from what was exported: {sorted(written.keys() ^ tensors.keys())[:3]}"
            )
        for key, tensor in tensors.items():
            if list(written[key].get_shape()) != list(tensor.shape):
                raise ValueError(f"{path}: {key} has shape {written[key].get_shape()}, not {list(tensor.shape)}")


def _put_in_place(partial: Path, output: Path) -> None:
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(partial, output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
