"""Sharded files: written by some ranks, read by others."""

import resource
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from parallel.reader import Reader
from parallel.sizes import ParallelSizes
from parallel.storage import read, write
from tests.ranks import run_ranks

ROWS = (0, 3, 10, 11)  # of three ranks, which hold 3, 7 and 1 rows
TENSORS = {"a": ((11, 40), torch.float32), "b": ((11, 3), torch.bfloat16), "c": ((11, 1), torch.float64)}


def whole(name: str) -> torch.Tensor:
    shape, dtype = TENSORS[name]
    return torch.arange(shape[0] * shape[1]).reshape(shape).to(dtype) + ord(name)


def piece(name: str, first: int, count: int, replica: int = 0) -> ShardedTensor:
    data = whole(name)[first : first + count].clone()
    return ShardedTensor(name, data, data.dtype, tuple(data.shape), TENSORS[name][0], (first, 0), None, replica)


def write_files(rank: int, folder: Path) -> None:
    state = {
        "tensors": {name: piece(name, ROWS[rank], ROWS[rank + 1] - ROWS[rank]) for name in ("a", "b")},
        "replicated": {0: piece("c", 0, 11, replica=rank)},
        "object": ShardedObject("object", {"rank": rank}, (3,), (rank,)),
        "plain": {"lr": 0.1, "betas": (0.9, 0.999), "steps": [1, 2]},
    }
    write(state, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that three ranks wrote."""
    path = tmp_path_factory.mktemp("files")
    run_ranks(3, write_files, path, sizes=ParallelSizes())
    return path


@pytest.mark.parametrize(("first", "count"), [(0, 11), (2, 2), (3, 7), (9, 2), (10, 1), (4, 0)])
def test_pieces_across_the_pieces_of_the_files(folder: Path, first: int, count: int) -> None:
    wanted = {"tensors": {"a": piece("a", first, count)}, "object": ShardedObject("object", None, (3,), (1,))}
    before = wanted["tensors"]["a"].data.fill_(7)  # type: ignore[index]
    loaded = read(wanted, folder)
    assert torch.equal(loaded["tensors"]["a"], whole("a")[first : first + count])
    assert (before == 7).all()  # the caller's tensors are left alone
    assert loaded["object"] == {"rank": 1}
    assert loaded["plain"] == {"lr": 0.1, "betas": (0.9, 0.999), "steps": [1, 2]}


def test_pieces_of_both_dimensions(folder: Path) -> None:
    wanted = ShardedTensor("a", None, torch.float64, (5, 7), (11, 40), (2, 30), None, 0)
    loaded = read({"a": wanted}, folder)["a"]
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded, whole("a")[2:7, 30:37].double())


def _write_padded(rank: int, folder: Path) -> None:
    """Pieces of 6 rows, the second with one row of padding, and the third with nothing else."""
    data = torch.full((6, 40), -1.0)
    real = whole("a")[6 * rank : 6 * rank + 6]
    data[: len(real)] = real
    write({"a": ShardedTensor("a", data, data.dtype, (6, 40), (11, 40), (6 * rank, 0), None, 0)}, folder)


def test_padding_is_not_written_and_reads_as_zero(tmp_path: Path) -> None:
    run_ranks(3, _write_padded, tmp_path, sizes=ParallelSizes())
    with Reader(tmp_path) as reader:
        assert reader.tensors() == {"a": TENSORS["a"]}
        assert torch.equal(reader.tensor("a"), whole("a"))
    for first, count in ((8, 5), (11, 3), (0, 20)):
        wanted = ShardedTensor("a", None, torch.float32, (count, 40), (11, 40), (first, 0), None, 0)
        loaded, real = read({"a": wanted}, tmp_path)["a"], whole("a")[first:]
        assert torch.equal(loaded[: len(real)], real) and not loaded[len(real) :].any()


def test_megatron_reads_the_directory(folder: Path) -> None:
    found = dist_checkpointing.load_tensors_metadata(str(folder))
    assert {key: (tensor.global_shape, tensor.dtype) for key, tensor in found.items()} == TENSORS


def _refused(rank: int, folder: Path) -> list[tuple[str, str]]:
    """(type, words) of the errors that this rank sees when it or another cannot write."""
    found = []

    def attempt(name: str, state: dict[str, Any], limited: int | None = None) -> None:
        if rank == 0:
            (folder / name).mkdir()
        if rank == limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(Exception) as caught:
            write(state, folder / name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        found.append((caught.type.__name__, str(caught.value)))

    half = {"a": piece("a", 6 * rank, 6 - rank)}
    for limited in (0, 1):
        attempt(f"full{limited}", half, limited)
    big = torch.zeros(1 << 16)  # longer than a buffer: the error comes from inside torch.save
    attempt("big", {"z": ShardedTensor("z", big, big.dtype, (1 << 16,), (1 << 17,), (rank << 16,), None, 0)}, limited=1)
    attempt("overlap", {"a": piece("a", 4 * rank, 7)})
    attempt("hole", {"a": piece("a", 7 * rank, 4)})
    attempt("object", half | {"object": ShardedObject("object", Fraction(1, 2) if rank else 1, (2,), (rank,))})
    return found


def test_a_rank_that_cannot_write_ends_every_rank(tmp_path: Path) -> None:
    one, other = run_ranks(2, _refused, tmp_path, sizes=ParallelSizes())
    assert one == other
    full0, full1, big, overlap, hole, unreadable = one
    for found, name in [(full0, "full0"), (full1, "full1"), (big, "big")]:
        assert found == ("OSError", f"[Errno 27] File too large: '{tmp_path / name}'")
    assert overlap[0] == hole[0] == unreadable[0] == "ValueError"
    assert "overlapping" in overlap[1] and "a" in hole[1]
    assert unreadable[1].startswith("object/shard_1_2 cannot be saved: it must be tensors and plain values only")
