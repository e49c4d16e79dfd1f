"""Axes have round numbers around the values, and thinning loses no peak."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlora_tools.charts import MOST_POINTS, SIDE, Chart, Curve, smoothed, ticks

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False).map(lambda x: float(f"{x:.4g}"))


@given(NUMBERS, NUMBERS)
def test_ticks_enclose_the_values_at_equal_distances(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    steps = [after - before for before, after in pairwise(found)]
    assert min(steps) == pytest.approx(max(steps), rel=1e-3) and min(steps) > 0
    assert found[0] <= low + 1e-8 * min(steps) and found[-1] >= high - 1e-8 * min(steps)


def test_ticks_are_round() -> None:
    assert ticks(0, 15_000) == [0, 5000, 10_000, 15_000]
    assert ticks(0.97, 2.83) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert ticks(0, 2e-4) == [0, 5e-5, 1e-4, 1.5e-4, 2e-4]
    assert ticks(3, 3)[0] < 3 < ticks(3, 3)[-1] and ticks(0, 0)[0] < 0 < ticks(0, 0)[-1]


def test_a_long_curve_keeps_its_peaks_and_its_ends() -> None:
    random.seed(1)
    ys = [random.random() for _ in range(100_000)]
    ys[54_321], ys[12_345] = 9.0, -9.0
    chart = Chart("t", "", [Curve("c", range(1, 100_001), ys)], str)
    (thin,) = chart.curves
    assert len(thin.xs) <= MOST_POINTS + 2 and list(thin.xs) == sorted(set(thin.xs))
    assert {1, 100_000, 54_322, 12_346} <= set(thin.xs) and max(thin.ys) == 9.0 and min(thin.ys) == -9.0
    assert all(thin.ys[number] == ys[x - 1] for number, x in enumerate(thin.xs))


def test_a_curve_is_drawn_between_its_axes() -> None:
    chart = Chart("t", "", [Curve("c", [0, 5, 10], [1.0, 2.0, 3.0]), Curve("none", [], [])], str, from_zero=True)
    chart.x_range = (0, 10)
    assert len(chart.curves) == 1
    assert chart.y_range == (0, 3) and chart.path(chart.curves[0]) == f"M0 {SIDE * 2 / 3:.5g}L500 {SIDE / 3:.5g}L1000 0"
    assert dict(chart.y_labels())[0.0] == "3.0" and [text for _, text in chart.x_labels()] == [
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
    ]
    data = chart.data()["curves"]
    assert data[0]["text"] == ["1.0", "2.0", "3.0"] and data[0]["place"][-1] == 0


def test_smoothing_keeps_a_level_and_does_not_lag() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    rising = [float(number) for number in range(200)]
    assert smoothed(rising)[5:-5] == pytest.approx(rising[5:-5])
    assert smoothed([]) == [] and smoothed([1.0, 2.0]) == [1.0, 2.0]
    noise = [number % 2 for number in range(400)]
    assert max(smoothed(noise)) < 0.6
