"""How large an adapter has become beside what it adapts: Frobenius norms of A, B, σ B A and W, the same at every layout.

‖B A‖² = tr(Bᵀ B · A Aᵀ): two Gram matrices [r, r] tell the norm of the product [out, in], which is never formed; and where the
ranks hold pieces of a factor, its Gram matrix is the sum of theirs.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from mlora.adapter import LinearAdapter
from mlora.attach import banks, check_adapter_exists
from mlora.bank import AdapterBank
from mlora.copies import base_weight
from mlora.embedding import EmbeddingLora
from mlora.names import DEFAULT_ADAPTER, SHARED
from parallel.collectives import all_reduce_
from parallel.layout import LinearLayout
from parallel.stages import as_chunks, union_over_stages

Model = torch.nn.Module | Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of one projection's matrices.

    Attributes:
        A, B: of the factors as they are trained.
        BA: of what they add to the weight, scaling included; of an adapter that started as a part of the weight, of
            σ (B A - B₀ A₀). DoRA's change of the rows' lengths is not in it.
        W: of the frozen base weight.
    """

    A: float
    B: float
    BA: float
    W: float


@torch.no_grad()
def adapter_norms(model: Model, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Norms]:
    """Projection -> norms, on every rank, over all stages. A collective of the tensor- and pipeline-parallel groups.

    Accumulated in float64. A projection has its Hugging Face module's name (``model.layers.0.self_attn.q_proj``); one of several
    in a module has its own behind that.

    Raises:
        ValueError: no linear on any stage has an adapter of this name.
    """
    found = list(banks(model))
    check_adapter_exists(found, adapter_name)
    rows = set()
    for bank, weight in _with_weights(model):
        adapter = bank.adapter(adapter_name)
        if adapter is not None:
            rows |= {json.dumps([name, asdict(norms)]) for name, norms in _of_linear(adapter, weight)}
    return {name: Norms(**norms) for name, norms in map(json.loads, sorted(union_over_stages(rows)))}


def _with_weights(model: Model) -> Iterator[tuple[AdapterBank, torch.Tensor]]:
    """Every bank and its linear's own weight [out_l, in_l], also while an adapter is merged into it."""
    for chunk in as_chunks(model):
        for module in chunk.modules():
            bank = getattr(module, "lora", None)
            if isinstance(bank, AdapterBank):
                weight = base_weight(module) if bank.weight_before_merge is None else bank.weight_before_merge
                yield bank, weight.T if isinstance(module, EmbeddingLora) else weight


def _of_linear(adapter: LinearAdapter, weight: torch.Tensor) -> Iterator[tuple[str, Norms]]:
    """(name, norms) of each projection. A collective of the linear's group: of 2 (2r)² + 1 numbers for each at most."""
    layout = adapter.layout
    factors = [_factors(adapter, part) for part in adapter.parts]
    # Where a factor is replicated, its Gram matrix is whole on every rank and must not be summed.
    grams = [(_gram(A.T), _gram(B)) for A, B in factors]
    squares = _squares(layout, weight)
    if layout.partition_dim is not None:
        split = [pair[1 - layout.partition_dim] for pair in grams]
        sums = torch.cat([*(gram.flatten() for gram in split), torch.stack([squares[part] for part in adapter.parts])])
        sums = all_reduce_(sums, layout.group)
        *wholes, square = torch.split(sums, [*(gram.numel() for gram in split), len(adapter.parts)])
        for gram, whole in zip(split, wholes, strict=True):
            gram.copy_(whole.view_as(gram))
        squares = dict(zip(adapter.parts, square, strict=True))
    names = list(adapter.hf_names.values())
    for part, (of_A, of_B) in zip(adapter.parts, grams, strict=True):
        rank, name = adapter.ranks[part], adapter.hf_names[part]
        numbers = torch.stack(
            [
                of_A.diagonal()[:rank].sum(),
                of_B.diagonal()[:rank].sum(),
                (of_A * of_B).sum().clamp(min=0.0),
                squares[part],
            ]
        )
        A, B, BA, W = numbers.sqrt().tolist()
        yield name if names.count(name) == 1 else f"{name}.{part}", Norms(A, B, BA * abs(adapter.scaling[part]), W)


def _factors(adapter: LinearAdapter, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's pieces of A [r, in_l] and B [out_l, r] of a projection in float64; [A; A₀] and [B, -B₀] where it has a start."""
    key = SHARED if adapter.shares_A else part
    A = adapter.lora_A[key].double()
    none = A.new_zeros(0, adapter.ranks[part])  # A rank may hold no row of the projection.
    B = adapter.lora_B[part].double() if part in adapter.lora_B else none
    if adapter.config.decomposes:
        A = torch.cat([A, adapter.lora_A0.get_buffer(key).double()])
        B0 = adapter.lora_B0.get_buffer(part).double() if part in adapter.lora_B else none
        B = torch.cat([B, -B0], dim=1)
    return A, B


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """[n, r] -> [r, r]: the products of its columns."""
    return matrix.T @ matrix


def _squares(layout: LinearLayout, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum of the squares in this rank's rows of each part, float64 and on the weight's device."""
    if type(weight) is not torch.nn.Parameter and type(weight) is not torch.Tensor:
        weight = weight.float()  # Quantized.
    device = torch.device(torch.cuda.current_device())
    totals = {part: torch.zeros((), dtype=torch.float64, device=device) for part, _ in layout.parts}
    at = 0
    for segment in layout.segments:
        rows = weight[at : at + segment.length]
        totals[segment.part] += torch.linalg.vector_norm(rows, dtype=torch.float64).square().to(device)
        at += segment.length
    return totals
