"""The adapter that a run starts from: a PEFT directory, or a native checkpoint, whose ranks, alphas and targets it keeps."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mlora.checkpoint import CONFIG_FILE, load_checkpoint
from mlora.config import LoraConfig
from mlora.conversion import open_adapter
from mlora.conversion.importing import Import, load_import, plan_import
from mlora.pretrained import Pretrained


@dataclass(frozen=True)
class Start:
    """An adapter as a run starts with it.

    Attributes:
        config: with which it is attached.
        source: where its weights are; None for a new adapter.
        plan: of importing them; None for a native checkpoint.
    """

    config: LoraConfig
    source: Path | None = None
    plan: Import | None = None

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
        state = open_adapter(path)
        plan = plan_import(state, base) if state.format == "peft" else None
        config = plan.config if plan else LoraConfig.from_json(state.source / CONFIG_FILE)
        held = torch.promote_types(config.adapter_dtype or dtype, dtype)
        return cls(replace(config, seed=seed, adapter_dtype=adapter_dtype or held), state.source, plan)

    def load(self, chunks: list[torch.nn.Module]) -> None:
        """Fill the attached adapter, on every rank, before the optimizer is made; a new one stays as it is."""
        if self.plan is not None:
            load_import(self.plan, chunks)
        elif self.source is not None:
            load_checkpoint(self.source, chunks)
