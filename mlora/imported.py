"""A PEFT adapter's tensors in an adapter that is attached, on its ranks."""

from collections.abc import Sequence

import torch

from mlora.attach import factors
from mlora.conversion.importing import Import
from mlora.factor import Factor
from mlora.names import DEFAULT_ADAPTER
from parallel.stages import union_over_stages
from parallel.together import together


def load_import(
    plan: Import, model: torch.nn.Module | Sequence[torch.nn.Module], adapter_name: str = DEFAULT_ADAPTER
) -> None:
    """Fill the adapter that :func:`mlora.apply` attached with ``plan.config``, on every rank and at any layout.

    Every rank reads the PEFT file. Load before the optimizer is made: it may keep float32 copies of the parameters.

    Raises:
        ValueError: another adapter is attached, or a tensor is not finite; on every rank alike, and nothing has changed.
    """
    held = list(factors(model, adapter_name))
    kinds = ("lora_A", ".weight")
    attached = union_over_stages({factor.name for factor in held if factor.name.endswith(kinds)})
    wanted = {name for name in plan.matrices if name.endswith(kinds)}
    if attached != wanted:
        raise ValueError(f"{plan.source} and the attached adapter differ in {min(attached ^ wanted)}")
    pieces = together(lambda: [_piece(plan, factor) for factor in held])
    with torch.no_grad():
        for factor, piece in zip(held, pieces, strict=True):
            factor.parameter[factor.inside].copy_(piece)


def _piece(plan: Import, factor: Factor) -> torch.Tensor:
    tensor = plan.matrices.get(factor.name)
    if tensor is None:
        raise ValueError(f"{plan.source} has nothing for {factor.name} of the attached adapter")
    if tensor.shape != factor.shape:
        raise ValueError(
            f"{tensor.file}: {tensor.key} has shape {list(tensor.shape)}, in the model {list(factor.shape)}"
        )
    place = zip(factor.offset, factor.parameter.shape, strict=True)
    return tensor.load()[tuple(slice(first, first + count) for first, count in place)].clone()
