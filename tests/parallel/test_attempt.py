"""Ranks that are started again and again on one store find each other, and never those of an attempt before."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from parallel.attempt import shares_store, store_of_attempt

SOON = timedelta(seconds=20)


def _work(rank: int, port: int, delay_s: float, result: Connection, size: int) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert shares_store()
    time.sleep(delay_s)
    try:
        store = store_of_attempt(rank, size, SOON)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=SOON)
        total = torch.tensor(rank + 1.0)
        dist.all_reduce(total)
        result.send((store.add("ranks that were here", 1), total.item()))
    except Exception as error:
        result.send(f"{type(error).__name__}: {error}")
    os._exit(0)  # As if killed: nothing is taken down.


def _attempt(port: int, delays_s: list[float], size: int) -> list[object]:
    """What each rank of an attempt found; ``delays_s`` of those that are started."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in delays_s]
    workers = [
        context.Process(target=_work, args=(rank, port, delay_s, send, size))
        for rank, (delay_s, (_, send)) in enumerate(zip(delays_s, pipes, strict=True))
    ]
    for worker in workers:
        worker.start()
    found = [receive.recv() if receive.poll(60) else "nothing" for receive, _ in pipes]
    for worker in workers:
        worker.kill()
        worker.join()
    return found


@pytest.fixture
def port() -> Iterator[int]:
    """Of a store that outlives the attempts, in this process."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield int(server.port)
    del server


def test_each_attempt_has_a_place_of_its_own(port: int) -> None:
    """Whoever comes first, and in a world of another size."""
    for delays_s in ([0, 0, 0], [0, 0.3, 0], [0.3, 0, 0], [0, 0.2]):
        found = _attempt(port, list(delays_s), len(delays_s))
        ranks = range(1, len(delays_s) + 1)
        assert sorted(map(str, found)) == [str((count, float(sum(ranks)))) for count in ranks]


def test_a_rank_that_never_comes_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _attempt(port, [0, 0], 2)  # Which leaves a name for rank 1.
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(TimeoutError, match="ranks 1, 2 have not started within 0:00:01"):
        store_of_attempt(0, 3, timedelta(seconds=1))


def test_without_torchruns_store_there_is_none_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert not shares_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not shares_store()
