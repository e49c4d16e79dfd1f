"""Directories that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from mlora.conversion import output
from mlora.conversion.output import new_directory


def _fill(folder: Path, text: str = "new") -> None:
    (folder / "marker").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out"
    with new_directory(path, marker="marker") as partial:
        _fill(partial)
        assert not path.exists() and partial.parent == path.parent
    assert _names(path.parent) == ["out"] and _names(path) == ["inner", "marker"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_and_what_was_there(tmp_path: Path, error: BaseException) -> None:
    with new_directory(tmp_path / "out", marker="marker") as partial:
        _fill(partial, "old")
    for name, replace in (("out", True), ("other", False)):
        with pytest.raises(type(error)), new_directory(tmp_path / name, replace=replace, marker="marker") as partial:
            _fill(partial)
            raise error
    assert _names(tmp_path) == ["out"] and (tmp_path / "out" / "marker").read_text() == "old"


def test_only_its_own_kind_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", marker="marker") as partial:
        _fill(partial, "old")
    with pytest.raises(FileExistsError, match="exists already"), new_directory(tmp_path / "out", marker="marker"):
        pass
    with new_directory(tmp_path / "out", replace=True, marker="marker") as partial:
        _fill(partial)
        assert (tmp_path / "out" / "marker").read_text() == "old"
    assert _names(tmp_path) == ["out"] and (tmp_path / "out" / "marker").read_text() == "new"
    (tmp_path / "out" / "marker").unlink()
    for path in (tmp_path / "out", tmp_path / "out" / "inner" / "file"):
        with (
            pytest.raises(FileExistsError, match="holds no marker"),
            new_directory(path, replace=True, marker="marker"),
        ):
            pass
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty", replace=True, marker="marker") as partial:
        _fill(partial)
    assert _names(tmp_path / "empty") == ["inner", "marker"]


def test_inputs_are_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "base" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for path in ("base", "link", "base/new", ".", "base/../base"):
        directory = new_directory(tmp_path / path, replace=True, marker="x", keep=(tmp_path / "base",))
        with pytest.raises(ValueError, match="in each other's way"), directory:
            pass
    assert _names(tmp_path) == ["base", "link"]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_directory(tmp_path / "out", marker="marker") as partial:
        _fill(partial, "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).suffix == ".partial":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(output.os, "rename", fail)
    with pytest.raises(OSError, match="no"), new_directory(tmp_path / "out", replace=True, marker="marker") as partial:
        _fill(partial)
    assert _names(tmp_path) == ["out"] and (tmp_path / "out" / "marker").read_text() == "old"


def test_everything_is_on_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(output, "sync", lambda path: done.append(path.name))
    rename = os.rename
    monkeypatch.setattr(output.os, "rename", lambda source, target: (done.append("rename"), rename(source, target)))
    with new_directory(tmp_path / "out", marker="marker") as partial:
        _fill(partial)
        name = partial.name
    assert sorted(done[:4]) == sorted(["marker", "inner", "file", name])
    assert done[4:] == ["rename", tmp_path.name]
