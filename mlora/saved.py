"""Adapters on disk, as named adapters of a live model: PEFT directories and native checkpoints, at any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlora.attach import apply
from mlora.checkpoint import load_checkpoint
from mlora.config import LoraConfig
from mlora.conversion import open_adapter
from mlora.conversion.importing import Import, plan_import
from mlora.description import read_lora_config
from mlora.imported import load_import
from mlora.names import DEFAULT_ADAPTER
from mlora.pretrained import Pretrained
from mlora.switch import delete_adapter
from parallel.stages import as_chunks
from parallel.together import together


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk, of which only configuration and headers are read yet.

    Attributes:
        source: the directory.
        config: with which it is attached: its own, or one that says the same.
        plan: of importing it; None for a native checkpoint.
    """

    source: Path
    config: LoraConfig
    plan: Import | None

    @classmethod
    def open(cls, path: str | Path, base: Pretrained | None) -> "SavedAdapter":
        """Look at a PEFT directory, or a native checkpoint (or a folder of them: the newest).

        Args:
            base: the model that it is for; a PEFT directory needs it.

        Raises:
            FileNotFoundError, ValueError: it cannot be read, is for another base, or has a part that no adapter here can have.
        """
        state = open_adapter(path)
        if state.format != "peft":
            return cls(state.source, read_lora_config(state.source), None)
        if base is None:
            raise ValueError(f"{path} is a PEFT directory, which is loaded by the names of its base model: give base")
        plan = plan_import(state, base)
        return cls(state.source, plan.config, plan)

    def load(self, model: torch.nn.Module | Sequence[torch.nn.Module], adapter_name: str = DEFAULT_ADAPTER) -> None:
        """Fill the adapter that was attached with :attr:`config`, on every rank, before an optimizer is made for it."""
        if self.plan is not None:
            load_import(self.plan, model, adapter_name)
        else:
            load_checkpoint(self.source, model, adapter_name=adapter_name)


def load_adapter(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    path: str | Path,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    base: Pretrained | None = None,
) -> LoraConfig:
    """Attach an adapter that lies on disk to a live model, with its own ranks and targets. Every rank calls it.

    As after :func:`mlora.apply`, the first adapter of a model is on and trains; a further one is off and frozen, as a reference
    must be, until :func:`mlora.set_adapter` or :func:`mlora.use_adapter`. The base is neither read nor changed.

    Args:
        path: a PEFT directory, or a native checkpoint (or a folder of them: the newest).
        adapter_name: of the new adapter.
        base: the model's directory, for a PEFT adapter and for families whose names are not Llama's.

    Returns:
        The configuration with which it was attached.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, is not finite, or is for another base; the name is taken; on every rank
            alike, and the model is as it was.
    """
    saved = together(lambda: SavedAdapter.open(path, base))
    chunks = as_chunks(model)
    trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
    apply(chunks, saved.config, adapter_name, family=base.family if base else None)
    try:
        saved.load(chunks, adapter_name)
    except (ValueError, OSError):
        # Raised on every rank alike, so every rank takes it back.
        delete_adapter(chunks, adapter_name)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return saved.config
