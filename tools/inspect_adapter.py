"""Look into a LoRA adapter: modules, shapes, ranks, scales, norms, how it was saved, and what is wrong with it.

Exit code 0 if nothing is wrong, 1 if something is, 2 if there is nothing to look at.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mlora.conversion import open_adapter
from mlora.conversion.base import BaseModel
from mlora.conversion.inspection import Inspection, ModuleFacts, inspect
from mlora_tools.console import progress, run


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "adapter", type=Path, help="native checkpoint (or a folder of them: the newest) or PEFT directory"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="hold it against this Hugging Face model: ||BA|| / ||W||, fit"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def _inspect(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    problems: list[str] = []
    state = open_adapter(arguments.adapter, problems.append)
    base = BaseModel(arguments.base) if arguments.base else None
    with progress(sum(tensor.nbytes for tensor in state.tensors), "reading") as advance:
        found = inspect(state, problems, base, advance)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)
    return 1 if found.problems else 0


def _print(found: Inspection) -> None:
    print(f"{found.source}: {found.layout}")
    print(f"{found.parameters:,} parameters, {found.nbytes / 1e6:,.1f} MB")
    if found.modules:
        print()
        print("\n".join(_table(found.modules)))
    for parameter in found.full:
        print(f"{parameter.name}: whole, {list(parameter.shape)} {parameter.dtype}, norm {parameter.norm:.4g}")
    print()
    for problem in found.problems:
        print(f"problem: {problem}")
    count = len(found.problems)
    print(f"{count or 'no'} problem{'s' * (count != 1)} found")


def _table(modules: Sequence[ModuleFacts]) -> list[str]:
    header = ["module", "out x in", "r", "scaling", "dtype", "|A|", "|B|", "|sBA|", "|sBA|/|W|"]
    columns = len(header) if any(module.relative is not None for module in modules) else len(header) - 1
    rows = [row[:columns] for row in (header, *map(_row, modules))]
    widths = [max(len(row[column]) for row in rows) for column in range(columns)]
    return ["  ".join(map(_cell, row, widths, header)).rstrip() for row in rows]


def _cell(text: str, width: int, column: str) -> str:
    return text.ljust(width) if column in ("module", "dtype") else text.rjust(width)


def _row(module: ModuleFacts) -> list[str]:
    return [
        module.name + (" (DoRA)" if module.dora else ""),
        f"{module.shape[0]} x {module.shape[1]}",
        str(module.rank),
        f"{module.scaling:.4g}",
        module.dtype,
        f"{module.norm_A:.4g}",
        f"{module.norm_B:.4g}",
        f"{module.norm_delta:.4g}",
        "-" if module.relative is None else f"{module.relative:.2e}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_inspect, argv, failure=2)


if __name__ == "__main__":
    sys.exit(main())
