"""The tensors of a Hugging Face directory, read slice by slice from any number of safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATING = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # safetensors' name of a dtype -> bytes


class Weights:
    """Every tensor of a directory: name, shape and file. Only headers are read until a slice is asked for.

    A context manager that lets go of the files at its end.

    Args:
        path: a directory with ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it names.

    Attributes:
        shapes: of every tensor by name.
        bytes: of all tensors.
        bytes_read: of the slices read so far.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is truncated or not what the index says; a tensor is not of a floating-point type.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        self._width: dict[str, int] = {}
        self.bytes_read = 0
        if (self._path / SINGLE_FILE).is_file():
            self._add_file(SINGLE_FILE, None)
        else:
            index = self._index()
            for file in sorted(set(index.values())):
                self._add_file(file, {name for name, where in index.items() if where == file})

    def _index(self) -> dict[str, str]:
        path = self._path / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{self._path} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of safetensors files: {error!r}") from error
        for name, file in index:
            if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                raise ValueError(f"{path}: {name} is in {file!r}; only files of the same directory are read")
        return dict(index)

    def _add_file(self, file: str, expected: set[str] | None) -> None:
        path = self._path / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, and {INDEX_FILE} names it")
        try:
            opened = safe_open(path, framework="pt")
            names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
            slices = {name: opened.get_slice(name) for name in names}  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if expected is not None and expected != slices.keys():
            name = min(expected ^ slices.keys())
            there = "lacks {}, which {} places there" if name in expected else "holds {}, which {} does not place there"
            raise ValueError(f"{path} {there.format(name, INDEX_FILE)}")
        self._files[file] = opened
        for name, piece in slices.items():
            if piece.get_dtype() not in _FLOATING:
                raise ValueError(
                    f"{path}: {name} is of type {piece.get_dtype()}; only {', '.join(_FLOATING)} can be loaded"
                )
            self._slices[name], self._where[name] = piece, file
            self.shapes[name] = tuple(piece.get_shape())
            self._width[name] = _FLOATING[piece.get_dtype()]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(shape).numel() * self._width[name] for name, shape in self.shapes.items())

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *exc: object) -> None:
        self._slices.clear()
        self._files.clear()

    def where(self, name: str) -> str:
        """The path of the file that holds a tensor."""
        return str(self._path / self._where[name])

    def read(self, name: str, first: int, count: int, column: int = 0, columns: int | None = None) -> torch.Tensor:
        """Rows [first, first + count) of a tensor, and of a matrix the columns [column, column + columns), on the CPU."""
        piece = self._slices[name]
        rows = slice(first, first + count)
        value: torch.Tensor = piece[rows] if columns is None else piece[rows, column : column + columns]
        self.bytes_read += value.numel() * self._width[name]
        return value

    def equal(self, name: str, other: str) -> bool:
        """Whether two matrices of one shape hold the same values."""
        step, rows = 4096, self.shapes[name][0]
        starts = ((first, min(step, rows - first)) for first in range(0, rows, step))
        return all(torch.equal(self.read(name, *start), self.read(other, *start)) for start in starts)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what a model needs.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        missing, left_over = sorted(expected.keys() - self.shapes.keys()), sorted(self.shapes.keys() - expected.keys())
        if missing:
            raise ValueError(f"{self._path} lacks {_some(missing)}")
        if left_over:
            raise ValueError(
                f"{self._path} holds {_some(left_over)}, which the model that config.json describes has not"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.where(name)}: {name} has shape {list(self.shapes[name])}; config.json asks for {list(shape)}"
                )


def _some(names: list[str]) -> str:
    more = len(names) - 1
    return f"{names[0]} and {more} other tensor{'s' * (more > 1)}" if more else names[0]
