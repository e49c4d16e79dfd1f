"""Imports without garbage collections."""

import gc

import pytest

from mlora_tools.imports import uncollected


def test_collections_go_on_after_the_import() -> None:
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    kept = [[] for _ in range(10)]  # type: ignore[var-annotated]
    with pytest.raises(ModuleNotFoundError), uncollected():
        assert not gc.isenabled()
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(kept)
