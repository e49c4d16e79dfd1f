"""Fine-tune a Hugging Face model with LoRA over tensor, sequence, pipeline and data parallelism: the command line.

See `--help`. The run itself is in `run`.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from mlora_tools.arguments import Arguments
from mlora_tools.failure import one_line_errors
from mlora_tools.options import UsageError

_NEEDED = ("transformers", "jinja2", "tqdm", "tensorboard", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """The trainer, on this rank; its exit code: 0, also after SIGTERM, 1, or 2 for a wrong command line."""
    rank = int(os.environ.get("RANK", 0))
    _set_up_logging(rank)
    with one_line_errors(rank) as outcome:
        arguments = Arguments.parse(argv)
        _check_installed(arguments)
        from mlora_tools.run import finetune  # Here, because it imports torch and Megatron, which takes seconds.

        finetune(arguments)
    return outcome.code


def _check_installed(arguments: Arguments) -> None:
    extras = {"train": _NEEDED, "wandb": ("wandb",) if arguments.reports.wandb_project else ()}
    for extra, names in extras.items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{', '.join(missing)} not installed: pip install 'megatron-mlora[{extra}]'")


def _set_up_logging(rank: int) -> None:
    """On rank 0 ours from INFO on and others' from WARNING on; on the other ranks errors only."""
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    if rank == 0:
        for name in ("mlora", "mlora_tools", "parallel"):
            logging.getLogger(name).setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Megatron's and torch's, to their developers; `python -W default` shows them.


if __name__ == "__main__":
    sys.exit(main())
