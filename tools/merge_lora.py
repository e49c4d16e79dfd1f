"""Merge LoRA adapters into their base model: a Hugging Face directory that needs neither adapter nor mlora.

The base is streamed, so memory stays small whatever its size. The result has the shards, the index, the tokenizer and the
configuration of the base. Nothing appears under OUTPUT before it is complete.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mlora.conversion import AdapterState, open_adapter
from mlora.conversion.base import BaseModel
from mlora.conversion.merge import MergeReport, merge
from mlora_tools.console import progress, run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _weighted(text: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:WEIGHT``; a path that exists as it stands has no weight in it."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        return Path(text), 1.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="Hugging Face model, safetensors")
    parser.add_argument(
        "--adapter", type=_weighted, required=True, nargs="+", action="extend", metavar="PATH[:WEIGHT]",
        help="native checkpoint (or a folder of them: the newest) or PEFT directory; several are added up, weight 1 unless given",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the result; default: each tensor's in the base")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1; default: %(default)s")
    parser.add_argument(
        "--verify", action="store_true", help="read the result back and hold W' - W against the adapters"
    )
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is a model directory")
    return parser.parse_args(argv)


def _merge(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    _check_device(arguments.device)
    began = time.monotonic()
    adapters: list[tuple[AdapterState, float]] = [(open_adapter(path), weight) for path, weight in arguments.adapter]
    files = BaseModel(arguments.base).files.values()
    size = sum(file.path.stat().st_size for file in files)
    with progress(size * (2 if arguments.verify else 1), "merging") as advance:
        report = merge(
            arguments.base,
            adapters,
            arguments.output,
            dtype=DTYPES.get(arguments.dtype),
            replace=arguments.force,
            device=arguments.device,
            verified=arguments.verify,
            progress=advance,
        )
    _print(arguments.output, report, adapters, time.monotonic() - began)
    return 0


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _print(output: Path, report: MergeReport, adapters: Sequence[tuple[AdapterState, float]], seconds: float) -> None:
    for state, weight in adapters:
        print(f"{weight:g} x {state.source} ({state.layout})")
    print(f"{len(report.changed)} modules changed, {len(report.unchanged)} adapted by zero")
    if report.unties:
        print("the output layer was tied to the embedding; now it is a weight of its own (tie_word_embeddings: false)")
    if found := report.verification:
        print(
            f"verified {found.parameters} parameters; rounding took at most {found.rounding:.2%} of a delta ({found.module})"
        )
    print(f"{output} written in {seconds:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when OUTPUT is there."""
    return run(_merge, argv)


if __name__ == "__main__":
    sys.exit(main())
