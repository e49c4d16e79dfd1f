"""An adapter as a PEFT directory for given readers.

| profile | tensors | configuration | readers |
|---|---|---|---|
| portable | one rank: smaller ones are padded with zeros; a scaling that differs is folded into B | one alpha | all |
| peft | as trained, or as they were imported | ranks, alphas, rsLoRA and DoRA likewise | PEFT |
| sglang | portable, and with zeros what SGLang stacks with them: q with v, gate with up, every layer alike | one alpha | SGLang |
| peft-v5 | portable | experts and what is named like them as parameters, which transformers 5 demands | PEFT |
| vllm-3d | portable, all experts of a layer packed into one matrix | one alpha | vLLM for models with packed experts, PEFT |
"""

from collections.abc import Callable, Mapping

import torch

from mlora.conversion.exact import as_is
from mlora.conversion.experts import peft_v5, vllm_3d
from mlora.conversion.peft_writer import PeftAdapter
from mlora.conversion.portable import Request, portable
from mlora.conversion.sglang import sglang
from mlora.conversion.state import AdapterState
from mlora.description import read_info
from mlora.pretrained import Pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROFILES: Mapping[str, Callable[[Request], PeftAdapter]] = {
    "portable": portable,
    "peft": as_is,
    "sglang": sglang,
    "peft-v5": peft_v5,
    "vllm-3d": vllm_3d,
}


def peft_adapter(
    state: AdapterState, profile: str = "portable", *, dtype: torch.dtype | None = None, base: Pretrained | None = None
) -> PeftAdapter:
    """The PEFT directory of an adapter; only headers are read.

    Args:
        state: from :func:`~mlora.conversion.open_adapter`.
        profile: one of :data:`PROFILES`.
        dtype: of the tensors. None keeps each one's, unless folding a scaling would lose precision: then all become float32.
        base: the adapter's base model, for what the adapter does not say itself.

    Raises:
        ValueError: the adapter has something that the profile cannot express, or that its readers would ignore; it is named.
    """
    if profile not in PROFILES:
        raise ValueError(f"there is no profile {profile!r}; there is {', '.join(PROFILES)}")
    if not state.modules and not state.full:
        raise ValueError(f"{state.source} holds no adapter")
    native = state.format == "mlora"
    name = (
        read_info(state.source).get("base", {}).get("path") if native else state.config.get("base_model_name_or_path")
    )
    return PROFILES[profile](Request(state, layer_count(state, base), name, dtype, base))


def layer_count(state: AdapterState, base: Pretrained | None = None) -> int | None:
    """How many layers the adapter's base model has; None if neither the adapter nor ``base`` tells."""
    if base is not None:
        return base.architecture.counts["layer"]
    return (read_info(state.source).get("layers") or None) if state.format == "mlora" else None
