"""A safetensors file written tensor by tensor, so that memory holds one at a time; safetensors' own function wants them all."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from parallel.writeback import WriteBack

# Names of element types in the format (huggingface/safetensors, README).
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(
    path: Path, entries: Sequence[tuple[str, Sequence[int], torch.dtype]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write a safetensors file: the bytes that ``safetensors.torch.save_file`` would write for one dtype.

    Args:
        entries: (name, shape, dtype) of each tensor, in order of names.
        tensors: the same in the same order; each is taken when the one before is written and gone.

    Raises:
        ValueError: a tensor is missing or left over, or has another shape or dtype than its entry.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype in entries:
        end = at + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with WriteBack(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        waiting = iter(tensors)
        for name, shape, dtype in entries:
            tensor = next(waiting, None)
            if tensor is None:
                raise ValueError(f"{path}: there is no tensor for {name}")
            if (list(tensor.shape), tensor.dtype) != (list(shape), dtype):
                raise ValueError(
                    f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, declared {dtype} {list(shape)}"
                )
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            del tensor  # Else it would live until the next one, which is made first; in zip() too.
        if next(waiting, None) is not None:
            raise ValueError(f"{path}: there are more tensors than names")
