"""Bytes on their way to disk while more are written."""

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import writeback
from parallel.writeback import WriteBack


def _write(path: Path, count: int) -> None:
    with WriteBack(path) as file:
        for _ in range(count):
            assert file.write(b"x" * 40) == 40


@pytest.fixture(autouse=True)
def every_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "EVERY", 100)


@pytest.mark.parametrize(("count", "syncs"), [(2, []), (3, [120]), (8, [120, 240])])
def test_what_is_written_is_synced_by_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, syncs: list[int]
) -> None:
    done: list[tuple[int, bool]] = []

    def fsync(descriptor: int) -> None:
        done.append((os.fstat(descriptor).st_size, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(os, "fsync", fsync)
    _write(tmp_path / "file", count)
    assert len(done) == len(syncs)
    assert all(size >= wanted and not is_main for (size, is_main), wanted in zip(done, syncs, strict=True))
    assert (tmp_path / "file").read_bytes() == b"x" * 40 * count


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="full"):
        _write(tmp_path / "file", 9)


def test_an_error_while_writing_is_the_one_that_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyError), WriteBack(tmp_path / "file") as file:
        file.write(b"x" * 200)
        raise KeyError
    assert file.closed


def test_the_kernel_is_given_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            given.append(memoryview(data).nbytes)
            return super().write(data)

    monkeypatch.setattr(writeback, "PIECE", 1 << 15)
    values = torch.arange(50_001.0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Raw(path, mode))
        with WriteBack(tmp_path / "file") as file:
            file.write(b"x")
            assert file.write(values.numpy().data) == values.nbytes
            assert file.write(b"") == 0
    assert (tmp_path / "file").read_bytes() == b"x" + values.numpy().tobytes()
    assert max(given) <= (1 << 15) + io.DEFAULT_BUFFER_SIZE < sum(given)


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="file"):
        WriteBack(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
