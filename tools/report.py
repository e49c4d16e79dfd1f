"""Write one HTML page about a run: curves, configuration, ranks and what they send, norms of the adapter per layer.

The page needs nothing beside it and fetches nothing. It can be written while the run is going on; what is missing is said.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlora_tools.console import run
from mlora_tools.options import UsageError
from mlora_tools.recording import Recording
from mlora_tools.run_files import RunFiles
from mlora_tools.text_file import write_text


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="--output of the trainer")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    return parser.parse_args(argv)


def _report(argv: Sequence[str] | None) -> int:
    arguments = _arguments(argv)
    recording = Recording.read(arguments.run)
    try:
        from mlora_tools.page import render
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} not installed: pip install 'megatron-mlora[train]'") from None
    text = render(recording)
    path: Path = arguments.output or RunFiles(arguments.run).report
    write_text(path, text)
    for sentence in recording.missing:
        print(f"note: {sentence}", file=sys.stderr)
    print(path)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_report, argv)


if __name__ == "__main__":
    sys.exit(main())
