"""The adapter's norms as a table, projections by layers, at the iterations that recorded them."""

import re
from dataclasses import dataclass
from typing import Any

from mlora_tools.recording import Recording

_IN_A_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.(.*)")
MOST_TIMES = 24  # that the page can go through
MEASURES = {"BA/W": "‖BA‖ / ‖W‖", "BA": "‖BA‖", "B": "‖B‖", "A": "‖A‖"}


@dataclass(frozen=True)
class Heatmap:
    """Values of each measure by time, row and column; None where a layer has no such projection.

    Attributes:
        iterations: of the times.
        rows: projections.
        columns: layers.
        values: measure -> [time][row][column].
        greatest: (projection's full name, ‖BA‖/‖W‖), the five greatest at the last time.
    """

    iterations: list[int]
    rows: list[str]
    columns: list[int]
    values: dict[str, list[list[list[float | None]]]]
    greatest: list[tuple[str, float]]

    @classmethod
    def of(cls, recording: Recording) -> "Heatmap | None":
        """From the records; None if there are no norms among them."""
        found = {
            record["iteration"]: record["adapter_norms"] for record in recording.records if record.get("adapter_norms")
        }
        if not found:
            return None
        times = sorted(found)
        step = max(1.0, (len(times) - 1) / (MOST_TIMES - 1))
        times = sorted({times[round(step * number)] for number in range(min(len(times), MOST_TIMES))} | {times[-1]})
        places = {name: _place(name) for name in found[times[-1]]}
        rows = list(dict.fromkeys(row for row, _ in places.values()))
        columns = sorted({column for _, column in places.values()})
        values = {
            measure: [_matrix(found[time], measure, places, rows, columns) for time in times] for measure in MEASURES
        }
        ratios = {
            name: ratio for name, norms in found[times[-1]].items() if (ratio := _value(norms, "BA/W")) is not None
        }
        greatest = sorted(ratios.items(), key=lambda item: -item[1])[:5]
        return cls(times, rows, columns, values, greatest)

    @property
    def last(self) -> list[list[float | None]]:
        """‖BA‖/‖W‖ at the last time, by row and column."""
        return self.values["BA/W"][-1]

    @property
    def peak(self) -> float:
        """The greatest of them."""
        return max((value for row in self.last for value in row if value is not None), default=0.0) or 1.0

    def data(self) -> dict[str, Any]:
        """For the script that goes through times and measures."""
        return {"iterations": self.iterations, "values": self.values, "rows": self.rows, "columns": self.columns}


def _place(name: str) -> tuple[str, int]:
    """(row, layer) of a projection: "q_proj" and 3 of "model.layers.3.self_attn.q_proj"."""
    match = _IN_A_LAYER.fullmatch(name)
    if match is None:
        return name, 0
    parts = match[2].split(".")
    # A part of a module of several: "qkv_proj.q".
    return ".".join(parts[-2:]) if len(parts[-1]) <= 4 and "_" not in parts[-1] else parts[-1], int(match[1])


def _matrix(
    norms: dict[str, dict[str, float]],
    measure: str,
    places: dict[str, tuple[str, int]],
    rows: list[str],
    columns: list[int],
) -> list[list[float | None]]:
    matrix: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    for name, values in norms.items():
        if name in places:
            row, column = places[name]
            matrix[rows.index(row)][columns.index(column)] = _value(values, measure)
    return matrix


def _value(norms: dict[str, float], measure: str) -> float | None:
    try:
        value = norms["BA"] / norms["W"] if measure == "BA/W" else norms[measure]
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return float(f"{value:.4g}")
