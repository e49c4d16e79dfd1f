"""Errors of files name the file."""

import errno
from pathlib import Path

import pytest

from parallel.errors import naming


def test_an_error_without_a_name_gets_one(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, naming(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))


def test_a_name_is_kept_and_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, naming(tmp_path):
        (tmp_path / "other").read_text()
    assert raised.value.filename == str(tmp_path / "other")
    with pytest.raises(RuntimeError, match="its own words"), naming(tmp_path):
        raise RuntimeError("its own words")


def test_the_cause_behind_torchs_error_is_told(tmp_path: Path) -> None:
    """What torch's writer in C++ raises while the error of the disk is handled."""
    with pytest.raises(OSError, match="No space left") as raised, naming(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
    assert raised.value.filename == str(tmp_path)
