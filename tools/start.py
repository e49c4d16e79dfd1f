"""The adapter that a run starts from: a PEFT directory, or a native checkpoint, whose ranks, alphas and targets it keeps."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mlora.config import LoraConfig
from mlora.pretrained import Pretrained
from mlora.saved import SavedAdapter


@dataclass(frozen=True)
class Start:
    """An adapter as a run starts with it.

    Attributes:
        config: with which it is attached.
        saved: where its weights are; None for a new adapter.
    """

    config: LoraConfig
    saved: SavedAdapter | None = None

    @classmethod
    def read(
        cls, path: Path, base: Pretrained, seed: int, dtype: torch.dtype, adapter_dtype: torch.dtype | None
    ) -> "Start":
        """Read the configuration, and the headers of a PEFT directory.

        Args:
            path: a PEFT directory, or a native checkpoint (or a folder of them: the newest).
            seed: of the run.
            dtype: of the base model. Unless ``adapter_dtype`` says otherwise, the adapter's dtype is one that holds this and its
                file's.

        Raises:
            FileNotFoundError, ValueError: it cannot be read, is for another base, or has a part that cannot be trained.
        """
        saved = SavedAdapter.open(path, base)
        held = torch.promote_types(saved.config.adapter_dtype or dtype, dtype)
        return cls(replace(saved.config, seed=seed, adapter_dtype=adapter_dtype or held), saved)

    def load(self, chunks: list[torch.nn.Module]) -> None:
        """Fill the attached adapter, on every rank, before the optimizer is made; a new one stays as it is."""
        if self.saved is not None:
            self.saved.load(chunks)
