"""What the tests of whole training runs share: models on disk, every layout's runs, and PEFT's of the same cases."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.peft_oracle import train_with_peft
from tests.ranks import run_ranks
from tests.tiny import write_model
from tests.training import LAYOUTS, Case, Run, Share, join, train_all

Shares = Callable[[str], list[dict[str, Share]]]


def write_models(folder: Path, cases: Mapping[str, Case], **changes: Any) -> dict[str, Path]:
    """Kind -> a model of it, for every kind among the cases; ``changes`` are fields of its configuration."""
    return {kind: write_model(folder / kind, kind, **changes) for kind in {case.kind for case in cases.values()}}


def shares_of(models: dict[str, Path], cases: dict[str, Case]) -> Shares:
    """Name of a layout -> every rank's share of every case. Each layout runs once."""

    @functools.cache
    def run(name: str) -> list[dict[str, Share]]:
        layout = LAYOUTS[name]
        return run_ranks(layout.world, train_all, models, cases, layout, sizes=layout.sizes)

    return run


def in_peft(models: dict[str, Path], cases: dict[str, Case], shares: Sequence[dict[str, Share]]) -> dict[str, Run]:
    """Every case in PEFT, from the weights that these ranks start from."""
    return {
        name: train_with_peft(models[case.kind], case, join([share[name] for share in shares]).initial)
        for name, case in cases.items()
    }
