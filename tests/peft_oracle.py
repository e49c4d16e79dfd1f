"""The runs of :mod:`tests.training` by Hugging Face alone: PEFT, torch's AdamW, transformers' schedules, in one process.

Every sample is a row of its own, also where the run packs several into one. Nothing of mlora computes here but the dropout mask:
PEFT draws its own from torch's generator, which no sharded run can repeat, so its dropout modules get ours.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mlora import LoraConfig
from mlora.dropout import Dropout
from mlora.sft.samples import Sample
from tests.tiny import tokens
from tests.training import LENGTH, PADDING, Case, Run, global_batch


class OurDropout(torch.nn.Module):
    """In the place of one PEFT module's dropout."""

    def __init__(self, probability: float, seed: int, module: str) -> None:
        super().__init__()
        self.probability, self.seed, self.module = probability, seed, module
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, s, features], the whole global batch."""
        if not self.training:
            return x
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{self.module}".encode()).digest()
        mask = Dropout(self.probability, int.from_bytes(digest[:8], "big"), 0, LENGTH)
        return mask(x.transpose(0, 1)).transpose(0, 1)


MEGATRON_MODULES = {
    "self_attn.q_proj": "self_attention.linear_qkv",
    "self_attn.k_proj": "self_attention.linear_qkv",
    "self_attn.v_proj": "self_attention.linear_qkv",
    "self_attn.qkv_proj": "self_attention.linear_qkv",
    "self_attn.o_proj": "self_attention.linear_proj",
    "mlp.gate_proj": "mlp.linear_fc1",
    "mlp.up_proj": "mlp.linear_fc1",
    "mlp.gate_up_proj": "mlp.linear_fc1",
    "mlp.down_proj": "mlp.linear_fc2",
}


def peft_model(path: Path, lora: LoraConfig, initial: dict[str, torch.Tensor]) -> Any:
    """A ``PeftModel`` whose adapter has the weights ``initial``, which must be all that PEFT would train."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ours = ("shared_A", "adapter_dtype", "seed")
    fields = {name: value for name, value in lora.to_dict().items() if name not in ours}
    model = get_peft_model(base, PeftConfig(**fields, task_type="CAUSAL_LM"))
    assert get_peft_model_state_dict(model, save_embedding_layers=False).keys() == initial.keys()
    assert not set_peft_model_state_dict(model, initial).unexpected_keys
    adapted = {
        name.partition(".layers.")[2] or name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    if lora.lora_dropout:
        for name, module in adapted.items():
            module.lora_dropout["default"] = OurDropout(lora.lora_dropout, lora.seed, megatron_module(name))
    if lora.shared_A:
        shared: dict[str, torch.nn.Parameter] = {}
        for name, module in adapted.items():
            linear = module.lora_A["default"]
            linear.weight = shared.setdefault(megatron_module(name), linear.weight)
    return model


def megatron_module(name: str) -> str:
    """``0.self_attn.q_proj`` -> ``decoder.layers.0.self_attention.linear_qkv``."""
    if name in ("lm_head", "embed_tokens"):
        return "output_layer" if name == "lm_head" else "embedding.word_embeddings"
    layer, _, leaf = name.partition(".")
    return f"decoder.layers.{layer}.{MEGATRON_MODULES[leaf]}"


def train_with_peft(
    path: Path,
    case: Case,
    initial: dict[str, torch.Tensor],
    loss_of: Callable[[Any, int], torch.Tensor] | None = None,
) -> Run:
    """The run ``case`` from the adapter weights ``initial``, under PEFT's keys.

    ``loss_of`` gives the loss of the model in an iteration; by default it is that of the case's samples.
    """
    from peft import get_peft_model_state_dict

    model = peft_model(path, case.lora, initial)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(model, case)
    schedule = _schedule(optimizer, case)
    run = Run([], [], [], _copy(initial), {}, {}, _logits(model), torch.empty(0))
    model.train()
    for iteration in range(case.steps):
        for module in model.modules():
            if isinstance(module, OurDropout):
                module.step = iteration
        optimizer.zero_grad()
        loss = loss_of(model, iteration) if loss_of else _loss(model, global_batch(case.packed, iteration))
        loss.backward()
        limit = case.optimizer.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
        if iteration == 0:
            run.gradients = _gradients(model)
        run.rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        run.norms.append(float(norm))
    run.final = _copy(get_peft_model_state_dict(model, save_embedding_layers=False))
    run.logits_after = _logits(model)
    return run


def exported_logits(base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT computes with an adapter that it loads from a directory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return _logits(PeftModel.from_pretrained(model, adapter))


def _optimizer(model: Any, case: Case) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    settings = case.optimizer
    adam: dict[str, Any] = {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_eps}
    if settings.lora_plus_ratio == 1.0:
        return torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            **adam,
        )
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=settings.lr,
        loraplus_lr_ratio=settings.lora_plus_ratio,
        loraplus_weight_decay=settings.weight_decay,
        **adam,
    )


def _schedule(optimizer: torch.optim.Optimizer, case: Case) -> Any:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    settings = case.optimizer
    assert settings.decay_style == "cosine"
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, settings.warmup_iters, settings.decay_iters, min_lr_rate=settings.min_lr / settings.lr
    )


def _loss(model: Any, batch: Sequence[Sample]) -> torch.Tensor:
    """The mean over the target tokens of the samples, each in a row of its own that is padded at the right."""
    logits, labels = padded(model, batch)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)


def padded(model: Any, batch: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [b, s, vocabulary], labels [b, s], -100 where there is no target) of samples in rows of their own."""
    ids = torch.full((len(batch), LENGTH), PADDING)
    labels = torch.full((len(batch), LENGTH), -100)
    attended = torch.zeros(len(batch), LENGTH, dtype=torch.long)
    for row, sample in enumerate(batch):
        count = len(sample.tokens) - 1
        ids[row, :count] = torch.from_numpy(sample.tokens[:-1])
        attended[row, :count] = 1
        labels[row, :count] = torch.from_numpy(sample.tokens[1:]).long()
        labels[row, :count][~torch.from_numpy(sample.is_target[1:])] = -100
    return model(input_ids=ids, attention_mask=attended).logits, labels


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(tokens(length=LENGTH)).logits
    return logits


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".modules_to_save", "")
        .replace(".default.", ".")
        .removesuffix(".default")
        .replace("magnitude_vector.weight", "magnitude_vector"): parameter.grad.clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}
