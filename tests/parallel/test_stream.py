"""Files that one process writes are those that ranks write: for our reader, for torch's and for Megatron's."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy

from parallel.reader import Reader
from parallel.sizes import ParallelSizes
from parallel.storage import read, write
from parallel.stream import write_stream
from tests.ranks import run_ranks

TENSORS = {
    "a": torch.arange(48.0).view(8, 6),
    "b": torch.arange(35).view(5, 7).bfloat16(),
    "c": torch.tensor([1.5, -2.0], dtype=torch.float64),
    "slice": torch.arange(100.0).view(10, 10)[2:4, 3:],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    write_stream(iter(TENSORS.items()), path)
    return path


def _whole(key: str) -> ShardedTensor:
    tensor = TENSORS[key].contiguous()
    shape = tuple(tensor.shape)
    return ShardedTensor(key, tensor, tensor.dtype, shape, shape, (0,) * tensor.ndim, None, (0, 0, 0))


def _write(rank: int, folder: Path) -> None:
    write({"tensors": {key: _whole(key) for key in TENSORS}}, folder)


def test_a_rank_writes_the_same(folder: Path, tmp_path: Path) -> None:
    run_ranks(1, _write, tmp_path, sizes=ParallelSizes())
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert (folder / "metadata.json").read_text() == (tmp_path / "metadata.json").read_text()
    ours, theirs = Reader(folder).metadata, Reader(tmp_path).metadata
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for index, place in ours.storage_data.items():
        assert place.length == theirs.storage_data[index].length  # also of the slice: not of all that it is a slice of


def test_our_reader_and_torchs(folder: Path) -> None:
    with Reader(folder) as reader:
        assert {key: reader.tensor(key).tolist() for key in reader.tensors()} == {
            key: tensor.tolist() for key, tensor in TENSORS.items()
        }
    state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(folder), no_dist=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in TENSORS.items())


def _read(rank: int, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of "a", by our reader and by Megatron's."""
    piece = ShardedTensor("a", torch.zeros(4, 6), torch.float32, (4, 6), (8, 6), (4 * rank, 0), None, (0, 0, 0))
    ours = read({"a": piece}, folder)["a"]
    strategy: Any = get_default_load_sharded_strategy(str(folder))
    theirs = strategy.load({"a": piece}, folder)["a"]
    return ours, theirs


def test_ranks_read_their_pieces(folder: Path) -> None:
    assert dist_checkpointing.load_tensors_metadata(str(folder)).keys() == TENSORS.keys()
    for rank, pieces in enumerate(run_ranks(2, _read, folder)):
        for piece in pieces:
            assert torch.equal(piece, TENSORS["a"][4 * rank : 4 * rank + 4])


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    taken: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(5):
            tensor = torch.full((3,), float(number))
            taken.append(weakref.ref(tensor))
            yield str(number), tensor
            del tensor
            assert all(reference() is None for reference in taken)

    write_stream(tensors(), tmp_path)
    assert len(Reader(tmp_path).tensors()) == 5


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a is written twice"):
        write_stream([("a", torch.zeros(1)), ("a", torch.ones(1))], tmp_path)
