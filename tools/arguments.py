"""The trainer's options, in Megatron's names where Megatron has one, and what follows from them by arithmetic.

Knows nothing of models and process groups, and imports nothing that takes time: a wrong option is an error at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from mlora.options import Lora
from mlora_tools.implementation import Implementation
from mlora_tools.objective import Objective
from mlora_tools.options import Help, UsageError, check_at_least, check_positive, flag, parse
from mlora_tools.reports import Reports
from parallel.sizes import ParallelSizes

DESCRIPTION = """Fine-tune a Hugging Face model with LoRA on Megatron-Core.

  one process    python tools/finetune_lora.py --model M --data train.jsonl --output out
  several ranks  torchrun --nproc-per-node 4 tools/finetune_lora.py ... --tensor-model-parallel-size 2

OUTPUT gets checkpoints/ (sharded, to resume from), peft/ (the adapter for Hugging Face PEFT, at the end of training),
metrics.jsonl, tensorboard/, loss.png, config.json and ranks.json; `mlora-report OUTPUT` shows them as one page."""

_RECOMPUTABLE = ("core_attn", "mlp")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """input and output"""

    model: Annotated[Path, Help("directory of the base model: a Hugging Face config, tokenizer and safetensors", "DIR")]
    data: Annotated[
        tuple[Path, ...],
        Help(
            'JSONL to train on: "messages", "prompt" with "completion", or "text" a line; dpo: "prompt", "chosen", "rejected"',
            "FILE",
        ),
    ]
    eval_data: Annotated[tuple[Path, ...], Help("JSONL to evaluate on", "FILE")] = ()
    output: Annotated[Path, Help("directory to make; one with content is refused", "DIR")]
    resume: Annotated[
        bool,
        Help(
            "go on from the newest whole checkpoint in OUTPUT, at this or another parallel layout, or start where there is none; "
            "ranks that torchrun starts anew do so by themselves"
        ),
    ] = False
    exit_on_missing_checkpoint: Annotated[bool, Help("with --resume: no checkpoint in OUTPUT is an error")] = False
    resume_from_peft: Annotated[
        Path | None,
        Help(
            "start from this adapter, a PEFT directory or what was imported of one, with its ranks and targets", "DIR"
        ),
    ] = None
    config: Annotated[Path | None, Help("YAML or JSON with these options' names; the command line wins", "FILE")] = None

    def __post_init__(self) -> None:
        if self.exit_on_missing_checkpoint and not self.resume:
            raise UsageError("--exit-on-missing-checkpoint goes with --resume")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """parallel layout"""

    tensor_model_parallel_size: Annotated[int, Help("ranks that share each linear")] = 1
    pipeline_model_parallel_size: Annotated[int, Help("pipeline stages")] = 1
    num_layers_per_virtual_pipeline_stage: Annotated[
        int | None, Help("layers of a model chunk, for the interleaved schedule")
    ] = None
    num_virtual_stages_per_pipeline_rank: Annotated[int | None, Help("the same, given as model chunks of a stage")] = (
        None
    )
    sequence_parallel: Annotated[bool, Help("cut activations outside the linears along the sequence")] = False
    distributed_backend: Annotated[Literal["nccl", "gloo"] | None, Help("default: nccl on GPUs, gloo on the CPU")] = (
        None
    )
    distributed_timeout_minutes: Annotated[float, Help("after which a collective without its peers is an error")] = 10.0

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
        check_positive(self, "distributed_timeout_minutes")
        if self.num_layers_per_virtual_pipeline_stage and self.num_virtual_stages_per_pipeline_rank:
            raise UsageError(
                "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank say the same thing: "
                "give one of them"
            )

    def sizes(self, num_layers: int) -> ParallelSizes:
        """The sizes for a model of ``num_layers``.

        Raises:
            ValueError: they contradict each other, or the layers do not divide.
        """
        virtual = self.num_virtual_stages_per_pipeline_rank
        if self.num_layers_per_virtual_pipeline_stage:
            chunk = self.num_layers_per_virtual_pipeline_stage * max(1, self.pipeline_model_parallel_size)
            if num_layers % chunk:
                raise UsageError(
                    f"--num-layers-per-virtual-pipeline-stage {self.num_layers_per_virtual_pipeline_stage} x "
                    f"--pipeline-model-parallel-size {self.pipeline_model_parallel_size} = {chunk} does not divide the "
                    f"model's {num_layers} layers"
                )
            virtual = num_layers // chunk
        return ParallelSizes(
            tensor=self.tensor_model_parallel_size,
            pipeline=self.pipeline_model_parallel_size,
            virtual_pipeline=None if virtual == 1 else virtual,
            sequence_parallel=self.sequence_parallel,
        )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """batches and precision"""

    micro_batch_size: Annotated[int, Help("sequences (dpo: pairs of them) of one forward pass")] = 1
    global_batch_size: Annotated[int, Help("sequences (dpo: pairs of them) of one optimizer step, over all ranks")] = 16
    seq_length: Annotated[int, Help("tokens of a sequence; longer samples are cut, with a warning")] = 1024
    packing: Annotated[bool, Help("several samples in a sequence, without attention across them")] = False
    train_iters: Annotated[int | None, Help("optimizer steps")] = None
    train_epochs: Annotated[float | None, Help("the same, given as passes over the data (default: 1)", "X")] = None
    seed: Annotated[int, Help("of the order of the data, the adapter's initial weights and dropout")] = 1234
    bf16: Annotated[
        bool, Help("base, adapter and activations in bfloat16, the optimizer in float32; else all float32")
    ] = False
    recompute_granularity: Annotated[Literal["full", "selective"] | None, Help("activation recomputation")] = None
    recompute_method: Annotated[
        Literal["uniform", "block"] | None, Help("with full recomputation (default: uniform)")
    ] = None
    recompute_num_layers: Annotated[
        int | None, Help("with full recomputation: layers of a unit or block (default: 1)")
    ] = None
    recompute_modules: Annotated[tuple[str, ...] | None, Help("with selective recomputation (default: core_attn)")] = (
        None
    )

    def __post_init__(self) -> None:
        names = ("micro_batch_size", "global_batch_size", "seq_length", "train_iters", "recompute_num_layers")
        check_at_least(1, self, *names)
        check_at_least(0, self, "seed")
        check_positive(self, "train_epochs")
        if self.train_iters and self.train_epochs:
            raise UsageError("--train-iters and --train-epochs say the same thing: give one of them")
        self._check_recompute()

    def _check_recompute(self) -> None:
        for name, needed in (
            ("recompute_method", "full"),
            ("recompute_num_layers", "full"),
            ("recompute_modules", "selective"),
        ):
            if getattr(self, name) is not None and self.recompute_granularity != needed:
                raise UsageError(f"{flag(name)} goes with --recompute-granularity {needed}")
        for module in self.recompute_modules or ():
            if module not in _RECOMPUTABLE:  # Megatron's others need Transformer Engine or experts.
                raise UsageError(f"--recompute-modules {module}: it can be {' and '.join(_RECOMPUTABLE)}")

    def iterations(self, num_rows: int) -> int:
        """Optimizer steps over ``num_rows`` sequences of data."""
        return self.train_iters or math.ceil((self.train_epochs or 1) * num_rows / self.global_batch_size)

    def recompute(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig."""
        if self.recompute_granularity == "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": self.recompute_method or "uniform",
                "recompute_num_layers": self.recompute_num_layers or 1,
            }
        if self.recompute_granularity == "selective":
            chosen = {"recompute_modules": list(self.recompute_modules)} if self.recompute_modules else {}
            return {"recompute_granularity": "selective", **chosen}
        return {}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """optimizer and learning rate"""

    lr: Annotated[float, Help("greatest learning rate")] = 2e-4
    min_lr: Annotated[float, Help("last learning rate")] = 0.0
    lr_decay_style: Annotated[Literal["constant", "linear", "cosine", "inverse-square-root"], Help("after warm-up")] = (
        "linear"
    )
    lr_decay_iters: Annotated[int | None, Help("iteration at which the decay ends (default: the last)")] = None
    lr_warmup_iters: Annotated[int | None, Help("iterations of linear warm-up (default: 0)")] = None
    lr_warmup_fraction: Annotated[float | None, Help("the same, as a share of --lr-decay-iters")] = None
    lora_plus_ratio: Annotated[float, Help("learning rate of lora_B over that of lora_A (LoRA+)")] = 1.0
    weight_decay: Annotated[float, Help("decoupled, as in AdamW")] = 0.0
    clip_grad: Annotated[float, Help("greatest global gradient norm; 0 for no clipping")] = 1.0
    adam_beta1: Annotated[float, Help("of the first moment")] = 0.9
    adam_beta2: Annotated[float, Help("of the second moment")] = 0.999
    adam_eps: Annotated[float, Help("beside the second moment's root")] = 1e-8

    def __post_init__(self) -> None:
        check_positive(self, "lr", "lora_plus_ratio", "adam_eps")
        check_at_least(0, self, "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2")
        check_at_least(1, self, "lr_decay_iters")
        if self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if self.min_lr and self.lr_decay_style == "constant":
            raise UsageError(f"--min-lr {self.min_lr} goes with another --lr-decay-style than constant")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise UsageError(f"{flag(name)} {getattr(self, name)} must be below 1")
        if self.lr_warmup_fraction is not None:
            if not 0 <= self.lr_warmup_fraction < 1:
                raise UsageError(f"--lr-warmup-fraction {self.lr_warmup_fraction} must be at least 0 and below 1")
            if self.lr_warmup_iters is not None:
                raise UsageError("--lr-warmup-iters and --lr-warmup-fraction say the same thing: give one of them")

    def optimizer(self, train_iters: int) -> dict[str, Any]:
        """Fields of :class:`mlora.train.OptimizerSettings` for a run of ``train_iters``.

        Raises:
            UsageError: the warm-up is not shorter than the decay.
        """
        decay = self.lr_decay_iters or train_iters
        warmup = self.lr_warmup_iters or 0
        if self.lr_warmup_fraction is not None:
            warmup = int(self.lr_warmup_fraction * decay)
        if self.lr_decay_style == "constant" and self.lr_decay_iters is None:
            decay = warmup + 1  # Without a decay, a run can be made longer later.
        if warmup >= decay:
            raise UsageError(f"{warmup} iterations of warm-up must be fewer than the {decay} at which the decay ends")
        names = ("lr", "min_lr", "lora_plus_ratio", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps")
        return {
            **{name: getattr(self, name) for name in names},
            "warmup_iters": warmup,
            "decay_iters": decay,
            "decay_style": self.lr_decay_style,
        }


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Everything that the command line says."""

    inputs: Inputs
    objective: Objective
    layout: Layout
    batches: Batches
    implementation: Implementation
    schedule: Schedule
    lora: Lora
    reports: Reports

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> "Arguments":
        """From a command line and the configuration file that it may name.

        Raises:
            ValueError: an option is not known, missing, out of its range or contradicts another; the message names it.
        """
        groups = (Inputs, Objective, Layout, Batches, Implementation, Schedule, Lora, Reports)
        parsed, given = parse(groups, argv, DESCRIPTION)
        inputs, objective, layout, batches, implementation, schedule, lora, reports = parsed
        objective.check(given, batches.packing)
        for name in ("eval_interval", "eval_iters"):
            if name in given and not inputs.eval_data:
                raise UsageError(f"{flag(name)} goes with --eval-data")
        if implementation.fp8_format and not batches.bf16:
            raise UsageError("--fp8-format needs --bf16")
        twice = sorted(given & set(Lora.__dataclass_fields__) - {"lora_config"})
        if lora.lora_config is not None and twice:
            raise UsageError(f"--lora-config is given, so {flag(twice[0])} must be in {lora.lora_config}")
        fixed = sorted(given & set(Lora.__dataclass_fields__) - {"lora_adapter_dtype"})
        if inputs.resume_from_peft is not None and fixed:
            raise UsageError(f"{flag(fixed[0])} is that of {inputs.resume_from_peft} (--resume-from-peft)")
        return cls(
            inputs=inputs,
            objective=objective,
            layout=layout,
            batches=batches,
            implementation=implementation,
            schedule=schedule,
            lora=lora,
            reports=reports,
        )

    def plain(self) -> dict[str, Any]:
        """Every option and its value, as plain values."""
        groups = (getattr(self, field.name) for field in fields(self))
        values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
        return {name: _plain(value) for name, value in values.items()}

    def check_division(self, sizes: ParallelSizes, world_size: int) -> None:
        """Raises ValueError if the ranks, batches and sequences do not divide as the sizes demand."""
        data = sizes.data(world_size)
        batches = self.batches
        step = batches.micro_batch_size * data
        if batches.global_batch_size % step:
            raise UsageError(
                f"--global-batch-size {batches.global_batch_size} is not a multiple of --micro-batch-size "
                f"{batches.micro_batch_size} x data-parallel size {data} = {step}"
            )
        if sizes.sequence_parallel and batches.seq_length % sizes.tensor:
            raise UsageError(
                f"--seq-length {batches.seq_length} is not a multiple of --tensor-model-parallel-size {sizes.tensor}, "
                "which --sequence-parallel needs"
            )
        count = batches.global_batch_size // step
        if sizes.virtual_pipeline and count % sizes.pipeline:
            raise UsageError(
                f"--global-batch-size {batches.global_batch_size} makes {count} micro batches a rank; the interleaved "
                f"schedule needs a multiple of --pipeline-model-parallel-size {sizes.pipeline}"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
