"""A file that is written while its next bytes are made."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mlora.conversion import write_behind
from mlora.conversion.write_behind import WriteBehind


def _bytes(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_file_holds_what_was_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "_SYNC_EVERY", 1000)
    wanted = b""
    with WriteBehind(tmp_path / "x") as file:
        file.write_bytes(b"head")
        for number, count in enumerate([5, 0, 3000, 1, 700, 3000, 2] * 5):
            buffer = file.buffer(count)
            buffer.copy_(_bytes(count, number))
            wanted += bytes(buffer.numpy())
            file.write(buffer)
    assert (tmp_path / "x").read_bytes() == b"head" + wanted


def test_a_buffer_is_given_out_again_only_when_it_has_been_written(tmp_path: Path) -> None:
    gate = threading.Event()
    with WriteBehind(tmp_path / "x") as file:
        append = file._append

        def slow(data: memoryview) -> None:
            gate.wait(10)
            append(data)

        file._append = slow  # type: ignore[method-assign]
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        for number in range(6):
            buffer = file.buffer(4)
            buffer.fill_(number)
            file.write(buffer)
    assert (tmp_path / "x").read_bytes() == bytes(number for number in range(6) for _ in range(4))


def test_a_file_that_is_there_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(FileExistsError):
        WriteBehind(tmp_path / "x")


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_failed_write_is_an_error(tmp_path: Path, count: int) -> None:
    def fail(data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), WriteBehind(tmp_path / "x") as file:
        file._append = fail  # type: ignore[method-assign]
        for _ in range(count):
            file.write(file.buffer(3))


def test_a_failed_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(write_behind.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"), WriteBehind(tmp_path / "x") as file:
        file.write_bytes(b"1")


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(write_behind.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:3])

    monkeypatch.setattr(write_behind, "FileIO", Slow)
    with WriteBehind(tmp_path / "x") as file:
        file.write_bytes(b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"
