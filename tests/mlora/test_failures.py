"""Saves that fail or are killed at every step, and loads of what is damaged or does not fit: every rank says the same,
earlier checkpoints stay whole and the model stays as it was."""

import builtins
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.attach import factors
from mlora.checkpoint import adapter_sharded_state, load_checkpoint, save_checkpoint
from mlora.description import INFO_FILE, checkpoints, latest_checkpoint
from parallel.sizes import ParallelSizes
from parallel.storage import write
from tests import gpt
from tests.ranks import TIMEOUT_S, run_ranks, world

PP2 = ParallelSizes(pipeline=2)
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def _model(config: LoraConfig = CONFIG) -> list[torch.nn.Module]:
    chunks: list[torch.nn.Module] = list(gpt.build(PP2, params_dtype=torch.float32, pipeline_dtype=torch.float32))
    mlora.apply(chunks, config)
    gpt.fill_adapter(chunks)
    return chunks


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for checkpoint in checkpoints(folder)
        for path in sorted(checkpoint.iterdir())
    }


@contextlib.contextmanager
def _failing(number: int | None, action: Callable[[str], None]) -> Iterator[list[str]]:
    """Call ``action`` instead of the ``number``-th call of this process that changes the disk; yields the calls made."""
    calls: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and "r" in (*args[1:2], kwargs.get("mode", "r"))[0]
            in_memory = name == "save" and isinstance(args[1], io.BytesIO)
            if not reads and not in_memory:
                calls.append(name)
                if len(calls) - 1 == number:
                    action(name)
            return original(*args, **kwargs)

        return call

    places = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (builtins, "open"), (pathlib.Path, "open")]
    places += [(pathlib.Path, "write_text"), (os, "unlink"), (os, "rmdir"), (torch, "save")]
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(patch.object(owner, name, wrap(name, getattr(owner, name))))
        yield calls


def _raise(name: str) -> None:
    raise OSError(28, f"no space for {name}")


def _fail_everywhere(rank: int, folder: Path, failing: int) -> list[str]:
    """Save again and again, the first time with a failure at the first step, until none is left to fail."""
    chunks = _model()
    save_checkpoint(folder, chunks, iteration=1)
    steps: list[str] = []
    for number in range(100):
        torch.distributed.barrier()
        before = _hashes(folder)
        with _failing(number if rank == failing else None, _raise) as calls:
            try:
                save_checkpoint(folder, chunks, iteration=2 + number, keep_last=2)
            except OSError as error:
                said = str(error)
            else:
                said = ""  # A step that may fail, such as making a folder that exists.
        _check_left(folder, before, 2 + number, failed=bool(said))
        reached = [len(calls) > number]
        torch.distributed.broadcast_object_list(reached, src=failing)
        if not reached[0]:
            return steps
        steps.append(said)
    raise AssertionError("it never ends")


def _check_left(folder: Path, before: dict[str, str], iteration: int, failed: bool) -> None:
    """What is listed is whole: earlier checkpoints unchanged, the new one complete or absent."""
    torch.distributed.barrier()
    after, new = _hashes(folder), f"iter_{iteration:07d}"
    files = [name for name in after if name.startswith(new)]
    assert {name: after[name] for name in after if name not in files}.items() <= before.items()
    if not files:
        assert failed and after == before and not (folder / f"{new}.partial").exists()
    # Else the failure, if any, came after the renaming: while an old one was removed.
    assert {len(list(checkpoint.iterdir())) for checkpoint in checkpoints(folder)} == {6}
    torch.distributed.barrier()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_at_any_step_on_either_rank(tmp_path: Path, failing: int) -> None:
    steps, other = run_ranks(2, _fail_everywhere, tmp_path, failing, sizes=PP2)
    assert steps == other
    names = {step.partition("no space for ")[2].partition(":")[0] for step in steps if step}
    everywhere = {"open", "save", "fsync"}
    assert names >= (everywhere if failing else everywhere | {"mkdir", "rename", "write_text", "unlink", "rmdir"}), (
        steps
    )
    assert len(checkpoints(tmp_path)) == 2
    assert not [path.name for path in tmp_path.iterdir() if path.suffix], "something unfinished was left"


def _die(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_and_die(rank: int, store: str, folder: Path, victim: int, number: int) -> None:
    """A rank of a world in which one is killed while it saves; the others leave their error in a file and exit with 1."""
    with world(rank, 2, store, PP2):
        chunks = _model()
        try:
            with _failing(number if rank == victim else None, _die):
                save_checkpoint(folder, chunks, iteration=2)
        except Exception as error:
            (folder / f"error{rank}").write_text(str(error))
            os._exit(1)
    os._exit(0)


def _save(rank: int, folder: Path, iteration: int) -> None:
    save_checkpoint(folder, _model(), iteration=iteration)


@pytest.mark.parametrize(("victim", "number"), [(1, 3), (0, 3), (0, 12)])
def test_a_killed_rank_leaves_the_last_checkpoint_and_the_next_save_works(
    tmp_path: Path, victim: int, number: int
) -> None:
    run_ranks(2, _save, tmp_path, 1, sizes=PP2)
    before = _hashes(tmp_path)
    context = multiprocessing.get_context("fork")
    store = str(tmp_path / "store")
    workers = [context.Process(target=_save_and_die, args=(rank, store, tmp_path, victim, number)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + TIMEOUT_S + 10
    for worker in workers:
        worker.join(max(0.1, deadline - time.monotonic()))
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, codes
    assert (tmp_path / f"error{1 - victim}").read_text()
    assert _hashes(tmp_path) == before
    assert (tmp_path / "iter_0000002.partial").is_dir() == (victim == 0)  # Rank 0 removes it, if it lives.
    run_ranks(2, _save, tmp_path, 3, sizes=PP2)
    assert [path.name for path in checkpoints(tmp_path)] == ["iter_0000001", "iter_0000003"]
    assert not list(tmp_path.glob("*.partial"))


def _caught(work: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(Exception) as caught:
        work()
    return caught.type.__name__, str(caught.value)


def _refused_saves(rank: int, folder: Path) -> list[tuple[str, str]]:
    chunks = _model()
    save_checkpoint(folder, chunks, iteration=5)
    found = [
        _caught(lambda: save_checkpoint(folder, chunks, iteration=5)),
        _caught(lambda: save_checkpoint(folder, chunks, iteration=6, keep_last=0)),
        _caught(lambda: save_checkpoint(folder, chunks, iteration=-1)),
        _caught(lambda: save_checkpoint(folder, chunks, iteration=6, adapter_name="other")),
        _caught(lambda: save_checkpoint(folder / "iter_0000005" / "mlora.json", chunks)),
        # Every rank on a disk of its own, as with a local path on several machines.
        _caught(lambda: save_checkpoint(folder / f"rank{rank}", chunks)),
    ]
    parameter = next(factors(chunks)).parameter
    if rank == 1:
        parameter.data[0, 0] = torch.inf
    found.append(_caught(lambda: save_checkpoint(folder, chunks, iteration=6)))
    return found


def test_saves_that_are_refused(tmp_path: Path) -> None:
    one, other = run_ranks(2, _refused_saves, tmp_path, sizes=PP2)
    assert one == other
    exists, keep, negative, adapter, inside, apart, infinite = one
    assert exists == ("FileExistsError", f"{tmp_path / 'iter_0000005'} exists already")
    assert keep[0] == negative[0] == "ValueError" and "keep_last 0" in keep[1] and "-1" in negative[1]
    assert adapter == ("ValueError", "there is no adapter 'other'; there is default")
    assert inside[0] in ("FileExistsError", "NotADirectoryError")
    assert apart[0] == "ValueError" and "__1_0.distcp is missing; all ranks must write to the same storage" in apart[1]
    assert infinite[1] == "not saved: 1 parameters are not finite: decoder.layers.2.self_attention.linear_qkv.q.lora_A"
    assert [path.name for path in checkpoints(tmp_path)] == ["iter_0000005"]


def _keep(rank: int, folder: Path) -> list[list[str]]:
    chunks, found = _model(), []
    for iteration, keep_last in [
        (1, None),
        (2, None),
        (3, 2),
        (4, 2),
        (10, 1),
        (5, 1),
        (6, 1),
        (9_999_999, 1),
        (10_000_000, 1),
    ]:
        save_checkpoint(folder, chunks, iteration=iteration, keep_last=keep_last)
        found.append([str(int(path.name.removeprefix("iter_"))) for path in checkpoints(folder)])
        torch.distributed.barrier()
    return found


def test_keep_last_never_removes_the_new_one_or_later_ones(tmp_path: Path) -> None:
    found = run_ranks(2, _keep, tmp_path, sizes=PP2)[0]
    # From 5 on: a run that went back to before 10 and keeps what it has not reached yet.
    assert found == [
        ["1"],
        ["1", "2"],
        ["2", "3"],
        ["3", "4"],
        ["10"],
        ["5", "10"],
        ["6", "10"],
        ["9999999"],
        ["10000000"],
    ]


def _write_infinite(rank: int, checkpoint: Path, infinite: Path) -> None:
    """A checkpoint with a value that is not finite, which save_checkpoint would not write."""
    chunks = _model()
    parameter = list(factors(chunks))[-1].parameter
    if rank == 0:
        shutil.copytree(checkpoint, infinite, ignore=shutil.ignore_patterns(".metadata", "*.distcp", "metadata.json"))
    else:
        parameter.data[0, 0] = torch.nan
    torch.distributed.barrier()
    write({"adapter": adapter_sharded_state(chunks)}, infinite)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of CONFIG."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(2, _save, folder, 1, sizes=PP2)
    return latest_checkpoint(folder)


def _edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / INFO_FILE
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no checkpoint": (shutil.rmtree, "FileNotFoundError", "no mlora checkpoint: it has no mlora.json"),
    "no information": (lambda path: (path / INFO_FILE).unlink(), "FileNotFoundError", "has no mlora.json"),
    "cut information": (lambda path: os.truncate(path / INFO_FILE, 50), "DamagedError", "mlora.json cannot be read"),
    "no object": (lambda path: (path / INFO_FILE).write_text("3"), "DamagedError", "mlora.json cannot be read"),
    "later format": (
        lambda path: _edit(path, lambda info: info.update(format=2)),
        "ValueError",
        "format 2; this version",
    ),
    "missing file": (lambda path: (path / "__1_0.distcp").unlink(), "DamagedError", "__1_0.distcp is missing"),
    "cut file": (lambda path: os.truncate(path / "__1_0.distcp", 900), "DamagedError", "__1_0.distcp is truncated"),
    "no directory": (lambda path: (path / ".metadata").unlink(), "DamagedError", ".metadata is missing"),
}
OTHER_ADAPTERS: dict[str, tuple[LoraConfig, list[str]]] = {
    "missing": (
        LoraConfig(r=2, target_modules=["q_proj", "down_proj", "model.layers.3.self_attn.o_proj"]),
        ["it lacks adapter.decoder.layers.3.self_attention.linear_proj.whole.lora_A"],
    ),
    "left over": (
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], exclude_modules=["model.layers.2.mlp.down_proj"]),
        ["it holds adapter.decoder.layers.2.mlp.linear_fc2.whole.lora_B, which the adapter has not"],
    ),
    "other rank": (
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.3.mlp.down_proj": 3}),
        ["adapter.decoder.layers.3.mlp.linear_fc2.whole.lora_A has shape [2, 48], in the adapter [3, 48]"],
    ),
    "many": (LoraConfig(r=1), ["and", "more"]),
}  # fmt: skip


def _refused_loads(
    rank: int, damaged: dict[str, Path], good: Path
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, str]]]:
    """What each damaged checkpoint, and the good one with each other adapter, is refused with."""

    def refusal(chunks: list[torch.nn.Module], checkpoint: Path) -> tuple[str, str]:
        before = [factor.parameter.detach().clone() for factor in factors(chunks)]
        found = _caught(lambda: load_checkpoint(checkpoint, chunks))
        assert all(torch.equal(old, factor.parameter) for old, factor in zip(before, factors(chunks), strict=True))
        return found

    chunks = _model()
    for factor in factors(chunks):
        factor.parameter.data.fill_(0.5)
    return (
        {name: refusal(chunks, path) for name, path in damaged.items()},
        {name: refusal(_model(config), good) for name, (config, _) in OTHER_ADAPTERS.items()},
    )


def test_loads_that_are_refused_change_nothing_and_say_the_same_on_every_rank(saved: Path, tmp_path: Path) -> None:
    damaged = {name: Path(shutil.copytree(saved, tmp_path / name)) for name in DAMAGES}
    for name, path in damaged.items():
        DAMAGES[name][0](path)
    infinite = tmp_path / "infinite"
    run_ranks(2, _write_infinite, saved, infinite, sizes=PP2)
    one, other = run_ranks(2, _refused_loads, damaged | {"infinite": infinite}, saved, sizes=PP2)
    assert one == other
    said, misfits = one
    assert said.pop("infinite") == (
        "ValueError",
        f"{infinite} is not loaded: 1 parameters are not finite: decoder.layers.3.mlp.linear_fc2.whole.lora_B",
    )
    for name, (kind, text) in said.items():
        assert kind == DAMAGES[name][1] and DAMAGES[name][2] in text and str(damaged[name]) in text, (name, text)
    for name, (kind, text) in misfits.items():
        assert kind == "ValueError" and text.startswith(f"{saved} does not fit the attached adapter: "), text
        assert all(words in text for words in OTHER_ADAPTERS[name][1]), text
