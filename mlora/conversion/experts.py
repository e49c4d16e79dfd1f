"""Adapters of experts: transformers 5 keeps all experts of a layer in one parameter, and PEFT adapts that parameter.

With E experts, and ranks and features of one expert:

| what | one expert | packed |
|---|---|---|
| A | [r, in] | [E r, in]: expert after expert |
| B | [out, r] | [out, r E]: column c of expert e is column c E + e |
| gate_up_proj A | gate [r, in], up [r, in] | [E 2r, in], an expert's gate before its up |
| gate_up_proj B | gate [ffn, r], up [ffn, r] | [2 ffn, 2r E] of an expert's [2 ffn, 2r], the blocks on its diagonal |

In a PEFT file ``<experts>.base_layer`` is gate_up_proj and ``<experts>`` is down_proj: PEFT wraps the one in the other.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlora.conversion.peft import PREFIX
from mlora.conversion.peft_writer import PeftAdapter, PeftTensor, zero_module
from mlora.conversion.portable import Request, Uniform, check_plain, config_of, portable
from mlora.conversion.selection import targets
from mlora.conversion.state import AdapterModule, natural_order

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
# Names of an expert's projections, in the order gate, up, down: nearly everyone's, and Mixtral's.
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Last parts of names that PEFT takes for experts' (or, with "gate", for the router's) wherever they stand.
_TAKEN = {leaf for names in PROJECTIONS for leaf in names} | {"gate"}

Expert = tuple[AdapterModule, AdapterModule, AdapterModule]  # gate, up, down
Experts = Mapping[str, Sequence[Expert]]  # by the path of a layer's experts


def pack_A(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """A [r, in] of each expert as one matrix [E r, in]."""
    return torch.cat(list(matrices))


def pack_B(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """B [out, r] of each expert as one matrix [out, r E]."""
    return torch.stack(list(matrices), dim=2).flatten(1)


def stack_B(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """B of gate and up, [ffn, r] each, as that of gate_up_proj, [2 ffn, 2r]."""
    packed: torch.Tensor = torch.block_diag(gate, up)  # type: ignore[no-untyped-call]
    return packed


def find_experts(modules: Sequence[AdapterModule]) -> Experts:
    """The experts of each layer, completed with zeros where one or a projection of it has no term.

    Raises:
        ValueError: a module of an expert is none of its three projections.
    """
    found: dict[str, dict[int, dict[str, AdapterModule]]] = {}
    for module in modules:
        if match := EXPERT.fullmatch(module.name):
            if not any(match["leaf"] in names for names in PROJECTIONS):
                raise ValueError(f"{module.A.file}: {module.A.key}: experts have {' or '.join(map(str, PROJECTIONS))}")
            found.setdefault(match["experts"], {}).setdefault(int(match["number"]), {})[match["leaf"]] = module
    return {
        path: [_completed(path, number, experts) for number in range(max(experts) + 1)]
        for path, experts in found.items()
    }


def _completed(path: str, number: int, experts: Mapping[int, Mapping[str, AdapterModule]]) -> Expert:
    any_expert = next(iter(experts.values()))
    names = next(names for names in PROJECTIONS if any_expert.keys() & set(names))
    shapes = {leaf: module.weight_shape for expert in experts.values() for leaf, module in expert.items()}
    known = next(iter(shapes))
    rows, columns = shapes[known] if known != names[2] else shapes[known][::-1]
    like = next(iter(any_expert.values()))
    gate, up, down = (
        experts.get(number, {}).get(leaf) or zero_module(f"{path}.{number}.{leaf}", shape, like)
        for leaf, shape in zip(names, ((rows, columns), (rows, columns), (columns, rows)), strict=True)
    )
    return gate, up, down


def vllm_3d(request: Request) -> PeftAdapter:
    """Experts packed; every module has the rank of gate_up_proj, which is twice an expert's."""
    state = request.state
    check_plain(state, "vllm-3d")
    experts = find_experts(state.modules)
    if not experts:
        raise ValueError(
            f"{state.source} adapts no experts, so there is nothing to pack: the portable profile is for it"
        )
    others = [module for module in state.modules if not EXPERT.fullmatch(module.name)]
    every = [*others, *(module for rows in experts.values() for row in rows for module in row)]
    single = Uniform.of(every, request.dtype)
    double = Uniform(2 * single.rank, single.scaling, single.dtype)
    tensors = [*double.tensors(others)]
    for path, rows in experts.items():
        tensors += _packed_gate_up(f"{PREFIX}{path}.base_layer", rows, single)
        tensors += _packed_down(f"{PREFIX}{path}", rows, double)
    config = config_of(
        request, r=double.rank, lora_alpha=double.alpha, **_targets(others, experts, request.layer_count)
    )
    return PeftAdapter(tuple(tensors), config)


def _packed_gate_up(name: str, rows: Sequence[Expert], single: Uniform) -> list[PeftTensor]:
    gate = rows[0][0]
    ffn, features = gate.weight_shape
    dtype, count, rank = single.dtype or gate.A.dtype, len(rows), single.rank

    def A() -> torch.Tensor:
        return pack_A([single.A(module).load().to(dtype) for gate, up, _ in rows for module in (gate, up)])

    def B() -> torch.Tensor:
        return pack_B([stack_B(single.B(gate).load(), single.B(up).load()).to(dtype) for gate, up, _ in rows])

    return [
        PeftTensor(f"{name}.lora_A.weight", (count * 2 * rank, features), dtype, A),
        PeftTensor(f"{name}.lora_B.weight", (2 * ffn, 2 * rank * count), dtype, B),
    ]


def _packed_down(name: str, rows: Sequence[Expert], double: Uniform) -> list[PeftTensor]:
    downs = [down for _, _, down in rows]
    features, ffn = downs[0].weight_shape
    dtype, count, rank = double.dtype or downs[0].A.dtype, len(rows), double.rank

    def A() -> torch.Tensor:
        return pack_A([double.A(down).load().to(dtype) for down in downs])

    def B() -> torch.Tensor:
        return pack_B([double.B(down).load().to(dtype) for down in downs])

    return [
        PeftTensor(f"{name}.lora_A.weight", (count * rank, ffn), dtype, A),
        PeftTensor(f"{name}.lora_B.weight", (features, rank * count), dtype, B),
    ]


def peft_v5(request: Request) -> PeftAdapter:
    """One matrix for each expert, as in the portable profile, and a configuration that says what PEFT makes of them.

    Loading, PEFT packs experts' matrices, and the rank and alpha of gate_up_proj double.
    """
    state = request.state
    if not any(EXPERT.fullmatch(module.name) for module in state.modules):
        return portable(request)
    check_plain(state, "peft-v5")
    experts = find_experts(state.modules)
    others = [module for module in state.modules if not EXPERT.fullmatch(module.name)]
    modules = [*others, *(module for rows in experts.values() for row in rows for module in row)]
    uniform = Uniform.of(modules, request.dtype)
    packed = r".*\.experts\.gate_up_proj"
    config = config_of(
        request,
        r=uniform.rank,
        lora_alpha=uniform.alpha,
        rank_pattern={packed: 2 * uniform.rank},
        alpha_pattern={packed: 2 * uniform.alpha},
        **_targets(others, experts, request.layer_count),
    )
    return PeftAdapter(uniform.tensors(modules), config)


def _targets(others: Sequence[AdapterModule], experts: Experts, layer_count: int | None) -> dict[str, Any]:
    """Modules and parameters to adapt.

    PEFT takes any target called gate_proj, up_proj or down_proj for experts', wherever it stands, so other modules of these names
    are given as parameters, which it leaves alone.
    """
    taken = sorted(f"{module.name}.weight" for module in others if module.name.rpartition(".")[2] in _TAKEN)
    plain = sorted(module.name for module in others if module.name.rpartition(".")[2] not in _TAKEN)
    where = targets(plain, layer_count) if plain else {"target_modules": []}
    paths = sorted((path.replace(".block_sparse_moe.", ".mlp.") for path in experts), key=natural_order)
    packed = [f"{path}.{name}" for path in paths for name in ("gate_up_proj", "down_proj")]
    return {
        # A list of layers would be for the modules only.
        "target_modules": plain if "layers_to_transform" in where else where["target_modules"],
        "target_parameters": [*packed, *taken],
    }
