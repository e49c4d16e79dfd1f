"""``open_adapter``: one door for adapters in every format that can be read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlora.conversion.native import is_native, open_native
from mlora.conversion.peft import is_peft, read_peft
from mlora.conversion.state import AdapterState, Report, refuse


@dataclass(frozen=True)
class Reader:
    """A format.

    Attributes:
        name: in words, for messages.
        recognises: tells from the names of files whether a directory is meant as this format.
        read: opens it; tells each problem to the report it is given.
    """

    name: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Report], AdapterState]


# In the order in which they are asked: a native checkpoint too has an adapter_config.json.
READERS = [
    Reader("a native checkpoint (mlora.json) or a folder of them", is_native, open_native),
    Reader("a PEFT directory (adapter_config.json, adapter_model.safetensors)", is_peft, read_peft),
]


def open_adapter(path: str | Path, report: Report = refuse) -> AdapterState:
    """The adapter at ``path``, in whatever format; headers are read and checked now, tensors when they are asked for.

    Args:
        path: a native checkpoint, a folder of native checkpoints (the newest is taken, and the log says so) or a PEFT directory.
        report: told of each problem; what it concerns is then left out. By default the first problem is an error.

    Raises:
        FileNotFoundError: there is nothing, or nothing that can be recognised.
        ValueError: the adapter cannot be read, or has a problem (with the default ``report``): file, key and rule are named.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no directory" if path.exists() else f"{path} does not exist")
    for reader in READERS:
        if reader.recognises(path):
            return reader.read(path, report)
    inside = sorted(child.name for child in path.iterdir() if child.is_dir() and is_peft(child))
    hint = f"; its folder {inside[0]} looks like an adapter" if inside else ""
    raise FileNotFoundError(f"{path} is no adapter: neither {' nor '.join(reader.name for reader in READERS)}{hint}")
