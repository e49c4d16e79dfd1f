"""The comparison with Hugging Face PEFT must see every fault: each of our collectives or marks, broken alone, fails it.

A fault stays for a whole training run. The faults of collectives are those of the tests of a single linear, where a table is
held complete against the source.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlora import LoraConfig, dora, linear
from mlora.attach import factors
from parallel import collectives
from parallel.sizes import ParallelSizes
from tests.mlora.test_linear import FAULTS, PLAIN, SP, doubled, missing_all_reduce
from tests.peft_oracle import train_with_peft
from tests.ranks import run_ranks
from tests.tiny import write_model
from tests.training import LAYOUTS, TOLERANCES, Case, Layout, Run, Share, adapt, failures, join, train

TENSOR = ["TP2", "TP2+SP"]
# DoRA has every collective of LoRA and one more.
CASE = Case(lora=LoraConfig(r=5, lora_alpha=10, init_lora_weights=False, use_dora=True), steps=3)
SITES = [fault[1:] for fault in FAULTS]
SITES += [(sizes, "row_norms", "all_reduce_", missing_all_reduce) for sizes in (PLAIN, SP)]
COLLECTIVES = {
    f"{name} in {site}, {fault.__name__}{', SP' * sizes.sequence_parallel}": (sizes, site, name, fault)
    for sizes, site, name, fault in SITES
}
Runs = tuple[dict[str, list[dict[str, Share]]], Run]
# Mark -> the value that is wrong for some of the parameters.
MARKS = {
    "sequence_parallel, dropped": ("sequence_parallel", False),
    "tensor_model_parallel, dropped": ("tensor_model_parallel", False),
    "tensor_model_parallel, on all": ("tensor_model_parallel", True),
}


@contextlib.contextmanager
def broken(site: str, name: str, fault: Any) -> Iterator[None]:
    """One of our collectives, broken where the function ``site`` calls it."""
    owner: Any = linear.LoraLinear if site == "forward" else dora if site == "row_norms" else linear
    original, whole = getattr(owner, site), getattr(collectives, name)

    def broken_site(*args: Any) -> Any:
        setattr(collectives, name, fault(whole) if fault is doubled else fault)
        try:
            return original(*args)
        finally:
            setattr(collectives, name, whole)

    setattr(owner, site, staticmethod(broken_site) if site == "forward" else broken_site)
    try:
        yield
    finally:
        setattr(owner, site, staticmethod(original) if site == "forward" else original)


def train_with_faults(rank: int, path: Path, layout: Layout) -> dict[str, Share]:
    """This rank's share of the run without a fault and with each of those that this layout can have."""
    found = {"": train(adapt(path, CASE, layout.sizes), CASE, layout)}
    for fault in faults(layout.sizes):
        if fault in COLLECTIVES:
            with broken(*COLLECTIVES[fault][1:]):
                found[fault] = train(adapt(path, CASE, layout.sizes), CASE, layout)
        else:
            chunks = adapt(path, CASE, layout.sizes)
            for factor in factors(chunks):
                setattr(factor.parameter, *MARKS[fault])
            found[fault] = train(chunks, CASE, layout)
    return found


def faults(sizes: ParallelSizes) -> list[str]:
    """Without sequence parallelism no parameter has its mark."""
    marks = [name for name in MARKS if sizes.sequence_parallel or MARKS[name][0] != "sequence_parallel"]
    sites = [name for name, site in COLLECTIVES.items() if site[0].sequence_parallel == sizes.sequence_parallel]
    return sites + marks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every rank's runs at each layout, and PEFT's run."""
    path = write_model(tmp_path_factory.mktemp("models") / "llama")
    made = {name: run_ranks(2, train_with_faults, path, LAYOUTS[name], sizes=LAYOUTS[name].sizes) for name in TENSOR}
    return made, train_with_peft(path, CASE, join([share[""] for share in made["TP2"]]).initial)


@pytest.mark.parametrize("layout", TENSOR)
def test_without_a_fault_the_run_is_pefts(runs: Runs, layout: str) -> None:
    made, reference = runs
    assert not failures(join([share[""] for share in made[layout]]), reference)


@pytest.mark.parametrize(
    ("layout", "fault"), [(name, fault) for name in TENSOR for fault in faults(LAYOUTS[name].sizes)]
)
def test_each_fault_is_seen(runs: Runs, layout: str, fault: str) -> None:
    made, reference = runs
    try:
        ours = join([share[fault] for share in made[layout]])
    except AssertionError as error:
        assert "differs between ranks" in str(error)
    else:
        assert any(error > 10 * TOLERANCES[name.partition(" ")[0]] for name, error in failures(ours, reference).items())
