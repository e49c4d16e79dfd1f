"""Export an adapter as a Hugging Face PEFT directory, from a native checkpoint of any parallel layout.

profiles:
  portable  one rank and one alpha for every module: loads in every reader of PEFT's format (the default)
  peft      ranks, alphas, rsLoRA and DoRA exactly as trained, or as they were imported
  sglang    portable, with zeros where SGLang would miss a projection
  peft-v5   portable, and for experts the configuration that PEFT needs under transformers 5
  vllm-3d   experts packed into one matrix, as vLLM's models with packed experts and PEFT read them

OUTPUT appears when it is complete and every --check-consumer has nothing to object to.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlora.conversion import open_adapter
from mlora.conversion.consumers import CONSUMERS, advice, require
from mlora.conversion.peft_directory import PeftDirectory
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import DTYPES, PROFILES, layer_count, peft_adapter
from mlora.pretrained import Pretrained
from mlora_tools.console import progress, run


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", type=Path, required=True, metavar="PATH",
        help="native checkpoint (or a folder of them: the newest) or PEFT directory",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="PEFT directory to make")
    parser.add_argument("--profile", choices=PROFILES, default="portable", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="of the tensors; default: each one's own, or float32 where folding a scaling into it would lose precision",
    )  # fmt: skip
    parser.add_argument(
        "--check-consumer", choices=CONSUMERS, nargs="+", action="extend", default=[],
        help="refuse to write what one of these programs would reject or ignore",
    )  # fmt: skip
    parser.add_argument(
        "--base", type=Path, metavar="DIR",
        help="base model's directory (its config.json is read): for the sglang and peft-v5 profiles, and for stricter checks",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is a PEFT directory")
    return parser.parse_args(argv)


def _export(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    began = time.monotonic()
    state = open_adapter(arguments.adapter)
    base = Pretrained.open(arguments.base) if arguments.base else None
    adapter = peft_adapter(state, arguments.profile, dtype=DTYPES.get(arguments.dtype), base=base)
    notes: list[str] = []

    def check(folder: Path) -> None:
        directory = PeftDirectory.open(folder, base, layer_count(state, base))
        for consumer in arguments.check_consumer:
            require(directory, consumer)
            note = advice(directory, consumer)
            notes.append(f"{CONSUMERS[consumer]} takes it{f'; {note}' if note else ''}")

    keep = (state.source, *((arguments.base,) if arguments.base else ()))
    with progress(adapter.nbytes, "exporting") as advance:
        write_peft(adapter, arguments.output, replace=arguments.force, keep=keep, check=check, progress=advance)
    for line in notes:
        print(line)
    config = adapter.config
    print(
        f"{arguments.output} written in {time.monotonic() - began:.1f} s: {len(adapter.tensors)} tensors, "
        f"{adapter.nbytes / 1e6:,.1f} MB, r {config['r']}, lora_alpha {config['lora_alpha']}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when OUTPUT is there."""
    return run(_export, argv)


if __name__ == "__main__":
    sys.exit(main())
