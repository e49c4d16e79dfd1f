"""Collectives along the first dimension, for tensors of any size; a group of one is free.

They leave their input as it was, but for :func:`all_reduce_`. None of them has an autograd formula: they are called inside
``autograd.Function``s that state theirs.
"""

import torch
import torch.distributed as dist


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the group's ranks. ``[...]`` -> ``[...]``."""
    return tensor if group.size() == 1 else all_reduce_(tensor.clone(), group)


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the group's ranks, in place where the tensor is contiguous. ``[...]`` -> ``[...]``."""
    if group.size() == 1:
        return tensor
    total = tensor.contiguous()
    dist.all_reduce(total, group=group)
    return total


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate the ranks' tensors. ``[n/t, ...]`` -> ``[n, ...]``."""
    if group.size() == 1:
        return tensor
    whole = tensor.new_empty(tensor.shape[0] * group.size(), *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor.contiguous(), group=group)
    return whole


def reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the ranks and keep this rank's piece. ``[n, ...]`` -> ``[n/t, ...]``.

    Raises:
        ValueError: if the first dimension does not divide by the group's size.
    """
    if group.size() == 1:
        return tensor
    if tensor.shape[0] % group.size():
        raise ValueError(f"cannot scatter {tensor.shape[0]} rows over {group.size()} ranks evenly")
    piece = tensor.new_empty(tensor.shape[0] // group.size(), *tensor.shape[1:])
    dist.reduce_scatter_tensor(piece, tensor.contiguous(), group=group)
    return piece
