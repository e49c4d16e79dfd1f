"""Import a LoRA adapter that Megatron-Bridge or ms-swift (mcore-bridge) saved in Megatron's torch_dist format.

It becomes a native checkpoint, to go on training it at any parallel layout, or a PEFT directory, or both. Read in one process,
without ranks and without running what a pickle holds. What is written appears when it is complete.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlora.conversion.megatron import read_megatron
from mlora.conversion.megatron_import import plan_megatron_import
from mlora.conversion.megatron_layout import LAYOUTS
from mlora.conversion.native_writer import write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.pretrained import Pretrained
from mlora_tools.console import progress, run
from mlora_tools.options import UsageError


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR",
        help="a checkpoint (iter_0000100), or a folder of them: the latest",
    )  # fmt: skip
    parser.add_argument("--format", choices=LAYOUTS, help="default: told from the keys")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR",
        help="base model's directory: its config.json, and the headers of its weights if they are there",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="CKPT", help="native checkpoint to make")
    parser.add_argument(
        "--peft", type=Path, metavar="DIR", help="PEFT directory to make, for every reader if it can be"
    )
    parser.add_argument(
        "--alpha", type=float, metavar="X",
        help="numerator of the scaling, where neither run_config.yaml nor args.json is there to tell it",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="replace CKPT and DIR if they are a native checkpoint and a PEFT directory"
    )
    return parser.parse_args(argv)


def _import(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    if not (arguments.output or arguments.peft):
        raise UsageError("nothing to make: give --output, --peft or both")
    began = time.monotonic()
    base = Pretrained.open(arguments.base)
    state = read_megatron(arguments.checkpoint, base, arguments.format, alpha=arguments.alpha)
    plan = plan_megatron_import(state, base)  # Also for a PEFT directory alone: it holds the adapter against the base.
    adapter = peft_adapter(state, "portable" if state.is_plain else "peft", base=base)
    size = sum(tensor.nbytes for tensor in plan.matrices.values())
    total = size * bool(arguments.output) + adapter.nbytes * bool(arguments.peft)
    with progress(total, "importing") as advance:
        if arguments.output:
            write_import(plan, arguments.output, replace=arguments.force, progress=advance)
        if arguments.peft:
            inputs = (state.source, base.path)
            write_peft(adapter, arguments.peft, replace=arguments.force, keep=inputs, progress=advance)
    ranks = ", ".join(map(str, sorted({module.rank for module in state.modules})))
    print(f"{state.layout}: {len(state.modules)} modules of rank {ranks}")
    for path in filter(None, (arguments.output, arguments.peft)):
        print(f"{path} written")
    print(f"{size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when what was asked for is there."""
    return run(_import, argv)


if __name__ == "__main__":
    sys.exit(main())
