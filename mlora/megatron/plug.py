"""Where a Megatron script takes LoRA: its pre-wrap hook, or its model provider where there are no hooks."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from mlora.attach import apply
from mlora.description import read_info
from mlora.dropout import MicroBatch, set_micro_batch
from mlora.families import Family
from mlora.megatron.arguments import lora_config_from_args
from mlora.megatron.base import check_no_adapter, load_base
from mlora.megatron.chunk import check_description, save_adapter_only
from mlora.options import flag
from parallel.together import together

_UNSUPPORTED = {
    "ckpt_convert_format": "its checkpoints hold the adapter alone, in one format",
    "init_model_with_meta_device": "the base's weights must be there when the adapter is attached",
    "use_torch_fsdp2": "it divides the parameters itself",
    "use_megatron_fsdp": "it divides the parameters itself",
    "moe_use_upcycling": "the base is loaded before",
}


def pre_wrap_hook(chunks: list[torch.nn.Module], family: Family | None = None) -> list[torch.nn.Module]:
    """Megatron's pre-wrap hook (``cfg.model.pre_wrap_hooks``, from megatron-core 0.18 on): load the base, attach the adapter.

    The arguments are Megatron's global ones. Without one of LoRA's options it leaves the chunks as they are.

    Args:
        chunks: this rank's, unwrapped.
        family: as in :func:`mlora.apply`; None for Llama's names.

    Raises:
        FileNotFoundError, ValueError: there is no base, it does not fit, or an option makes no sense or cannot be combined with
            LoRA; without one of LoRA's options, a checkpoint to load holds an adapter; on every rank alike.
    """
    from megatron.training import get_args

    return _plug(get_args(), chunks, family)


def with_lora(
    model_provider: Callable[..., torch.nn.Module], family: Family | None = None
) -> Callable[..., torch.nn.Module]:
    """A model provider that does what :func:`pre_wrap_hook` does, for scripts whose Megatron has no hooks.

    Megatron asks for one chunk after another; the adapter is attached when the last of a rank's is made.
    """
    made: list[torch.nn.Module] = []

    @functools.wraps(model_provider)
    def provide(*positional: Any, **keywords: Any) -> torch.nn.Module:
        from megatron.training import get_args

        args = get_args()
        chunk = model_provider(*positional, **keywords)
        made.append(chunk)
        if len(made) == _chunks_of_a_rank(args):
            chunks = made.copy()
            made.clear()
            _plug(args, chunks, family)
        return chunk

    return provide


def _chunks_of_a_rank(args: Namespace) -> int:
    virtual = args.virtual_pipeline_model_parallel_size
    return virtual if virtual and args.pipeline_model_parallel_size > 1 else 1


def _plug(args: Namespace, chunks: list[torch.nn.Module], family: Family | None) -> list[torch.nn.Module]:
    config = lora_config_from_args(args)
    if config is None:
        check_no_adapter(args)
        return chunks
    _check_supported(args)
    resumed = load_base(args, chunks)
    apply(chunks, config, family=family)
    attached = save_adapter_only(chunks)
    if resumed is not None:
        check_description(together(lambda: read_info(resumed)), attached, f"--load {args.load}")
    if config.lora_dropout > 0:
        for chunk in chunks:
            chunk.register_forward_pre_hook(_Count(args))
    return chunks


def _check_supported(args: Namespace) -> None:
    if (args.save or args.load) and args.ckpt_format != "torch_dist":
        raise ValueError(
            f"--ckpt-format {args.ckpt_format}: adapter checkpoints are torch_dist's; leave the option out"
        )
    for option, why in _UNSUPPORTED.items():
        if getattr(args, option, None):
            raise ValueError(f"{flag(option)} cannot be combined with LoRA: {why}")


class _Count:
    """Before each forward pass of a chunk in training, says which rows of the global batch it holds: dropout needs to know.

    Every schedule runs a chunk's micro batches in order, and the data loader deals each micro step's rows out to the ranks.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.iteration = -1
        self.number = 0

    def __call__(self, chunk: torch.nn.Module, inputs: Any) -> None:
        if not chunk.training:
            return
        if self.args.curr_iteration != self.iteration:
            self.iteration, self.number = self.args.curr_iteration, 0
        place = self.number % get_num_microbatches() * parallel_state.get_data_parallel_world_size()
        row = (place + parallel_state.get_data_parallel_rank()) * self.args.micro_batch_size
        set_micro_batch(MicroBatch(step=self.iteration, first_row=row))
        self.number += 1
