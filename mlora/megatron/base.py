"""Where a Megatron script's base and adapter come from, and loading the base strictly before the adapter is attached.

| ``--pretrained-checkpoint`` | ``--load`` | |
|---|---|---|
| base | none, or an empty directory | a new adapter |
| base | adapter | the adapter goes on (with ``--finetune``: its weights only, from iteration 0) |
| none | base, with ``--finetune`` | a new adapter |

All else is an error.
"""

import contextlib
import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.modules.module import _IncompatibleKeys

from mlora.damage import newest_first
from mlora.description import ITERATION, PREFIX
from mlora.options import flag
from parallel.errors import DamagedError
from parallel.reader import DIRECTORY, FORMAT_FILE, Reader
from parallel.together import from_rank_zero

logger = logging.getLogger(__name__)

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...] | None]
# With these values of --dist-ckpt-strictness a base may hold more than the model.
_LENIENT = ("ignore_all", "log_all")


@dataclass(frozen=True)
class Source:
    """Where the base is.

    Attributes:
        option: the name of the argument that says it: ``pretrained_checkpoint`` or ``load``.
        checkpoint: the directory of its newest, or chosen, checkpoint.
        adapter: the checkpoint that Megatron will load the adapter from.
        step: its iteration, if it is not the one that Megatron would take: newer ones are damaged.
    """

    option: str
    checkpoint: Path
    adapter: Path | None
    step: int | None = None

    @classmethod
    def of(cls, args: Namespace) -> "Source":
        """From Megatron's arguments.

        Raises:
            FileNotFoundError: there is no checkpoint where one is named.
            ValueError: there is no base, no adapter checkpoint is whole, or the options contradict each other or what the
                checkpoints hold.
        """
        newest = _newest(args, "load")
        # What --load names may also be a base, which is Megatron's to judge.
        loaded = newest if newest is None or args.pretrained_checkpoint is None else _whole(args, newest)
        has_adapter = loaded is not None and _holds_adapter(loaded)
        if args.pretrained_checkpoint is None:
            if has_adapter:
                raise ValueError(
                    f"--load {args.load} holds an adapter without its base: give --pretrained-checkpoint too"
                )
            if loaded is None:
                raise ValueError(
                    "LoRA needs a base model: give its checkpoint as --pretrained-checkpoint"
                    + (f" (--load {args.load} holds none)" if args.load else "")
                )
            if not args.finetune:
                raise ValueError(
                    f"--load {args.load} holds no adapter to go on with: if it is the base, give it as --pretrained-checkpoint, or "
                    f"add --finetune"
                )
            return cls("load", loaded, None)
        base = _newest(args, "pretrained_checkpoint")
        if base is None:
            raise FileNotFoundError(f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint")
        if _holds_adapter(base):
            raise ValueError(f"--pretrained-checkpoint {args.pretrained_checkpoint} holds an adapter, not a base model")
        if loaded is not None and not has_adapter:
            raise ValueError(
                f"--load {args.load} holds no adapter, and --pretrained-checkpoint {args.pretrained_checkpoint} is the base: which "
                f"of them is it?"
            )
        step = int(loaded.name.removeprefix("iter_")) if loaded is not None and loaded != newest else None
        return cls("pretrained_checkpoint", base, loaded, step)


def load_base(args: Namespace, chunks: Sequence[torch.nn.Module]) -> Path | None:
    """Load the base weights by Megatron's own loader, and let Megatron's later loading know that it is done.

    Every rank calls it, with its unwrapped chunks, before an adapter is attached. Afterwards ``args`` names no base any more: what
    is left in ``args.load`` is the adapter's.

    Returns:
        The checkpoint that Megatron will load the adapter from, if there is one.

    Raises:
        FileNotFoundError, ValueError: as :meth:`Source.of`; a weight is missing, has another shape, or (unless
            ``--dist-ckpt-strictness`` is ignore_all or log_all) is left over: it is named. On every rank alike, except where a
            checkpoint in the older format ``torch`` lacks what one rank alone needs.
    """
    from megatron.training.checkpointing import load_checkpoint

    source = from_rank_zero(lambda: Source.of(args))
    if check_is_distributed_checkpoint(str(source.checkpoint)):
        _check_same(source, chunks, lenient=args.dist_ckpt_strictness in _LENIENT)
    with _only_weights(args, source):
        load_checkpoint([_Strict(chunk, source) for chunk in chunks], None, None, load_arg=source.option)
    setattr(args, source.option, None)
    if source.step is not None:
        args.ckpt_step = source.step
    if source.adapter is None and args.load is not None:
        # A first start. Only a non-persistent checkpoint can be there, which Megatron looks for in its own way.
        args.load = args.load if args.non_persistent_ckpt_type else None
        args.exit_on_missing_checkpoint = False
    return source.adapter


def check_no_adapter(args: Namespace) -> None:
    """For a script without one of LoRA's options. Every rank calls it.

    Raises:
        ValueError: a checkpoint that Megatron would load holds an adapter; on every rank alike.
    """
    option = from_rank_zero(lambda: _option_of_adapter(args))
    if option is not None:
        raise ValueError(
            f"{flag(option)} {getattr(args, option)} holds an adapter: give the --lora-... options that it was trained with"
        )


def _option_of_adapter(args: Namespace) -> str | None:
    for option in ("load", "pretrained_checkpoint"):
        with contextlib.suppress(FileNotFoundError):  # Megatron's to report.
            newest = _newest(args, option)
            if newest is not None and _holds_adapter(newest):
                return option
    return None


@contextlib.contextmanager
def _only_weights(args: Namespace, source: Source) -> Iterator[None]:
    """Megatron's arguments as they must be to load model weights and nothing else."""
    only: dict[str, Any] = {
        "finetune": True,
        "non_persistent_ckpt_type": None,
        "override_ckpt_iteration": None,
        "exit_on_missing_checkpoint": False,
    }
    if source.option == "pretrained_checkpoint":
        only["ckpt_step"] = None  # It is of --load.
    kept = {name: getattr(args, name) for name in only if hasattr(args, name)}
    vars(args).update(only)
    try:
        yield
    finally:
        for name in only:
            if name in kept:
                setattr(args, name, kept[name])
            else:
                delattr(args, name)


class _Strict(torch.nn.Module):
    """Stands for a chunk in Megatron's loader, which would try again without ``strict`` where keys are missing."""

    def __init__(self, chunk: torch.nn.Module, source: Source) -> None:
        super().__init__()
        self.chunk = [chunk]  # In a list, so that no key gets a prefix.
        self.source = source
        self.config = getattr(chunk, "config", None)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.chunk[0].sharded_state_dict(*args, **kwargs)  # type: ignore[operator]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.chunk[0].named_parameters(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = self.chunk[0].load_state_dict(state_dict, strict=False)
        wrong = [key for key in (*result.missing_keys, *result.unexpected_keys) if not key.endswith("_extra_state")]
        if wrong:
            raise ValueError(
                f"{self.source.checkpoint} is not this model's: {', '.join(wrong[:5])} is in one of them only"
            )
        return _IncompatibleKeys([], [])


def _newest(args: Namespace, option: str) -> Path | None:
    """The checkpoint that Megatron would load from the directory that an option names, if there is one.

    Raises:
        FileNotFoundError: the directory says that there is one, and there is not.
    """
    from megatron.training.checkpointing import checkpoint_exists, get_checkpoint_tracker_filename

    folder = getattr(args, option)
    if not checkpoint_exists(folder):
        return None
    # Megatron's own reading of it is a collective.
    newest = Path(get_checkpoint_tracker_filename(folder)).read_text(encoding="utf-8").strip()
    if option == "load" and getattr(args, "ckpt_step", None):
        newest = str(args.ckpt_step)
    name = f"iter_{int(newest):07d}" if newest.isdecimal() else newest
    if not (Path(folder) / name).is_dir():
        raise FileNotFoundError(f"{flag(option)} {folder} has no {name}")
    return Path(folder) / name


def _whole(args: Namespace, newest: Path) -> Path:
    """The newest checkpoint of ``--load`` that is whole, as far as can be seen without reading tensors; others are named.

    Raises:
        DamagedError: none is, or ``--ckpt-step`` asks for one that is not.
    """
    if not ITERATION.fullmatch(newest.name):
        return newest
    damaged = []
    for path in newest_first(newest.parent):
        if len(path.name) > len(newest.name) or path.name > newest.name:
            continue  # Megatron did not come to the end of saving it.
        try:
            _check_whole(path)
            return path
        except DamagedError as error:
            if args.ckpt_step:
                raise
            logger.error("checkpoint %s is damaged and is passed over: %s", path.name, error)
            damaged.append(str(error))
    raise DamagedError(
        f"no checkpoint in {args.load} is whole, so there is nothing to go on from: {'; '.join(damaged)}"
    )


def _check_whole(checkpoint: Path) -> None:
    if not (checkpoint / DIRECTORY).exists() and not any(checkpoint.glob("*.distcp")):
        return  # Of the older format.
    if not (checkpoint / FORMAT_FILE).is_file():
        raise DamagedError(f"{checkpoint / FORMAT_FILE} is missing")
    with Reader(checkpoint):
        pass


def _holds_adapter(checkpoint: Path) -> bool:
    return check_is_distributed_checkpoint(str(checkpoint)) and any(
        key.startswith(PREFIX) for key in _shapes(checkpoint)
    )


def _shapes(checkpoint: Path) -> Shapes:
    """Of the whole tensors in a checkpoint. Megatron's own function for it is a collective."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _check_same(source: Source, chunks: Sequence[torch.nn.Module], lenient: bool) -> None:
    stored = from_rank_zero(lambda: _shapes(source.checkpoint))
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    wanted: Shapes = {}
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        apply_factories(state)  # A gated MLP's first weight is two pieces of one.
        for piece in nested_values(state):
            if isinstance(piece, ShardedTensor):
                # The vocabulary is padded to the tensor-parallel size, and that may be another.
                wanted[piece.key] = None if piece.allow_shape_mismatch else tuple(piece.global_shape)
    group = parallel_state.get_model_parallel_group()
    everywhere: list[Shapes] = [{}] * group.size()
    dist.all_gather_object(everywhere, wanted, group=group)
    whole: Shapes = {key: shape for part in everywhere for key, shape in part.items()}
    problems = [f"it lacks {key}" for key in sorted(whole.keys() - stored.keys())]
    problems += [
        f"{key} has shape {stored[key]}, in the model {whole[key]}"
        for key in sorted(whole.keys() & stored.keys())
        if whole[key] is not None and stored[key] != whole[key]
    ]
    if not lenient:
        problems += [
            f"it holds {key}, which the model has not"
            for key in sorted(stored.keys() - whole.keys())
            if _is_weight(key)
        ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source.checkpoint} is not this model's base: {'; '.join(problems[:5])}{more}")


def _is_weight(key: str) -> bool:
    """No optimizer state: ``optimizer.state.exp_avg.decoder...``, ``chained_0.optimizer...``."""
    return "optimizer" not in key.split(".")[:2]
