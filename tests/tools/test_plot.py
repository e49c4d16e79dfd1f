"""The picture of the loss curve: there is one of whatever was recorded, and its axis says what the loss is a mean over."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from mlora_tools.plot import plot_losses

STEPS = [{"iteration": number, "loss": 1 / number, "grad_norm": 1.0} for number in range(1, 60)]
EVALUATIONS = [{"iteration": number, "eval_loss": 0.5} for number in (0, 59)]


@pytest.mark.parametrize("records", [[], STEPS, EVALUATIONS, STEPS[:1], [*STEPS, *EVALUATIONS]])
@pytest.mark.parametrize("unit", ["target token", "pair of answers"])
def test_whatever_was_recorded_has_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]], unit: str
) -> None:
    said: dict[str, Any] = {}
    label = Axes.set

    def listening(axes: Any, **texts: Any) -> Any:
        said.update(texts)
        return label(axes, **texts)

    monkeypatch.setattr(Axes, "set", listening)
    plot_losses(records, tmp_path / "loss.png", unit)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert said == {"xlabel": "iteration", "ylabel": f"loss [nats / {unit}]"}
