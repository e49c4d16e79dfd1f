"""The frozen adapter that training may be held against, beside the one that trains."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

import mlora
from mlora.pretrained import Pretrained
from mlora.saved import SavedAdapter
from mlora_tools.objective import REFERENCE


@dataclass(frozen=True)
class Reference:
    """An adapter on disk, for a base model.

    Attributes:
        saved: the adapter, of which no weights are read yet.
        base: its base model.
    """

    saved: SavedAdapter
    base: Pretrained

    @classmethod
    def open(cls, path: Path, base: Pretrained) -> "Reference":
        """Look at a PEFT directory, or a native checkpoint (or a folder of them: the newest).

        Raises:
            FileNotFoundError, ValueError: it cannot be read or is for another base.
        """
        return cls(SavedAdapter.open(path, base), base)

    def attach(self, chunks: list[torch.nn.Module]) -> None:
        """Load it as a named adapter, off and frozen; on every rank, after the adapter that trains was attached."""
        mlora.load_adapter(chunks, self.saved.source, REFERENCE, base=self.base)

    def digest(self) -> str:
        """Of all its files: a resumed run must have the same reference."""
        total = hashlib.sha256()
        for file in sorted(path for path in self.saved.source.iterdir() if path.is_file()):
            total.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
        return total.hexdigest()
