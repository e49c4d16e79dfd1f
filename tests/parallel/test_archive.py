"""Damage that torch.load would not notice, and tensors without torch.load that are the same as with it."""

import io
import zipfile
from typing import Any

import pytest
import torch

from parallel.archive import Loader, check_records


def _saved(value: Any) -> bytearray:
    stream = io.BytesIO()
    torch.save(value, stream)
    return bytearray(stream.getvalue())


VALUES: list[Any] = [
    torch.arange(1000.0),
    torch.arange(24).view(2, 3, 4).bfloat16(),
    torch.tensor(3.0),
    torch.empty(0, 5),
    torch.arange(12.0).view(3, 4).T,
    torch.arange(12.0)[3:7],
    torch.ones(3).expand(5, 3),
    torch.ones(3, requires_grad=True),
    torch.ones(3, dtype=torch.complex64).conj(),
    torch.nn.Parameter(torch.ones(4)),
    [{}],
    {"a": torch.ones(3), "b": [1, None]},
]


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_what_was_saved_is_loaded_the_first_time_and_later(number: int) -> None:
    value, loader = VALUES[number], Loader()
    for _ in range(3):
        found = loader.load(_saved(value))
        assert type(found) is type(value)
        torch.testing.assert_close(found, value, rtol=0, atol=0)
        if isinstance(value, torch.Tensor):
            assert found.requires_grad == value.requires_grad and found.is_conj() == value.is_conj()
            if value.is_contiguous():
                assert found.is_contiguous()


def test_tensors_of_one_shape_are_not_mixed_up() -> None:
    loader = Loader()
    values = [torch.full((4, 2), float(number)) for number in range(3)] + [torch.zeros(2, 4), torch.zeros(8).int()]
    found = [loader.load(_saved(value)) for value in values * 2]
    for value, loaded in zip(values * 2, found, strict=True):
        assert loaded.dtype == value.dtype and torch.equal(loaded, value)
    found[0].fill_(7)  # each has memory of its own
    assert torch.equal(found[5], values[0]) and torch.equal(found[6], values[1])


def test_only_the_first_of_a_kind_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, content = Loader(), [_saved(torch.full((4, 2), float(number))) for number in range(2)]
    loader.load(content[0])
    monkeypatch.setattr(torch, "load", None)
    second = loader.load(content[1])
    assert torch.equal(second, torch.ones(4, 2)) and second.untyped_storage().nbytes() == second.nbytes
    second.add_(1)  # and can be changed


def test_what_is_more_than_tensors_and_plain_values_is_refused() -> None:
    class Thing:
        pass

    Thing.__module__, Thing.__qualname__ = __name__, "Thing"
    globals()["Thing"] = Thing
    try:
        content = _saved(Thing())
    finally:
        del globals()["Thing"]
    with pytest.raises(Exception, match="Weights only load failed"):
        Loader().load(content)


def test_every_changed_byte_of_a_tensor_is_noticed() -> None:
    loader, content = Loader(), _saved(torch.full((64,), 0.5))
    loader.load(content)
    data = torch.full((64,), 0.5).numpy().tobytes()
    start = content.index(data)
    for at in range(start, start + len(data), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        torch.load(io.BytesIO(bytes(changed)), weights_only=True)  # says nothing
        with pytest.raises(ValueError, match=r"wrong checksum of .*data/0"):
            loader.load(changed)


def test_records_that_are_compressed_or_no_archive() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 100)
    with pytest.raises(ValueError, match=r"wrong checksum of a/data\.pkl"):
        check_records(bytearray(stream.getvalue()))
    for content in (b"nothing", b""):
        with pytest.raises(zipfile.BadZipFile):
            check_records(bytearray(content))
