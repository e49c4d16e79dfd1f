"""A native checkpoint from an adapter that :mod:`mlora.conversion.megatron` has read."""

from dataclasses import replace

from mlora.conversion.importing import Import, plan_import
from mlora.conversion.state import AdapterState, LazyTensor
from mlora.names import SHARED
from mlora.pretrained import Pretrained


def plan_megatron_import(state: AdapterState, base: Pretrained) -> Import:
    """What importing the adapter means: :func:`~mlora.conversion.importing.plan_import`, with ``shared_A`` if it was trained so.

    Where the projections of every fused linear have one A, they would else get copies of it, which drift apart in training.

    Raises:
        ValueError: as ``plan_import``.
    """
    plan = plan_import(state, base)
    of_module: dict[str, list[LazyTensor]] = {}
    for name, tensor in plan.matrices.items():
        if name.endswith(".lora_A"):
            of_module.setdefault(name.rsplit(".", 2)[0], []).append(tensor)
    if not any(len(held) > 1 for held in of_module.values()) or any(len(set(held)) > 1 for held in of_module.values()):
        return plan
    matrices = {f"{module}.{SHARED}.lora_A": held[0] for module, held in of_module.items()}
    matrices |= {name: tensor for name, tensor in plan.matrices.items() if not name.endswith(".lora_A")}
    return replace(plan, config=replace(plan.config, shared_A=True), matrices=matrices)
