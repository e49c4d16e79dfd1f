"""Batches: permutations of the rows, the same at every layout, and the mask of attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora.sft.batches import BatchPlan, EvalPlan, attention_mask, collate, micro_batches
from mlora.sft.packing import packed_rows
from mlora.sft.samples import Sample
from tests.philox import words

FIXED = settings(max_examples=100, deadline=None, derandomize=True)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**64 - 1))
@FIXED
def test_batches_one_after_the_other_are_permutations_of_the_rows(num_rows: int, size: int, seed: int) -> None:
    plan = BatchPlan(num_rows, size, seed)
    stream = np.concatenate([plan.rows(iteration) for iteration in range(4 * num_rows // size + 1)])
    assert stream.dtype == np.int64
    for epoch in range(len(stream) // num_rows):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    one, other = BatchPlan(200, 200, seed=0), BatchPlan(200, 200, seed=1)
    orders = [one.rows(0), one.rows(1), one.rows(2), other.rows(0), other.rows(1), np.arange(200)]
    for at, order in enumerate(orders):
        for later in orders[at + 1 :]:
            assert (order == later).sum() < 10


def test_resuming_is_asking_for_a_later_iteration() -> None:
    plan = BatchPlan(23, 4, seed=5)
    expected = [plan.rows(iteration).tolist() for iteration in range(30)]
    again = BatchPlan(23, 4, seed=5)
    for iteration in (29, 3, 17, 0):  # whatever was asked before
        assert again.rows(iteration).tolist() == expected[iteration]


def test_the_order_is_that_of_philox_words_under_seed_and_epoch() -> None:
    """So that a run also resumes under another NumPy."""
    for seed, epoch in ((7, 0), (2**64 - 1, 3)):
        stream = words((seed, epoch), 50)
        expected = sorted(range(50), key=lambda at: stream[at])
        assert BatchPlan(50, 50, seed).rows(epoch).tolist() == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 20))
@FIXED
def test_a_global_batch_is_the_same_at_every_layout(micro: int, dp: int, steps: int, iteration: int) -> None:
    rows = BatchPlan(31, micro * dp * steps, seed=1).rows(iteration)
    ranks = [micro_batches(rows, micro, rank, dp) for rank in range(dp)]
    assert [len(rank) for rank in ranks] == [steps] * dp
    assert np.concatenate([ranks[d][m] for m in range(steps) for d in range(dp)]).tolist() == rows.tolist()
    for m in range(steps):
        for d in range(dp):
            assert ranks[d][m].tolist() == rows[(m * dp + d) * micro :][:micro].tolist()


@given(st.integers(1, 30), st.integers(1, 9))
@FIXED
def test_evaluation_sees_every_row_once_and_then_filler(num_rows: int, size: int) -> None:
    plan = EvalPlan(num_rows, size)
    seen = np.concatenate([plan.rows(batch) for batch in range(plan.num_batches)]).tolist()
    assert seen == list(range(num_rows)) + [num_rows] * (len(seen) - num_rows)
    assert 0 <= len(seen) - num_rows < size
    for batch in (-1, plan.num_batches):
        with pytest.raises(ValueError, match=f"evaluation has {plan.num_batches} batches, there is no batch {batch}"):
            plan.rows(batch)


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        BatchPlan(0, 4, seed=0)
    with pytest.raises(ValueError, match="global_batch_size must be at least 1, got -1"):
        EvalPlan(4, -1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed must be in 0 to 2\*\*64 - 1, got {seed}"):
            BatchPlan(4, 4, seed=seed)
    with pytest.raises(ValueError, match="iteration must be at least 0, got -1"):
        BatchPlan(4, 4, seed=0).rows(-1)
    rows = np.arange(12)
    with pytest.raises(
        ValueError, match="global batch size 12 is not a multiple of micro batch size 5 times data-parallel size 1"
    ):
        micro_batches(rows, 5, 0, 1)
    with pytest.raises(ValueError, match="dp_rank must be in 0 to 1, got 2"):
        micro_batches(rows, 2, 2, 2)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, got 0"):
        micro_batches(rows, 0, 0, 1)
    with pytest.raises(ValueError, match="there is no row to collate"):
        collate([])


def rows_of(*lengths: int, seq_length: int = 12) -> list[dict[str, torch.Tensor]]:
    data = [Sample(np.arange(length, dtype=np.int32), np.arange(length) > 0) for length in lengths]
    return [collate([row]) for row in packed_rows(data, seq_length, 0)]


def test_rows_become_tensors() -> None:
    data = [Sample(np.arange(at, at + 5, dtype=np.int32), np.arange(5) > 2) for at in (10, 20, 30)]
    rows = packed_rows(data, 9, 0)
    batch = collate([rows[0], rows[1], rows[2]])
    dtypes = {name: value.dtype for name, value in batch.items()}
    int64 = torch.int64
    assert dtypes == {
        "tokens": int64,
        "labels": int64,
        "loss_mask": torch.float32,
        "segments": torch.int32,
        "position_ids": int64,
    }
    assert {value.shape for value in batch.values()} == {(3, 9)}
    assert batch["tokens"].tolist() == [[10, 11, 12, 13, 20, 21, 22, 23, 0], [30, 31, 32, 33, *[0] * 5], [0] * 9]
    assert batch["loss_mask"].sum(1).tolist() == [4, 2, 0]


def test_attention_stays_in_a_sample_and_looks_back_only() -> None:
    (batch,) = rows_of(5, 4, 3)  # 4, 3 and 2 places of 12
    masked = attention_mask(batch["segments"])
    assert masked.shape == (1, 1, 12, 12) and masked.dtype == torch.bool
    segments = batch["segments"][0].tolist()
    for query in range(12):
        for key in range(12):
            allowed = key <= query and segments[key] == segments[query]
            assert bool(masked[0, 0, query, key]) != allowed


def test_no_place_attends_to_nothing() -> None:
    """A softmax over nothing is NaN, in padding too, and a NaN there reaches every gradient."""
    segments = torch.tensor([[1, 1, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    masked = attention_mask(segments)
    assert not masked.all(dim=-1).any()
    assert not torch.diagonal(masked, dim1=-2, dim2=-1).any()
