"""Import a Hugging Face PEFT LoRA adapter as a native checkpoint, to go on training it at any parallel layout.

Whatever made the adapter (PEFT, unsloth, LLaMA-Factory, TRL, ms-swift ...): any targets, ranks, alphas, rsLoRA, DoRA, dtypes.
Exporting the checkpoint with the peft profile gives the adapter back, bit for bit. OUTPUT appears when it is complete.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlora.conversion import open_adapter
from mlora.conversion.importing import plan_import
from mlora.conversion.native_writer import write_import
from mlora.pretrained import Pretrained
from mlora_tools.console import progress, run


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=Path, required=True, metavar="DIR", help="PEFT directory")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR",
        help="base model's directory: its config.json, and the headers of its weights if they are there",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="CKPT", help="native checkpoint to make")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is a native checkpoint")
    return parser.parse_args(argv)


def _import(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    began = time.monotonic()
    plan = plan_import(open_adapter(arguments.peft), Pretrained.open(arguments.base))
    size = sum(tensor.nbytes for tensor in plan.matrices.values())
    with progress(size, "importing") as advance:
        write_import(plan, arguments.output, replace=arguments.force, progress=advance)
    ranks = sorted({target.rank for target in plan.targets})
    print(
        f"{arguments.output} written in {time.monotonic() - began:.1f} s: {len(plan.keys)} modules, {size / 1e6:,.1f} MB, "
        f"rank {', '.join(map(str, ranks))}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when OUTPUT is there."""
    return run(_import, argv)


if __name__ == "__main__":
    sys.exit(main())
