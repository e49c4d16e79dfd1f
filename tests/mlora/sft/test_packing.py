"""Rows: whole samples, no label from another sample, and few rows."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora.sft.packing import Row, Rows, packed_rows, single_rows
from mlora.sft.samples import Sample

PAD = 99
FIXED = settings(max_examples=200, deadline=None, derandomize=True)


def sample(length: int, first: int = 100) -> Sample:
    """Tokens first, first + 1, …; every third is no target."""
    is_target = np.arange(length) % 3 != 0
    return Sample(np.arange(first, first + length, dtype=np.int32), is_target)


def samples(lengths: Sequence[int]) -> list[Sample]:
    """Samples of which no two share a token."""
    return [sample(length, 1000 * (at + 1)) for at, length in enumerate(lengths)]


def check_row(row: Row, members: Sequence[Sample], seq_length: int) -> None:
    """The row holds exactly these samples, in order, and padding."""
    start = 0
    for number, member in enumerate(members, start=1):
        end = start + len(member.tokens) - 1
        assert row.tokens[start:end].tolist() == member.tokens[:-1].tolist()
        assert row.labels[start:end].tolist() == member.tokens[1:].tolist()
        assert row.loss_mask[start:end].tolist() == member.is_target[1:].astype(float).tolist()
        assert row.segments[start:end].tolist() == [number] * (end - start)
        assert row.position_ids[start:end].tolist() == list(range(end - start))
        start = end
    padding = seq_length - start
    assert row.tokens[start:].tolist() == row.labels[start:].tolist() == [PAD] * padding
    assert not row.loss_mask[start:].any() and not row.segments[start:].any() and not row.position_ids[start:].any()
    dtypes = {
        "tokens": "int64",
        "labels": "int64",
        "loss_mask": "float32",
        "segments": "int32",
        "position_ids": "int64",
    }
    assert {name: str(getattr(row, name).dtype) for name in dtypes} == dtypes
    assert {getattr(row, name).shape for name in dtypes} == {(seq_length,)}


def test_one_sample_a_row() -> None:
    data = samples([2, 9, 5])
    rows = single_rows(data, 8, PAD)
    assert len(rows) == 3
    for row, member in zip(rows, data, strict=True):
        check_row(row, [member], 8)


@given(st.lists(st.integers(2, 17), min_size=1, max_size=40))
@FIXED
def test_packing_keeps_every_sample_whole_and_once(lengths: list[int]) -> None:
    data = samples(lengths)
    rows = packed_rows(data, 16, PAD)
    assert sorted(member for members in rows.bins for member in members) == list(range(len(data)))
    for row, members in zip(rows, rows.bins, strict=True):
        check_row(row, [data[member] for member in members], 16)


@given(st.lists(st.integers(2, 17), min_size=1, max_size=40))
@FIXED
def test_rows_and_the_samples_in_them_stand_in_the_order_of_the_data(lengths: list[int]) -> None:
    bins = packed_rows(samples(lengths), 16, PAD).bins
    assert [list(members) for members in bins] == sorted(sorted(members) for members in bins)


def fewest(places: list[int], capacity: int) -> int:
    """The number of rows that the best packing takes, by trying all."""

    def place(rest: list[int], spaces: tuple[int, ...], best: int) -> int:
        if not rest:
            return min(best, len(spaces))
        if len(spaces) >= best:
            return best
        need, later = rest[0], rest[1:]
        for at in {space: at for at, space in enumerate(spaces) if space >= need}.values():
            best = place(later, (*spaces[:at], spaces[at] - need, *spaces[at + 1 :]), best)
        return place(later, (*spaces, capacity - need), best)

    return place(sorted(places, reverse=True), (), len(places))


@given(st.lists(st.integers(2, 17), min_size=1, max_size=9))
@FIXED
def test_rows_are_few(lengths: list[int]) -> None:
    rows = packed_rows(samples(lengths), 16, PAD)
    assert len(rows) <= 11 / 9 * fewest([length - 1 for length in lengths], 16) + 4
    used = [sum(lengths[member] - 1 for member in members) for members in rows.bins]
    assert all(one + other > 16 for at, one in enumerate(used) for other in used[at + 1 :])  # no two rows fit in one


def spaces_of_best_fit(places: Sequence[int], capacity: int) -> list[int]:
    """What best fit, longest first, leaves free in each row: its definition, in quadratic time. Ties do not matter to it."""
    spaces: list[int] = []
    for need in sorted(places, reverse=True):
        fitting = [space for space in spaces if space >= need]
        chosen = min(fitting, default=capacity)
        if fitting:
            spaces.remove(chosen)
        spaces.append(chosen - need)
    return sorted(spaces)


@given(st.lists(st.integers(2, 33), min_size=1, max_size=60))
@FIXED
def test_packing_is_best_fit_longest_first(lengths: list[int]) -> None:
    bins = packed_rows(samples(lengths), 32, PAD).bins
    spaces = [32 - sum(lengths[member] - 1 for member in members) for members in bins]
    assert sorted(spaces) == spaces_of_best_fit([length - 1 for length in lengths], 32)


def test_a_large_set_is_packed_nearly_full_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    lengths = np.random.RandomState(0).gamma(2, 60, size=20_000).astype(int).clip(2, 513)
    data = [sample(int(length)) for length in lengths]
    with caplog.at_level(logging.INFO, logger="mlora.sft.packing"):
        rows = packed_rows(data, 512, PAD)
    full = (lengths - 1).sum() / (len(rows) * 512)
    assert full > 0.995
    assert caplog.messages == [f"20000 samples in {len(rows)} rows of 512, {100 * full:.1f} % full"]


def test_the_row_behind_the_last_is_padding_and_others_are_errors() -> None:
    rows = single_rows(samples([3, 4]), 5, PAD)
    check_row(rows[2], [], 5)
    check_row(rows[np.int64(1)], [samples([3, 4])[1]], 5)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"row {index} of 2"):
            rows[index]


@pytest.mark.parametrize("make", [single_rows, packed_rows])
def test_samples_that_fit_no_row_are_errors(make: "type[Rows]") -> None:
    with pytest.raises(ValueError, match="there is no sample to put into rows"):
        make([], 8, PAD)
    for lengths, at, count in (([3, 10], 1, 10), ([1, 3], 0, 1)):
        with pytest.raises(ValueError, match=f"sample {at} has {count} tokens; a row of seq_length 8 takes 2 to 9"):
            make(samples(lengths), 8, PAD)  # type: ignore[arg-type]
