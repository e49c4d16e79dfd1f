"""Before any test module is imported."""

import gc
import os
import shutil

import pytest

# Without a GPU the kernels run in Triton's interpreter, which has to be asked for before anything imports Triton.
if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Several ranks run at a time: one thread each, unless somebody says otherwise. Threads that spin for each other's cores cost
# ten times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ranks that wake each other on another core cost a third more of the processors' time than ranks that take turns on one. So
# where pytest's processes fill the machine, each keeps to a core of its own with all that it starts.
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
worker = os.environ.get("PYTEST_XDIST_WORKER", "gw").removeprefix("gw")
if worker and 0 < len(cores) <= int(os.environ["PYTEST_XDIST_WORKER_COUNT"]):
    os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})

# What the modules make when they are imported stays: to look through it for garbage is a fifth of the time that it takes.
gc.disable()

# Files that take minutes go first, so that no process is left with one at the end. (Named before `tests` on the command line,
# they would be a part of it and keep their places.)
LONG = ("test_readme.py", "test_torchrun.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()
