"""A store for the ranks of one attempt, where torchrun starts them again after a failure.

torchrun keeps its store over restarts, and with it what the ranks of earlier attempts have left there: addresses of processes that
have ended, which their successors would wait for (pytorch issues 135712 and 167288). Its count of restarts cannot keep attempts
apart, because it is each host's own. So the ranks agree on a name of their own first.
"""

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_POLL_S = 0.05


def shares_store() -> bool:
    """Whether this process was given torchrun's own store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_of_attempt(rank: int, world: int, timeout: timedelta) -> Store:
    """torchrun's store under a prefix that only the ranks of this attempt know. Every rank calls it.

    Each process has a name that no other ever had. Rank 0 tells every process that has its name under a rank's number what its own
    is, until all ranks have answered with it: what ended processes have left there gets an answer that nobody reads.

    Raises:
        TimeoutError: some rank did not come; by number.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )
    name = uuid.uuid4().hex
    if rank == 0:
        _gather(store, name, world, timeout)
    else:
        store.set(f"attempt/rank/{rank}", name)
        name = store.get(f"attempt/answer/{name}").decode()
        store.set(f"attempt/{name}/{rank}", "here")
        store.add(f"attempt/{name}/count", 1)
    return PrefixStore(f"attempt/{name}", store)


def _gather(store: TCPStore, name: str, world: int, timeout: timedelta) -> None:
    """Tell the other ranks the name of rank 0 until all of them have heard it."""
    answered: dict[int, bytes] = {}
    end = time.monotonic() + timeout.total_seconds()
    while store.add(f"attempt/{name}/count", 0) < world - 1:
        for rank in range(1, world):
            key = f"attempt/rank/{rank}"
            if store.check([key]) and (other := store.get(key)) != answered.get(rank):
                store.set(f"attempt/answer/{other.decode()}", name)
                answered[rank] = other
        if time.monotonic() > end:
            absent = [str(rank) for rank in range(1, world) if not store.check([f"attempt/{name}/{rank}"])]
            raise TimeoutError(f"ranks {', '.join(absent)} have not started within {timeout}")
        time.sleep(_POLL_S)
