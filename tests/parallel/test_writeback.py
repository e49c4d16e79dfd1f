"""Bytes on their way to disk while more are written."""

import os
import threading
from pathlib import Path

import pytest

from parallel import writeback
from parallel.writeback import WriteBack


def _write(path: Path, count: int) -> None:
    with path.open("xb") as file, WriteBack(file) as write_back:
        for _ in range(count):
            file.write(b"x" * 40)
            write_back.wrote()


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
    with pytest.raises(KeyError), (tmp_path / "file").open("xb") as file, WriteBack(file) as write_back:
        file.write(b"x" * 200)
        write_back.wrote()
        raise KeyError
