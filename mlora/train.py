"""One training step on Megatron's own machinery: schedules, DDP, distributed optimizer, gradient finalize step, LR scheduler.

The loss of a step is the sum over the target tokens of the whole global batch divided by their number, so that neither the
micro batch size nor the number of data-parallel ranks changes it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from mlora.dropout import MicroBatch, set_micro_batch
from parallel.optimizer import allocate_adam_state


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Adam, its clipping and its schedule, in Megatron's words.

    Attributes:
        lr, min_lr: greatest and last learning rate.
        lora_plus_ratio: learning rate of B and DoRA's magnitudes over that of A (Hayou et al. 2024, LoRA+); 1 for plain LoRA.
        warmup_iters, decay_iters: of the schedule: it rises from 0 for ``warmup_iters`` and falls until ``decay_iters``, which
            is greater.
        decay_style: "constant", "linear", "cosine" or "inverse-square-root".
        weight_decay: decoupled (AdamW).
        clip_grad: greatest global gradient norm; 0 for no clipping.
    """

    lr: float
    min_lr: float = 0.0
    lora_plus_ratio: float = 1.0
    warmup_iters: int = 0
    decay_iters: int = 1
    decay_style: str = "constant"
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: mean loss over the target tokens, their number, gradient norm before clipping, learning rate.

    With LoRA+ the rate is that of A.
    """

    loss: float
    target_tokens: int
    grad_norm: float
    lr: float


class Trainer:
    """Steps an adapted model.

    The weights' dtype is the model's. Gradients are summed over the ranks in float32, and Adam works on float32 copies of
    bfloat16 weights.

    Args:
        chunks: this rank's unwrapped chunks, with adapters attached.
        settings: of the optimizer.

    Attributes:
        optimizer, scheduler: Megatron's, for checkpoints.

    Raises:
        ValueError: the model is in float16, which would need a loss scale; or its config does not normalise by tokens.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], settings: OptimizerSettings) -> None:
        self.chunks = list(chunks)
        config: Any = self.chunks[0].config
        if config.fp16:
            raise ValueError("the model is in float16, which needs a loss scale: train in bfloat16 or float32")
        if not config.calculate_per_token_loss:
            raise ValueError(
                "the model's config must have calculate_per_token_loss: the loss is a mean over target tokens"
            )
        self.wrapped = _wrap(self.chunks, config)
        self.optimizer = _optimizer(self.wrapped, settings, bf16=config.bf16)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0 if settings.warmup_iters else settings.lr,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_iters,
            lr_decay_steps=settings.decay_iters,
            lr_decay_style=settings.decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,  # A run goes on with its own settings; resuming compares them.
        )

    def step(self, micro_batches: Sequence[Mapping[str, Any]], iteration: int) -> StepResult:
        """Forward, backward and update on this rank's micro batches of one global batch.

        Args:
            micro_batches: each with tokens, labels, position_ids [b, s], loss_mask [b, s], attention_mask [b, 1, s, s] (True
                is masked; None for plain causal) and first_row, the number of its first row in the global batch. Rows that
                stand one after another in one sequence (b = 1) come with row_length, and with cu_seqlens and max_seqlen of
                the samples in them.
            iteration: of the optimizer, from 0; keys the dropout masks.

        Raises:
            FloatingPointError: the loss is not finite, and the weights have not changed; or the gradient norm is not, and they
                are lost. On every rank alike.
        """
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        total, tokens = self._run(micro_batches, iteration, forward_only=False)
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of iteration {iteration + 1} is {total / tokens}")
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm of iteration {iteration + 1} is {grad_norm}")
        lr = self.scheduler.get_lr({})  # Not a parameter group's: the groups of a stage without adapters may be empty.
        self.scheduler.step(increment=1)
        return StepResult(total / tokens, tokens, float(grad_norm), lr)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
        """(sum of the losses of the target tokens, their number) of one global batch, without dropout."""
        for chunk in self.wrapped:
            chunk.eval()
        try:
            return self._run(micro_batches, 0, forward_only=True)
        finally:
            for chunk in self.wrapped:
                chunk.train()

    def _run(self, micro_batches: Sequence[Mapping[str, Any]], iteration: int, forward_only: bool) -> tuple[float, int]:
        rows, length = micro_batches[0]["tokens"].shape
        iterators = [iter(micro_batches) for _ in self.wrapped]
        reports = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, iteration=iteration),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.wrapped if len(self.wrapped) > 1 else self.wrapped[0],
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return _sum_over_ranks(reports)


def _wrap(chunks: Sequence[torch.nn.Module], config: Any) -> list[Any]:
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    inner = [Float16Module(config, chunk) for chunk in chunks] if config.bf16 else list(chunks)
    return [
        DistributedDataParallel(config, settings, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(inner)
    ]


def _optimizer(wrapped: list[Any], settings: OptimizerSettings, *, bf16: bool) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    overrides: dict[Any, Any] = {}
    if settings.lora_plus_ratio != 1.0:
        ratio = settings.lora_plus_ratio
        faster = ("*.lora_B.*", "*.lora_magnitude_vector.*")  # As PEFT groups them.
        overrides[ParamKey(name=faster)] = {"max_lr": ratio * settings.lr, "min_lr": ratio * settings.min_lr}
    optimizer = get_megatron_optimizer(config, wrapped, config_overrides=overrides)
    allocate_adam_state(optimizer)
    return optimizer


def _forward_step(
    data: Iterator[Mapping[str, Any]], model: torch.nn.Module, iteration: int
) -> tuple[torch.Tensor, Any]:
    device = torch.cuda.current_device()
    batch: dict[str, Any] = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in next(data).items()
    }
    set_micro_batch(MicroBatch(iteration, batch["first_row"], batch.get("row_length")))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        packed_seq_params=_packed_samples(batch),
    )
    return output, partial(_sum_of_losses, batch["loss_mask"])


def _packed_samples(batch: Mapping[str, Any]) -> PackedSeqParams | None:
    """Where the samples of one joined sequence begin and end, for Transformer Engine's attention."""
    if "cu_seqlens" not in batch:
        return None
    ends, longest = batch["cu_seqlens"], batch["max_seqlen"]
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _sum_of_losses(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, tokens, report): with ``calculate_per_token_loss`` Megatron divides by the tokens of the global batch."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens.to(total.dtype)]).double()


def _sum_over_ranks(reports: Sequence[torch.Tensor]) -> tuple[float, int]:
    """(sum of losses, target tokens) of the global batch on every rank; only the last stage has reports."""
    device = torch.cuda.current_device()
    sums = torch.stack(list(reports)).sum(0) if reports else torch.zeros(2, dtype=torch.float64)
    sums = sums.to(device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    total, tokens = sums.tolist()
    if tokens == 0:
        raise ValueError("the global batch holds no target token")
    return total, int(tokens)
