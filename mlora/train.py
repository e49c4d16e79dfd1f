"""One training step on Megatron's own machinery: schedules, DDP, distributed optimizer, gradient finalize step, LR scheduler.

The loss of a step is the sum over the units of the whole global batch (target tokens; what they are, the objective says) divided by
their number, so that neither the micro batch size nor the number of data-parallel ranks changes it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from mlora.attach import banks
from mlora.copies import copied_modules
from mlora.embedding import EmbeddingAdapter
from mlora.forward import evaluating, on_device, run_model, run_schedule
from mlora.objective import MicroBatches, Objective, Totals
from mlora.sft.objective import Sft
from parallel.optimizer import allocate_adam_state
from parallel.stages import union_over_stages


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
    """Of one optimizer step: mean loss, number of target tokens, gradient norm before clipping, learning rate, the objective's
    metrics.

    With LoRA+ the rate is that of A.
    """

    loss: float
    target_tokens: int
    grad_norm: float
    lr: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """Steps an adapted model.

    The weights' dtype is the model's. Gradients are summed over the ranks in float32, and Adam works on float32 copies of
    bfloat16 weights.

    Args:
        chunks: this rank's unwrapped chunks, with adapters attached.
        settings: of the optimizer.
        objective: what is minimised; by default the cross entropy of the target tokens.

    Attributes:
        optimizer, scheduler: Megatron's, for checkpoints.

    Raises:
        ValueError: the model is in float16, which would need a loss scale; its config does not normalise by tokens; or LoRA+ has no
            learning rate for what is trained.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], settings: OptimizerSettings, objective: Objective | None = None
    ) -> None:
        self.chunks = list(chunks)
        self.objective: Objective = objective or Sft()
        config: Any = self.chunks[0].config
        if config.fp16:
            raise ValueError("the model is in float16, which needs a loss scale: train in bfloat16 or float32")
        if not config.calculate_per_token_loss:
            raise ValueError(
                "the model's config must have calculate_per_token_loss: the loss is a mean over target tokens"
            )
        if settings.lora_plus_ratio != 1.0:
            _check_lora_plus(self.chunks)
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

    def step(self, micro_batches: MicroBatches, iteration: int) -> StepResult:
        """Forward, backward and update on this rank's micro batches of one global batch.

        Args:
            micro_batches: each with tokens, labels, position_ids [b, s], loss_mask [b, s], attention_mask [b, 1, s, s] (True
                is masked; None for plain causal) and first_row, the number of its first row in the global batch. Rows that
                stand one after another in one sequence (b = 1) come with row_length, and with cu_seqlens and max_seqlen of
                the samples in them.
            iteration: of the optimizer, from 0; keys the dropout masks.

        Raises:
            ValueError: the model's config does not tell Megatron's schedules to sum the gradients over the ranks.
            FloatingPointError: the loss is not finite, and the weights have not changed; or the gradient norm is not, and they
                are lost. On every rank alike.
        """
        config: Any = self.chunks[0].config
        if config.finalize_model_grads_func is None:
            raise ValueError(
                "the model's config must have Megatron's finalize_model_grads as finalize_model_grads_func"
            )
        micro_batches = self.objective.prepare(self.chunks, micro_batches)
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        totals = self._run(micro_batches, iteration, forward_only=False)
        if not math.isfinite(totals.loss):
            raise FloatingPointError(f"the loss of iteration {iteration + 1} is {totals.mean_loss}")
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm of iteration {iteration + 1} is {grad_norm}")
        lr = self.scheduler.get_lr({})  # Not a parameter group's: the groups of a stage without adapters may be empty.
        self.scheduler.step(increment=1)
        return StepResult(totals.mean_loss, totals.target_tokens, float(grad_norm), lr, totals.mean_metrics)

    @torch.no_grad()
    def evaluate(self, micro_batches: MicroBatches) -> Totals:
        """The sums of one global batch, without dropout."""
        micro_batches = self.objective.prepare(self.chunks, micro_batches)
        with evaluating(self.wrapped):
            return self._run(micro_batches, 0, forward_only=True)

    def _run(self, micro_batches: MicroBatches, iteration: int, forward_only: bool) -> Totals:
        step = partial(_forward_step, objective=self.objective, iteration=iteration)
        shape = micro_batches[0]["tokens"].shape
        reports = run_schedule(step, self.wrapped, micro_batches, shape, forward_only=forward_only)
        return _sum_over_ranks(reports, self.objective)


def _check_lora_plus(chunks: Sequence[torch.nn.Module]) -> None:
    """Raises ValueError, on every stage alike, where the paper says nothing: on embeddings, and weights without a B."""
    names = {bank.hf_name for _, bank in copied_modules(chunks)}
    names |= {
        bank.layout.name
        for bank in banks(chunks)
        if any(isinstance(a, EmbeddingAdapter) for a in bank.adapters.children())
    }
    if found := sorted(union_over_stages(names)):
        raise ValueError(
            f"lora_plus_ratio gives B another learning rate than A and says nothing of {', '.join(found)}, which trains whole or "
            f"is an embedding: set it to 1"
        )


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
    data: Iterator[Mapping[str, Any]], model: torch.nn.Module, objective: Objective, iteration: int
) -> tuple[torch.Tensor, Any]:
    batch = on_device(next(data))
    return run_model(model, batch, iteration), partial(_sums, objective, batch)


def _sums(
    objective: Objective, batch: Mapping[str, Any], losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, units, report): with ``calculate_per_token_loss`` Megatron divides by the units of the global batch."""
    total, units, metrics = objective.sums(batch, losses)
    counts = torch.stack([total.detach().double(), units.double(), batch["loss_mask"].sum().double()])
    return total, units.to(torch.int), torch.cat([counts, metrics.detach().double()])


def _sum_over_ranks(reports: Sequence[torch.Tensor], objective: Objective) -> Totals:
    """The sums of the global batch on every rank; only the last stage has reports."""
    empty = torch.zeros(3 + len(objective.metrics), dtype=torch.float64)
    sums = (torch.stack(list(reports)).sum(0) if reports else empty).to(torch.cuda.current_device())
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    total, units, tokens, *metrics = sums.tolist()
    if units == 0:
        raise ValueError(f"the global batch holds no {objective.unit}")
    return Totals(total, int(units), int(tokens), dict(zip(objective.metrics, metrics, strict=True)))
