"""A native checkpoint as a Hugging Face PEFT directory, in one process: no process group, no model, no base weights.

The parts are in :mod:`mlora.conversion`.
"""

from pathlib import Path
from typing import Any

import torch

from mlora.conversion import open_adapter
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter


def export_peft(
    checkpoint: str | Path,
    output: str | Path,
    *,
    profile: str = "portable",
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write an adapter as a PEFT directory, which appears under its name only when it is complete and checked.

    Memory holds one matrix at a time.

    Args:
        checkpoint: a native checkpoint of any layout, or a folder of them: the newest.
        output: the directory to make.
        profile: for which readers (:mod:`mlora.conversion.profiles`): "portable" for all of PEFT's format, "peft" as trained.
        dtype: of the tensors; None as in :func:`~mlora.conversion.profiles.peft_adapter`.
        replace: replace an ``output`` that is a PEFT directory.

    Returns:
        The ``adapter_config.json`` that was written.

    Raises:
        FileExistsError: ``output`` exists, and ``replace`` is false or it is something else.
        FileNotFoundError: ``checkpoint`` is none of mlora's.
        OSError: it cannot be written.
        ValueError: the checkpoint is not whole, the profile cannot express the adapter, or what was written does not read back key
            for key.
    """
    state = open_adapter(checkpoint)
    adapter = peft_adapter(state, profile, dtype=dtype)
    write_peft(adapter, output, replace=replace, keep=(state.source,))
    return dict(adapter.config)
