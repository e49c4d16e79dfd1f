"""Fine-tune a Hugging Face model with LoRA over tensor, sequence, pipeline and data parallelism: the command line.

See `--help`. The run itself is in `run`.
"""

import importlib.util
import sys
from collections.abc import Sequence

from mlora_tools.arguments import Arguments
from mlora_tools.failure import one_line_errors
from mlora_tools.imports import uncollected
from mlora_tools.messages import own_rank, set_up_messages
from mlora_tools.options import UsageError

_NEEDED = ("transformers", "jinja2", "tqdm", "tensorboard", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """The trainer, on this rank; its exit code: 0, also after SIGTERM, 1, or 2 for a wrong command line."""
    rank = own_rank()
    set_up_messages(rank)
    with one_line_errors(rank) as outcome:
        arguments = Arguments.parse(argv)
        _check_installed(arguments)
        with uncollected():
            from mlora_tools.run import finetune  # Here, because it imports torch and Megatron, which takes seconds.

        finetune(arguments)
    return outcome.code


def _check_installed(arguments: Arguments) -> None:
    extras = {"train": _NEEDED, "wandb": ("wandb",) if arguments.reports.wandb_project else ()}
    for extra, names in extras.items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{', '.join(missing)} not installed: pip install 'megatron-mlora[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
