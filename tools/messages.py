"""Which messages a rank prints."""

import logging
import os
import sys
import warnings

OURS = ("mlora", "mlora_tools", "parallel")


def own_rank() -> int:
    """Of this process, before anything has looked at the environment: 0 without torchrun, and where RANK is no number."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def set_up_messages(rank: int) -> None:
    """On rank 0 ours from INFO on and others' from WARNING on; on the other ranks errors only.

    Levels are set on every rank: what ran before in this process may have left others.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger().setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Megatron's and torch's, to their developers; `python -W default` shows them.
