"""What lies beside the weights of a merged model: configuration, index, tokenizer and the like, taken from the base."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlora.conversion.base import CONFIG_FILE, INDEX_FILE, BaseModel, write_json
from mlora.conversion.safetensors_file import Entry

# Weights in any format, and what is left behind by a writer that died.
_WEIGHTS = {
    ".bin", ".ckpt", ".ggml", ".gguf", ".h5", ".incomplete", ".lock", ".msgpack", ".npz", ".onnx", ".ot", ".partial", ".pt", ".pth",
    ".safetensors", ".tmp",
}  # fmt: skip
# Of adapters and training runs, not of a model.
_FOREIGN = {"adapter_config.json", "mlora.json", "trainer_state.json"}
_FOLDERS = ("additional_chat_templates",)

Layouts = Mapping[str, Mapping[str, Entry]]  # by shard: what it holds


def write_beside(base: BaseModel, layouts: Layouts, dtype: torch.dtype | None, unties: bool, target: Path) -> None:
    """Write or copy into ``target`` all that the merged model has beside its shards.

    Args:
        layouts: of the merged shards.
        dtype: that the weights were converted to, if they were.
        unties: the output layer has a weight of its own now.
    """
    for path in sorted(base.path.iterdir()):
        if path.is_file() and _belongs(path):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, target / path.name)
    config = _config(base.config, dtype, unties)
    if config != base.config:
        write_json(target / CONFIG_FILE, config)
    if base.index is not None:
        index = _index(base, base.index, layouts)
        if index == base.index:
            shutil.copyfile(base.path / INDEX_FILE, target / INDEX_FILE)
        else:
            write_json(target / INDEX_FILE, index)


def _belongs(path: Path) -> bool:
    hidden, index = path.name.startswith("."), path.name.endswith(".index.json")
    return not (hidden or index or path.suffix in _WEIGHTS or path.name in _FOREIGN)


def _config(old: Mapping[str, Any], dtype: torch.dtype | None, unties: bool) -> dict[str, Any]:
    new = dict(old)
    if dtype is not None:
        new["torch_dtype" if "torch_dtype" in old else "dtype"] = str(dtype).removeprefix("torch.")
    if unties:
        new["tie_word_embeddings"] = False
        if isinstance(text := old.get("text_config"), dict) and "tie_word_embeddings" in text:
            new["text_config"] = text | {"tie_word_embeddings": False}
    return new


def _index(base: BaseModel, old: Mapping[str, Any], layouts: Layouts) -> dict[str, Any]:
    where = {key: name for name, entries in layouts.items() for key in entries}
    added = [key for key in where if key not in base.where]
    metadata = dict(old.get("metadata") or {})
    if isinstance(metadata.get("total_size"), int):
        before = sum(entry.nbytes for file in base.files.values() for entry in file.entries.values())
        metadata["total_size"] += (
            sum(entry.nbytes for entries in layouts.values() for entry in entries.values()) - before
        )
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(torch.Size(layouts[where[key]][key].shape).numel() for key in added)
    weight_map = {**old["weight_map"], **{key: where[key] for key in added}}
    return {**old, **({"metadata": metadata} if "metadata" in old else {}), "weight_map": weight_map}
