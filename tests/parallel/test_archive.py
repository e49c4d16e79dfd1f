"""Damage that torch.load would not notice."""

import io
import zipfile
from typing import Any

import pytest
import torch

from parallel.archive import check_records


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("value", [torch.arange(1000.0), [{}], {"a": torch.ones(3), "b": [1, None]}, torch.empty(0)])
def test_what_torch_saved_is_sound(value: Any) -> None:
    check_records(_saved(value))


def test_every_changed_byte_of_a_tensor_is_noticed() -> None:
    content = _saved(torch.full((64,), 0.5))
    data = torch.full((64,), 0.5).numpy().tobytes()
    start = content.index(data)
    for at in range(start, start + len(data), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        torch.load(io.BytesIO(bytes(changed)), weights_only=True)  # says nothing
        with pytest.raises(ValueError, match=r"wrong checksum of .*data/0"):
            check_records(bytes(changed))


def test_records_that_are_compressed_or_no_archive() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 100)
    with pytest.raises(ValueError, match=r"wrong checksum of a/data\.pkl"):
        check_records(stream.getvalue())
    with pytest.raises(zipfile.BadZipFile):
        check_records(b"nothing")
