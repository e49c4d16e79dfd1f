"""Reading sharded files, damaged in every way, and with code in them that must not run."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as of_megatron
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallel.errors import DamagedError
from parallel.reader import PLAIN, Reader
from parallel.sizes import ParallelSizes
from parallel.stream import write_stream
from tests.parallel.test_storage import TENSORS, whole, write_files
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that three ranks wrote."""
    path = tmp_path_factory.mktemp("files")
    run_ranks(3, write_files, path, sizes=ParallelSizes())
    return path


def test_plain_values_are_under_megatrons_key() -> None:
    assert ShardedObject("common_state", None, (1,), (0,)).unique_key == PLAIN


def test_whole_tensors_and_objects(folder: Path) -> None:
    with Reader(folder) as reader:
        assert reader.tensors() == TENSORS
        assert reader.tensors("b") == {"b": TENSORS["b"]}
        for name in TENSORS:
            assert torch.equal(reader.tensor(name), whole(name))
        assert reader.object("object/shard_2_3") == {"rank": 2}
        pieces = reader.metadata.state_dict_metadata
        assert [len(pieces[name].chunks) for name in TENSORS] == [3, 3, 1]  # no copy of what every rank holds
    assert sorted(path.name for path in folder.iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "metadata.json",
    ]  # fmt: skip


def _named_by_megatron(name: str, record: type, monkeypatch: pytest.MonkeyPatch) -> type:
    """A subclass of a record of torch's, which Megatron-Core had before 0.16."""
    made = type(name, (record,), {"__module__": of_megatron.__name__, "mcore_data": None})
    monkeypatch.setattr(of_megatron, name, made, raising=False)  # pickle looks it up
    return made


@pytest.mark.parametrize("old", [False, True], ids=["its plans", "its names before 0.16"])
def test_a_directory_that_megatron_wrote(
    folder: Path, tmp_path: Path, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own writer leaves the ranks' plans in the directory, and once called two of torch's records its own."""
    shutil.copytree(folder, tmp_path / "files")
    path = tmp_path / "files" / ".metadata"
    size = torch.Size((3, 40))
    data = TensorWriteData(ChunkStorageMetadata(torch.Size((0, 0)), size), TensorProperties(dtype=torch.float32), size)
    items = [WriteItem(MetadataIndex("a", (0, 0)), WriteItemType.SHARD, tensor_data=data)]
    metadata, plan = pickle.loads(path.read_bytes()), SavePlan(items)
    if old:
        plan = _named_by_megatron("MCoreSavePlan", SavePlan, monkeypatch)(items)
        metadata = _named_by_megatron("MCoreMetadata", Metadata, monkeypatch)(**vars(metadata))
    metadata.all_local_plans = [plan]
    text = pickle.dumps(metadata)
    assert (b"MCoreMetadata" in text and b"MCoreSavePlan" in text) == old
    path.write_bytes(text)
    with Reader(tmp_path / "files") as reader:
        assert [found.items for found in reader.metadata.all_local_plans] == [items]  # type: ignore[attr-defined]
        for name in TENSORS:
            assert torch.equal(reader.tensor(name), whole(name))


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def _directory(folder: Path, change: Callable[[Metadata], Any]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


def _set_place(metadata: Metadata, key: str, offset: tuple[int, ...] | None, place: _StorageInfo) -> None:
    assert MetadataIndex(key, offset) in metadata.storage_data
    metadata.storage_data[MetadataIndex(key, offset)] = place


def _truncate(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    """One bit in the middle of the numbers of a, rank 1's piece."""
    place = pickle.loads((folder / ".metadata").read_bytes()).storage_data[MetadataIndex("a", (3, 0))]
    content = bytearray((folder / place.relative_path).read_bytes())
    at = content.index(whole("a")[5].numpy().tobytes(), place.offset) + 2
    content[at] ^= 1
    (folder / place.relative_path).write_bytes(bytes(content))


def _bomb_in_tensor(folder: Path) -> None:
    torch.save(Bomb(folder / "ran"), folder / "bomb")
    place = _StorageInfo("bomb", 0, (folder / "bomb").stat().st_size)
    _directory(folder, lambda metadata: _set_place(metadata, "a", (3, 0), place))


def _bomb_in_object(folder: Path) -> None:
    torch.save([Bomb(folder / "ran")], folder / "bomb")
    place = _StorageInfo("bomb", 0, (folder / "bomb").stat().st_size)
    _directory(folder, lambda metadata: _set_place(metadata, "object/shard_1_3", None, place))


def _without_piece(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["a"].chunks[1]


def _other_piece(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("a", (3, 0))] = metadata.storage_data[MetadataIndex("a", (0, 0))]


def _outside(metadata: Metadata) -> None:
    _set_place(metadata, "a", (3, 0), _StorageInfo("../secret", 0, 1))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, r"__1_0\.distcp is truncated"),
    "missing": (lambda folder: (folder / "__2_0.distcp").unlink(), r"__2_0\.distcp is missing"),
    "no directory": (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing"),
    "cut directory": (lambda folder: os.truncate(folder / ".metadata", 100), r"\.metadata cannot be read"),
    "empty directory": (lambda folder: os.truncate(folder / ".metadata", 0), r"\.metadata cannot be read"),
    "other pickle": (lambda folder: _directory(folder, lambda metadata: {"a": 1}), r"no directory of tensors"),
    "flipped bit": (_flip, r"__1_0\.distcp: a cannot be read: (Bad CRC|wrong checksum)"),
    "hole": (lambda folder: _directory(folder, _without_piece), r"280 elements of a are in no file"),
    "wrong piece": (
        lambda folder: _directory(folder, _other_piece),
        r"a piece of a has shape \[3, 40\], not \[7, 40\]",
    ),
    "path": (lambda folder: _directory(folder, _outside), r"names the file '\.\./secret'"),
    "code in directory": (
        lambda folder: _directory(folder, lambda metadata: Bomb(folder / "ran")),
        r"\.metadata cannot be read: it names (posix|os)\.system",
    ),
    "code in tensor": (_bomb_in_tensor, r"bomb: a cannot be read"),
    "code in object": (_bomb_in_object, r"bomb: object/shard_1_3 cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_code_does_not_run(folder: Path, tmp_path: Path, damage: str) -> None:
    do, words = DAMAGES[damage]
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    do(damaged)
    with pytest.raises(ValueError, match=words), Reader(damaged) as reader:
        for name in TENSORS:
            reader.tensor(name)
        reader.object("object/shard_1_3")
    assert not (damaged / "ran").exists()


def test_each_tensor_has_memory_of_its_own(folder: Path) -> None:
    with Reader(folder) as reader:
        found = [(name, reader.tensor(name)) for name in [*TENSORS, *TENSORS]]
        for name, tensor in found:
            assert torch.equal(tensor, whole(name))
            tensor.zero_()  # and it can be changed
        assert torch.equal(reader.tensor("a"), whole("a"))


def test_memory_is_used_again(folder: Path) -> None:
    with Reader(folder) as reader:
        for name in TENSORS:
            reader.tensor(name)  # The first of a kind is torch's.
            assert len({reader.tensor(name).data_ptr() for _ in range(4)}) == 1


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """What an earlier tensor of the same shape has left in memory is not taken for it."""
    write_stream([("first", torch.zeros(10_000)), ("second", torch.ones(10_000))], tmp_path)
    with Reader(tmp_path) as reader:
        assert torch.equal(reader.tensor("first"), torch.zeros(10_000))
        place = reader.metadata.storage_data[MetadataIndex("second", (0,))]
        os.truncate(tmp_path / place.relative_path, place.offset)
        with pytest.raises(DamagedError, match=r"__0_0\.distcp: second cannot be read: the file ends"):
            reader.tensor("second")


def test_what_is_not_there_is_named(folder: Path) -> None:
    with Reader(folder) as reader:
        for wrong, words in [
            (lambda: reader.tensor("d"), "there is no tensor d"),
            (lambda: reader.tensor("object/shard_0_3"), "there is no tensor object/shard_0_3"),
            (lambda: reader.object("object/shard_3_4"), "there is no object/shard_3_4"),
            (
                lambda: reader.fill("a", torch.empty(1, 40), (0, 0), (12, 40)),
                r"a has shape \[11, 40\], expected \[12, 40\]",
            ),
        ]:
            with pytest.raises(ValueError, match=words):
                wrong()
