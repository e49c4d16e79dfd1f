"""A Hugging Face model directory: its configuration, and the family that it belongs to."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlora.families import Architecture, Family, find_family
from mlora.weights import Weights

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Pretrained:
    """A directory that ``save_pretrained`` wrote. Make it with :meth:`open`.

    Attributes:
        path: of the directory.
        config: the content of its ``config.json``.
        family: that its ``model_type`` names.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family

    @classmethod
    def open(cls, path: str | Path) -> "Pretrained":
        """Read and check ``config.json``; no weights are read.

        Raises:
            FileNotFoundError: there is no such directory, or it has no ``config.json``.
            ValueError: the file is no JSON object, its ``model_type`` is not supported, or a key asks for something that
                cannot be represented exactly; file, key and value are named.
        """
        directory = Path(path)
        file = directory / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {directory} is no Hugging Face model directory")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{file} is no JSON object")
        pretrained = cls(directory, config, find_family(config, str(file)))
        pretrained.architecture  # noqa: B018 (checks the keys)
        return pretrained

    @cached_property
    def architecture(self) -> Architecture:
        """What the configuration says, in Megatron's words."""
        return self.family.architecture(self.config, str(self.path / CONFIG_FILE))

    def weights(self) -> Weights:
        """The directory's tensors, compared by name and shape with the configuration; only the files' headers are read.

        A tied output layer that was saved all the same is read and compared with the embedding.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, a tensor is missing, left over, of another shape or not floating-point; tied
                embeddings differ.
        """
        weights, family = Weights(self.path), self.family
        expected = family.tensors(self.architecture)
        ignored = [name for name in weights.shapes if any(re.fullmatch(pattern, name) for pattern in family.ignored)]
        embedding, output = (
            f"{family.hf_name(module)}.weight" for module in ("embedding.word_embeddings", "output_layer")
        )
        if self.architecture.tied and output in weights.shapes:
            expected[output] = expected[embedding]
        weights.check(expected | {name: weights.shapes[name] for name in ignored})
        if self.architecture.tied and output in weights.shapes and not weights.equal(embedding, output):
            raise ValueError(
                f"{weights.where(output)}: {output} differs from {embedding}, and {CONFIG_FILE} says that they are one tensor "
                f"(tie_word_embeddings)"
            )
        return weights
