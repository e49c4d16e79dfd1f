"""What the ranks of a run print, whatever ran in the process before."""

import logging
import sys
from collections.abc import Iterator

import pytest

from mlora_tools.messages import OURS, own_rank, set_up_messages


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Puts back what a test changes of the process."""
    loggers = [logging.getLogger(name) for name in (None, *OURS)]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def printed(monkeypatch: pytest.MonkeyPatch, rank: int) -> list[str]:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    set_up_messages(rank)
    names = ["mlora.attach", "mlora_tools.run", "parallel.launch", "megatron.core", "another"]
    return [
        f"{name} {logging.getLevelName(level)}"
        for name in names
        for level in (logging.INFO, logging.WARNING, logging.ERROR)
        if logging.getLogger(name).isEnabledFor(level)
    ]


@pytest.mark.parametrize("before", [logging.NOTSET, logging.DEBUG, logging.INFO, logging.CRITICAL])
def test_levels_do_not_depend_on_what_ran_before(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    for name in (None, *OURS):
        logging.getLogger(name).setLevel(before)
    ours = [f"{name} {level}" for name in ("mlora.attach", "mlora_tools.run", "parallel.launch")
            for level in ("INFO", "WARNING", "ERROR")]  # fmt: skip
    others = [f"{name} {level}" for name in ("megatron.core", "another") for level in ("WARNING", "ERROR")]
    assert printed(monkeypatch, 0) == ours + others
    assert printed(monkeypatch, 1) == [line for line in ours + others if line.endswith("ERROR")]


@pytest.mark.parametrize(("given", "rank"), [(None, 0), ("3", 3), ("", 0), ("first", 0)])
def test_the_rank_of_a_wrong_environment_is_0_which_then_prints_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, given: str | None, rank: int
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if given is not None:
        monkeypatch.setenv("RANK", given)
    assert own_rank() == rank
