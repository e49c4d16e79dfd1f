"""PEFT directories for tests: made by PEFT itself, or written tensor by tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import write_model

PREFIX = "base_model.model."


def peft_model(base: Path, *, seed: int = 0, **config: Any) -> Any:
    """The model at ``base`` with a PEFT adapter that has come a long way from its start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", attn_implementation="eager")
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_magnitude" in name or "modules_to_save" in name or name.endswith("bias"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.4 * noise)
    return adapted


def write_peft(path: Path, base: Path, *, seed: int = 0, **config: Any) -> Any:
    """Write an adapter as PEFT does; the model it is on."""
    model = peft_model(base, seed=seed, **config)
    model.save_pretrained(path)
    return model


def config_of(**values: Any) -> dict[str, Any]:
    """The least that an ``adapter_config.json`` must say."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **values}


def tensors_of(*modules: tuple[str, int, int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A and B of each (module, rank, out, in), under PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, rank, rows, columns in modules:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SMALL = ((Q, 2, 6, 5), (DOWN, 2, 5, 7))


def write_adapter(
    path: Path, tensors: Mapping[str, torch.Tensor] | None = None, *, pickled: bool = False, **config: Any
) -> Path:
    """Write an adapter directory from tensors; two small modules unless given."""
    path.mkdir()
    tensors = tensors_of(*SMALL) if tensors is None else dict(tensors)
    if pickled:
        torch.save(tensors, path / "adapter_model.bin")
    else:
        save_file(dict(tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config_of(**config)), encoding="utf-8")
    return path


def write_base(path: Path, **changes: Any) -> Path:
    """A tiny Llama of two layers in several shards."""
    return write_model(path, "llama", num_hidden_layers=2, **changes)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model directory."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found
