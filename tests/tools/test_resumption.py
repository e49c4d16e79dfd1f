"""What is said of a run that torchrun may start anew."""

import pytest

from mlora_tools.resumption import warn_of_restarts


@pytest.mark.parametrize(
    ("restarts", "interval", "warns"), [("3", None, True), ("3", 100, False), ("0", None, False), (None, None, False)]
)
def test_a_run_that_a_restart_would_begin_again_is_warned(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    restarts: str | None,
    interval: int | None,
    warns: bool,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    warn_of_restarts(interval)
    assert ("without --save-interval they begin at iteration 0" in caplog.text) == warns
