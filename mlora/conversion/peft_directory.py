"""What a PEFT directory holds, whatever is wrong with it: names, configuration and header, for the rules of its readers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlora.conversion.peft import PREFIX, WEIGHTS_FILE
from mlora.conversion.peft_config import CONFIG_FILE, PeftConfig, read_config
from mlora.conversion.safetensors_file import SafetensorsFile
from mlora.pretrained import Pretrained
from mlora.targets import layer_index, matches_entry

# The only form of keys that all readers know.
_LORA = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?P<slot>lora_[AB]\.weight|lora_embedding_[AB])")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
_PACKED = re.compile(r".+\.experts(\.base_layer)?")


@dataclass(frozen=True)
class PeftDirectory:
    """What a PEFT directory holds, whatever is wrong with it; only headers are read.

    Attributes:
        files: names of the files.
        config: of ``adapter_config.json``.
        shapes: of the tensors by key.
        layer_count, vocabulary: of the base model; None if it is not known.
        tied: its output layer is its embedding.
    """

    files: frozenset[str]
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    layer_count: int | None = None
    vocabulary: int | None = None
    tied: bool = False

    @classmethod
    def open(cls, path: str | Path, base: Pretrained | None = None, layer_count: int | None = None) -> "PeftDirectory":
        """Read the names, the configuration and the header of a directory, and what is known of the base model.

        Raises:
            FileNotFoundError: there is no configuration.
            ValueError: a file is corrupt.
        """
        path = Path(path)
        if not (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path} has no {CONFIG_FILE}")
        shapes = {}
        if (path / WEIGHTS_FILE).is_file():
            shapes = {key: entry.shape for key, entry in SafetensorsFile(path / WEIGHTS_FILE).entries.items()}
        return cls(
            files=frozenset(file.name for file in path.iterdir()),
            config=read_config(path / CONFIG_FILE),
            shapes=shapes,
            layer_count=base.architecture.counts["layer"] if base else layer_count,
            vocabulary=base.architecture.vocab_size if base else None,
            tied=base.architecture.tied if base else False,
        )

    @cached_property
    def modules(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Module -> end of key -> shape, of the low-rank terms whose keys have the usual form."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, shape in self.shapes.items():
            if match := _LORA.fullmatch(key):
                found.setdefault(match["module"], {})[match["slot"]] = shape
        return found

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module -> rank of its A; of packed experts, of one expert where the configuration says how many there are not."""
        return {
            module: slots[slot][0]
            for module, slots in self.modules.items()
            for slot in ("lora_A.weight", "lora_embedding_A")
            if slot in slots and not self.is_packed(module)
        }

    @cached_property
    def parsed(self) -> PeftConfig | None:
        """The configuration as PEFT understands it; None if it cannot."""
        try:
            return PeftConfig.from_dict(self.config, CONFIG_FILE, lambda problem: None)
        except (ValueError, TypeError):
            return None

    @cached_property
    def experts(self) -> dict[str, dict[str, dict[int, str]]]:
        """Path of the experts -> projection -> number of the expert -> module, where each expert has its own."""
        found: dict[str, dict[str, dict[int, str]]] = {}
        for module in self.modules:
            if match := _EXPERT.fullmatch(module):
                found.setdefault(match["experts"], {}).setdefault(match["leaf"], {})[int(match["number"])] = module
        return found

    @staticmethod
    def is_packed(module: str) -> bool:
        """Whether it holds all experts of a layer in one matrix."""
        return _PACKED.fullmatch(module) is not None

    def is_targeted(self, module: str) -> bool:
        """Whether PEFT would give the module a low-rank term."""
        if self.parsed is not None and (self.parsed.targets(module) or self.parsed.ties(module)):
            return True
        parameters = self.config.get("target_parameters") or ()
        in_experts = self.is_packed(module) or _EXPERT.fullmatch(module) is not None
        return any(
            matches_entry(f"{module}.weight", entry) or (in_experts and ".experts." in f".{entry}")
            for entry in parameters
        )

    def layers_of(self, leaf: str) -> set[int]:
        """The layers in which modules of this last part of a name have terms."""
        layers = {layer_index(module, None) for module in self.modules if module.rpartition(".")[2] == leaf}
        return {layer for layer in layers if layer is not None}

    def whole_parameters(self) -> Iterator[str]:
        """Keys of tensors that replace the base's."""
        for key in self.shapes:
            if ".lora_" not in key and not key.endswith(".base_layer.weight") and key.startswith(PREFIX):
                yield key
