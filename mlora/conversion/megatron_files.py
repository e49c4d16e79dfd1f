"""The files of an adapter checkpoint that another library wrote with Megatron's ``torch_dist``, read in one process without ranks.

Nothing of them can run code (:mod:`parallel.reader`). Megatron stores a tensor of a layer in one of two ways:

| key | shape | when |
|---|---|---|
| ``decoder.layers.mlp.linear_fc2...weight`` | [layers, rows, columns] | all layers alike, the default |
| ``decoder.layers.3.mlp.linear_fc2...weight`` | [rows, columns] | layers saved one by one |
"""

import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mlora.conversion.peft import PICKLE_FILE, WEIGHTS_FILE
from mlora.conversion.peft_config import read_config
from mlora.conversion.state import LazyTensor
from mlora.description import INFO_FILE
from parallel.reader import DIRECTORY, FORMAT_FILE, Reader

logger = logging.getLogger(__name__)

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d+)")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class MegatronFiles:
    """The tensors of one iteration. Make it with :meth:`open`.

    Attributes:
        folder: that holds them.
        reader: of the folder.
    """

    folder: Path
    reader: Reader

    @classmethod
    def open(cls, path: str | Path) -> "MegatronFiles":
        """The checkpoint at ``path``, or, in a folder of iterations, the latest (the log says which).

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is in another format, or a file is missing or damaged.
        """
        path = Path(path)
        folder = _iteration(path)
        if folder != path:
            logger.info("%s: reading %s", path, folder.name)
        _check_format(folder)
        return cls(folder, Reader(folder))

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of every tensor by its key, without the optimizer's state."""
        return {key: place for key, place in self.reader.tensors().items() if not _OPTIMIZER.match(key)}

    def error(self, key: str, rule: str) -> ValueError:
        """An error that names the files, the key and the rule."""
        return ValueError(f"{self.folder}: {key}: {rule}")

    def matrix(self, key: str, layer: int | None = None) -> LazyTensor:
        """A tensor [rows, columns], or that of one layer of a tensor [layers, rows, columns]."""
        shape, dtype = self.tensors[key]

        def read() -> torch.Tensor:
            with self.reader as reader:  # Closes the files when it is left, and opens them again when they are needed.
                if layer is None:
                    return reader.tensor(key)
                out = torch.empty(1, *shape[1:], dtype=dtype)
                reader.fill(key, out, (layer, *(0 for _ in shape[1:])), shape)
                return out[0]

        name = key if layer is None else f"{key}[{layer}]"
        return LazyTensor(name, self.folder, shape if layer is None else shape[1:], dtype, read)

    def pieces(self, key: str) -> int:
        """In how many pieces a tensor is stored."""
        entry = self.reader.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return len(entry.chunks)

    def row_pieces(self, key: str) -> int:
        """In how many pieces the rows of each matrix of a tensor are stored: one or more for each tensor-parallel rank.

        Raises:
            ValueError: the pieces differ in size.
        """
        entry = self.reader.metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        sizes = sorted({chunk.sizes[-2] for chunk in entry.chunks})
        if len(sizes) != 1 or entry.size[-2] % sizes[0]:
            raise self.error(key, f"it is stored in pieces of {sizes} rows, so their order is unknown")
        return entry.size[-2] // sizes[0]


def _iteration(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no directory" if path.exists() else f"{path} does not exist")
    if (path / INFO_FILE).is_file():
        raise ValueError(f"{path} is a native checkpoint of mlora's: it needs no import")
    if (path / DIRECTORY).is_file():
        return path
    tracker = path / TRACKER_FILE
    if tracker.is_file():
        with tracker.open(encoding="utf-8", errors="replace") as file:
            text = file.read(64).strip()
        if not text.isdecimal():
            raise ValueError(f"{tracker} says {text!r}, which is no iteration")
        folder = path / f"iter_{int(text):07d}"
        if not (folder / DIRECTORY).is_file():
            raise FileNotFoundError(f"{folder} has no {DIRECTORY}, and {tracker.name} names it{_hint(path)}")
        return folder
    found = [child for child in path.iterdir() if _ITERATION.fullmatch(child.name) and (child / DIRECTORY).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} is no checkpoint of Megatron's: it has no {DIRECTORY}{_hint(path)}")
    return max(found, key=lambda child: int(child.name.removeprefix("iter_")))


def _hint(path: Path) -> str:
    peft = [name for name in (WEIGHTS_FILE, PICKLE_FILE) if (path / name).is_file()]
    return f"; its {peft[0]} is a PEFT adapter, which is imported as such" if peft else ""


def _check_format(folder: Path) -> None:
    file = folder / FORMAT_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {FORMAT_FILE}, so it was not written as torch_dist; no other format is read")
    backend = read_config(file).get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(f"{file}: sharded_backend is {json.dumps(backend)}; only torch_dist is read")
