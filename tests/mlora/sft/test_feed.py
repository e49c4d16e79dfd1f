"""A rank's micro batches: together those of all ranks are the global batch, whatever the layout."""

import numpy as np
import pytest
import torch

from mlora.sft.batches import BatchPlan, EvalPlan, attention_mask, collate
from mlora.sft.feed import Feed
from mlora.sft.packing import Rows, packed_rows, single_rows
from mlora.sft.samples import Sample

CPU = torch.device("cpu")


def data(count: int = 40) -> Rows:
    lengths = [3 + at * 7 % 11 for at in range(count)]
    samples = [
        Sample(np.arange(at * 50, at * 50 + n, dtype=np.int32), np.arange(n) >= 2) for at, n in enumerate(lengths)
    ]
    return packed_rows(samples, 14, 0)


def feed(rows: Rows, micro: int, rank: int, size: int, *, packed: bool = True) -> Feed:
    return Feed(rows, micro_batch_size=micro, dp_rank=rank, dp_size=size, device=CPU, packed=packed)


@pytest.mark.parametrize(("micro", "size"), [(1, 1), (8, 1), (2, 2), (1, 4), (2, 4)])
def test_the_ranks_micro_batches_are_the_global_batch(micro: int, size: int) -> None:
    rows = data()
    indices = BatchPlan(len(rows), 8, seed=3).rows(5)
    whole = collate([rows[index] for index in indices])
    segments = whole.pop("segments")
    whole["attention_mask"] = attention_mask(segments)
    seen = []
    for rank in range(size):
        batches = feed(rows, micro, rank, size).batch(indices)
        assert len(batches) == 8 // (micro * size)
        for batch in batches:
            place = slice(batch["first_row"], batch["first_row"] + micro)
            assert batch.keys() == {*whole, "first_row"}
            for name, value in whole.items():
                assert torch.equal(batch[name], value[place]), name
            seen += range(place.start, place.stop)
    assert sorted(seen) == list(range(8))


def test_rows_of_one_sample_need_no_mask_of_their_own() -> None:
    rows = data()
    (batch,) = feed(rows, 4, 0, 1, packed=False).batch(np.arange(4))
    assert batch["attention_mask"] is None


def test_joined_rows_are_told_by_the_ends_of_their_samples() -> None:
    rows = data()
    (masked,) = feed(rows, 4, 0, 1).batch(np.arange(4, 8))
    (joined,) = Feed(
        rows, micro_batch_size=4, dp_rank=0, dp_size=1, device=CPU, packed=True, joined=True
    ).batch(np.arange(4, 8))  # fmt: skip
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(joined[name], masked[name].view(1, -1)), name
    assert joined["attention_mask"] is None
    assert (joined["first_row"], joined["row_length"]) == (masked["first_row"], 14)
    ends = joined["cu_seqlens"]
    assert ends.dtype == torch.int32
    assert joined["max_seqlen"] == int(ends.diff().max()) <= 14
    own = torch.zeros(4 * 14, 4 * 14, dtype=torch.bool)  # Who may attend to whom, by the ends.
    for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        own[first:end, first:end] = torch.ones(end - first, end - first, dtype=torch.bool).tril()
    assert torch.equal(~own, torch.block_diag(*(~masked["attention_mask"][:, 0]).int()) == 0)


def test_filler_has_no_target() -> None:
    rows = data()
    plan = EvalPlan(len(rows), len(rows) + 3)
    last = feed(rows, 1, 0, 1).batch(plan.rows(0))[-3:]
    assert [float(batch["loss_mask"].sum()) for batch in last] == [0, 0, 0]
    assert [batch["first_row"] for batch in last] == [len(rows), len(rows) + 1, len(rows) + 2]


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="global batch size 6 is not a multiple of micro batch size 2 times data-parallel size 2"
    ):
        feed(data(), 2, 0, 2).batch(np.arange(6))


@pytest.mark.parametrize(("micro", "size"), [(1, 1), (2, 2)])
def test_rows_that_belong_together_stay_so_at_every_layout(micro: int, size: int) -> None:
    rows = single_rows([Sample(np.full(4, at, dtype=np.int32), np.arange(4) >= 2) for at in range(14)], 3, 99)
    items = np.array([5, 0, 6, 7])  # There are seven: the eighth stands for padding.
    seen: dict[int, int] = {}
    for rank in range(size):
        given = {"micro_batch_size": micro, "dp_rank": rank, "dp_size": size, "device": CPU, "packed": False}
        for batch in Feed(rows, **given, rows_of_item=2).batch(items):  # type: ignore[arg-type]
            seen |= {batch["first_row"] + row: int(tokens[0]) for row, tokens in enumerate(batch["tokens"])}
    assert seen == dict(enumerate([10, 11, 0, 1, 12, 13, 99, 99]))
