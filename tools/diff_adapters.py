"""Compare two LoRA adapters, whatever their formats, ranks and scalings: do they add the same to the base?

Exit code 0 if they do, up to the tolerance, 1 if they do not, 2 if one cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlora.conversion import open_adapter
from mlora.conversion.difference import Difference, compare
from mlora_tools.console import progress, run

TOLERANCE = 1e-6  # what float32 arithmetic on factors leaves


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "first", type=Path, help="native checkpoint (or a folder of them: the newest) or PEFT directory"
    )
    parser.add_argument("second", type=Path, help="the same")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="X",
        help="greatest ||difference|| / ||larger|| of a module's product; default: %(default)g. bfloat16 copies need 1e-2",
    )  # fmt: skip
    return parser.parse_args(argv)


def _diff(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    first, second = open_adapter(arguments.first), open_adapter(arguments.second)
    with progress(sum(tensor.nbytes for tensor in first.tensors), "comparing") as advance:
        found = compare(first, second, advance)
    different = [difference for difference in found if not difference.relative <= arguments.tolerance]
    for difference in different:
        print(f"{difference.name}: {_words(difference)}")
    same = sum(difference.relative == 0 for difference in found)
    greatest = max((difference.relative for difference in found), default=0.0)
    print(
        f"{len(found)} modules and whole parameters: {same} the same, {len(found) - same - len(different)} within "
        f"{arguments.tolerance:g}, {len(different)} different; greatest relative difference {greatest:.3g}"
    )
    return 1 if different else 0


def _words(difference: Difference) -> str:
    number = f"relative difference {difference.relative:.3g}"
    return f"{number} ({difference.why})" if difference.why else number


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_diff, argv, failure=2)


if __name__ == "__main__":
    sys.exit(main())
