"""Safetensors files: read as the library reads them, and every way in which a header can lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlora.conversion import safetensors_file
from mlora.conversion.safetensors_file import SafetensorsFile, Span, header_bytes

TENSORS = {
    "wide": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.randn(5, 3).bfloat16(),
    "number": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
    "eight": torch.randn(7).to(torch.float8_e4m3fn),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt", "who": "me"})
    return tmp_path / "x.safetensors"


def test_every_tensor_is_read_as_the_library_reads_it(written: Path) -> None:
    file = SafetensorsFile(written)
    assert file.metadata == {"format": "pt", "who": "me"}
    theirs = load_file(written)
    assert file.entries.keys() == theirs.keys()
    for key, value in theirs.items():
        ours = file.lazy(key).read()
        assert (ours.shape, ours.dtype) == (value.shape, value.dtype)
        assert torch.equal(
            ours.view(torch.uint8) if ours.ndim else ours, value.view(torch.uint8) if value.ndim else value
        )
        assert b"".join(bytes(piece.numpy()) for piece in file.pieces(key)) == bytes(
            value.reshape(-1).view(torch.uint8).numpy()
        )


def test_rows_and_blocks(written: Path) -> None:
    file = SafetensorsFile(written)
    assert torch.equal(file.read("wide", Span(1, 2, 32)), TENSORS["wide"][1:])
    for elements in (1, 4, 8, 100):
        blocks = list(file.blocks("wide", elements))
        assert torch.equal(torch.cat([rows for _, rows in blocks]), TENSORS["wide"])
        assert [span.first for span, _ in blocks] == list(range(0, 3, max(1, elements // 4)))
        assert [span.nbytes for span in file.spans("wide", elements)] == [rows.nbytes for _, rows in blocks]
    assert [rows.item() for _, rows in file.blocks("number", 10)] == [3]
    buffer = torch.empty(6, dtype=torch.uint8)
    rows = file.read("half", Span(2, 1, 6), buffer)
    assert torch.equal(rows, TENSORS["half"][2:3]) and rows.untyped_storage().data_ptr() == buffer.data_ptr()


def test_the_header_is_made_as_the_library_makes_it(written: Path) -> None:
    file = SafetensorsFile(written)
    made = header_bytes(file.entries, file.metadata)
    assert len(made) % 8 == 0
    copy = written.with_name("copy.safetensors")
    copy.write_bytes(made + written.read_bytes()[len(file.header) :])
    assert SafetensorsFile(copy).metadata == file.metadata
    assert {key: entry.shape for key, entry in SafetensorsFile(copy).entries.items()} == {
        key: entry.shape for key, entry in file.entries.items()
    }
    assert all(
        torch.equal(load_file(copy)[key].view(-1), value.view(-1)) for key, value in TENSORS.items() if key != "eight"
    )


def _file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "rule"),
    [
        ({"a": _entry(0, 4)}, b"123", "is truncated"),
        ({"a": _entry(0, 4)}, b"12345", "bytes behind its last tensor"),
        ({"a": _entry(0, 2), "b": _entry(1, 4)}, b"1234", "overlap"),
        ({"a": _entry(0, 2), "b": _entry(3, 4)}, b"1234", "gap"),
        ({"a": _entry(0, 4, [5])}, b"1234", "a is U8 [5], which does not fill its 4 bytes"),
        ({"a": _entry(0, 4, [2, -2])}, b"1234", "entry for a is malformed"),
        ({"a": _entry(4, 0, [4])}, b"1234", "entry for a is malformed"),
        ({"a": _entry(0, 4, "4")}, b"1234", "entry for a is malformed"),
        ({"a": _entry(0, 4, [True, 4])}, b"1234", "entry for a is malformed"),
        ({"a": {"dtype": "U8"}}, b"", "entry for a is malformed"),
        ({"a": 3}, b"", "entry for a is malformed"),
        ({"a": _entry(0, 4, dtype=7)}, b"1234", "entry for a is malformed"),
        ([1], b"", "is not a JSON object"),
        (b"{", b"", "is not valid JSON"),
        (b"[" * 100_000, b"", "is not valid JSON"),
        (b'{"a":%b,"a":%b}' % ((json.dumps(_entry(0, 4)).encode(),) * 2), b"1234", "'a' occurs twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings to strings"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path: Path, header: Any, data: bytes, rule: str) -> None:
    path = _file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and rule in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 30])
def test_a_file_cut_short_anywhere_is_named(written: Path, size: int) -> None:
    written.write_bytes(written.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated"):
        SafetensorsFile(written)


def test_headers_have_a_limit(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "HEADER_LIMIT", 20)
    with pytest.raises(ValueError, match=r"header of \d+ bytes; at most 20 are read"):
        SafetensorsFile(written)


def test_a_promised_header_of_huge_size_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ValueError, match="truncated"):
        SafetensorsFile(tmp_path / "x")


def test_a_dtype_that_torch_has_not_can_be_copied_but_not_read(tmp_path: Path) -> None:
    file = SafetensorsFile(_file(tmp_path / "x", {"a": _entry(0, 4, [8], "F4")}, b"1234"))
    assert bytes(next(file.pieces("a")).numpy()) == b"1234"
    with pytest.raises(ValueError, match="a is stored as F4, which cannot be read"):
        file.read("a")


def test_a_file_that_shrinks_while_it_is_read_is_named(written: Path) -> None:
    file = SafetensorsFile(written)
    written.write_bytes(written.read_bytes()[:-1])
    last = list(file.entries)[-1]
    with pytest.raises(ValueError, match=f"ends inside {last}"):
        file.read(last)
