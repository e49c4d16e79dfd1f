"""A base model as a directory of Hugging Face files: configuration, safetensors shards, index."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from mlora.conversion.peft_config import read_config
from mlora.conversion.safetensors_file import SafetensorsFile

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
# Types of models whose linears are transformers' Conv1D: they store [in, out], and a square one does not show it.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


class BaseModel:
    """What a base model's files hold; headers are read, weights are not.

    Attributes:
        path: the directory.
        config: ``config.json``.
        index: ``model.safetensors.index.json``; None for a single file.
        files: the shards by name.
        where: parameter -> name of its file.

    Raises:
        FileNotFoundError: there is no configuration, or a shard is missing.
        ValueError: a file is corrupt, the index points outside of the directory or contradicts a shard, the base is quantised, or
            its linears are transposed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{self.path} is no Hugging Face model: it has no {CONFIG_FILE}")
        self.config = read_config(self.path / CONFIG_FILE)
        self._check_kind()
        self.index = read_config(self.path / INDEX_FILE) if (self.path / INDEX_FILE).is_file() else None
        self.files = {name: self._open(name) for name in self._names()}
        self.where: dict[str, str] = {}
        for name, file in self.files.items():
            for key in file.entries:
                if key in self.where:
                    raise ValueError(f"{self.path}: {key} is in {self.where[key]} and in {name}")
                self.where[key] = name
        self._check_index()

    def file(self, parameter: str) -> SafetensorsFile:
        """The shard that holds a parameter."""
        return self.files[self.where[parameter]]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """A parameter's shape."""
        return self.file(parameter).entries[parameter].shape

    @cached_property
    def embeddings(self) -> tuple[str | None, str]:
        """(name of the input embedding's weight, name of the output layer's weight); None if it cannot be told."""
        found = [key for key in self.where if key.endswith("embed_tokens.weight")]
        return found[0] if len(found) == 1 else None, "lm_head.weight"

    @cached_property
    def tied(self) -> bool:
        """Whether the output layer uses the input embedding's weight, whatever else the files hold."""
        text = self.config.get("text_config")
        for values in (self.config, text if isinstance(text, dict) else {}):
            if isinstance(tied := values.get("tie_word_embeddings"), bool):
                return tied
        # Not said: the model class's default. Where the file has an output layer, transformers wrote it because it is not tied.
        embedding, output = self.embeddings
        return embedding is not None and output not in self.where

    def source(self, parameter: str) -> str:
        """The parameter whose values a parameter has: the input embedding for an output layer that is tied to it, else itself."""
        embedding, output = self.embeddings
        return embedding if self.tied and parameter == output and embedding is not None else parameter

    def _check_kind(self) -> None:
        if self.config.get("quantization_config"):
            method = dict(self.config["quantization_config"]).get("quant_method")
            raise ValueError(
                f"{self.path / CONFIG_FILE}: the base is quantised ({method}); merge into the original weights"
            )
        if self.config.get("model_type") in _TRANSPOSED:
            raise ValueError(
                f"{self.path / CONFIG_FILE}: {self.config['model_type']} stores its linears transposed, which is not supported"
            )

    def _names(self) -> list[str]:
        if self.index is None:
            if not (self.path / WEIGHTS_FILE).is_file():
                raise FileNotFoundError(
                    f"{self.path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; other formats are not read"
                )
            return [WEIGHTS_FILE]
        weight_map = self.index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.path / INDEX_FILE} has no weight_map")
        for key, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{self.path / INDEX_FILE}: {key} is said to be in {name!r}, which is no shard beside the index"
                )
        return sorted(set(weight_map.values()))

    def _open(self, name: str) -> SafetensorsFile:
        if not (self.path / name).is_file():
            raise FileNotFoundError(f"{self.path / name} is missing, and {INDEX_FILE} names it")
        return SafetensorsFile(self.path / name)

    def _check_index(self) -> None:
        if self.index is None:
            return
        for key, name in self.index["weight_map"].items():
            if self.where.get(key) != name:
                raise ValueError(f"{self.path / INDEX_FILE}: {key} is said to be in {name}, which does not hold it")
        for key in self.where.keys() - self.index["weight_map"].keys():
            raise ValueError(f"{self.path / self.where[key]} holds {key}, which {INDEX_FILE} does not name")


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file as Hugging Face does: indented, keys in the given order."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
