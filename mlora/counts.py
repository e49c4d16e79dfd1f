"""How many parameters a sharded model has."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from parallel.layout import read_layout
from parallel.stages import as_chunks, named_modules


def parameter_counts(model: torch.nn.Module | Sequence[torch.nn.Module]) -> tuple[int, int]:
    """(trainable, all) parameters of the whole model, each global element once; vocabulary padding counts.

    A collective of the tensor- and pipeline-parallel groups.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    counts = torch.zeros(2, dtype=torch.int64)
    for chunk in as_chunks(model):
        copied = getattr(chunk, "share_embeddings_and_output_weights", False) and not getattr(
            chunk, "pre_process", True
        )
        for name, module in named_modules(chunk):
            if copied and name == "output_layer":
                continue  # The last stage's copy of the tied embedding.
            for leaf, parameter in module.named_parameters(recurse=False):
                if first or _is_split(name, module, leaf, parameter):
                    counts += torch.tensor([parameter.numel() * parameter.requires_grad, parameter.numel()])
    counts = counts.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    return int(counts[0]), int(counts[1])


def _is_split(name: str, module: torch.nn.Module, leaf: str, parameter: torch.nn.Parameter) -> bool:
    """Whether the tensor-parallel ranks hold different pieces. Megatron marks parameters only when it initialises them."""
    layout = read_layout(name, module)
    if layout is not None:
        # An expert's group may be of one rank: then all tensor-parallel ranks hold the same expert.
        is_cut = layout.partition_dim is not None and layout.group.size() > 1
        return is_cut and (leaf.startswith("weight") or layout.partition_dim == 0)
    return isinstance(module, VocabParallelEmbedding) or bool(getattr(parameter, "tensor_model_parallel", False))
