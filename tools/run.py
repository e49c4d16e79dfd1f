"""A fine-tuning run: base model's configuration -> process groups -> data -> model and adapter -> the loop -> export.

Nothing is written before data and model are known to be good.
"""

import dataclasses
import logging
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

import mlora
from mlora.config import LoraConfig
from mlora.conversion import open_adapter
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import DTYPES, peft_adapter
from mlora.description import latest_checkpoint, read_info
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.sft.batches import BatchPlan, EvalPlan
from mlora.sft.feed import Feed
from mlora.te import ways
from mlora.train import Trainer
from mlora_tools.arguments import Arguments
from mlora_tools.data import Dataset
from mlora_tools.interruption import Interruption
from mlora_tools.loop import EvalData, Loop, TrainData
from mlora_tools.metrics import Metrics
from mlora_tools.options import UsageError
from mlora_tools.output import Output, versions
from mlora_tools.plot import plot_losses
from mlora_tools.progress import Progress
from mlora_tools.resumption import is_restart, warn_of_restarts
from mlora_tools.setting import Setting
from mlora_tools.start import Start
from mlora_tools.weights_and_biases import open_wandb
from parallel.launch import distributed, environment
from parallel.sizes import ParallelSizes
from parallel.together import from_rank_zero, on_rank_zero, only_rank_zero, together

logger = logging.getLogger(__name__)


def finetune(arguments: Arguments) -> None:
    """Do what the command line says, as one of the ranks that the environment names.

    Raises:
        ValueError, OSError: something that was given is wrong; before anything is written.
        FloatingPointError: the loss or the gradient norm is not finite; checkpoints that are there stay.
    """
    base = Pretrained.open(arguments.inputs.model)
    sizes = arguments.layout.sizes(base.architecture.transformer["num_layers"])
    _, world_size, _ = environment()
    arguments.check_division(sizes, world_size)
    adapter = _adapter(arguments, base)
    with distributed(
        sizes,
        seed=arguments.batches.seed,
        backend=arguments.layout.distributed_backend,
        timeout_minutes=arguments.layout.distributed_timeout_minutes,
    ) as device:
        _finetune(arguments, base, sizes, adapter, device)


def _adapter(arguments: Arguments, base: Pretrained) -> Start:
    """What the options, or the adapter that they name, say of the adapter."""
    seed, lora, path = arguments.batches.seed, arguments.lora, arguments.inputs.resume_from_peft
    if path is None:
        return Start(LoraConfig.from_dict(lora.fields(seed), str(lora.lora_config or "LoRA")))
    adapter_dtype = DTYPES[lora.lora_adapter_dtype] if lora.lora_adapter_dtype else None
    return Start.read(path, base, seed, _dtype(arguments), adapter_dtype)


def _dtype(arguments: Arguments) -> torch.dtype:
    return torch.bfloat16 if arguments.batches.bf16 else torch.float32


def _finetune(
    arguments: Arguments, base: Pretrained, sizes: ParallelSizes, adapter: Start, device: torch.device
) -> None:
    output = Output(arguments.inputs.output)
    resume = arguments.inputs.resume or is_restart()
    warn_of_restarts(arguments.reports.save_interval)
    checkpoint = from_rank_zero(lambda: output.check(resume, arguments.inputs.exit_on_missing_checkpoint))
    setting = together(lambda: Setting.read(arguments, base, sizes, adapter))
    on_rank_zero(lambda: output.check_same(setting.settings))
    if checkpoint is not None:
        reached = int(from_rank_zero(lambda: read_info(checkpoint))["iteration"])
        if reached > setting.iterations:
            raise UsageError(f"--resume: {checkpoint} is beyond the last iteration, {setting.iterations}")
    trainer = _trainer(setting, is_new=checkpoint is None)
    start = 0 if checkpoint is None else output.resumption.load(checkpoint, trainer)
    parameters = mlora.parameter_counts(trainer.chunks)
    on_rank_zero(output.resumption.set_aside)
    on_rank_zero(lambda: output.write_config(_config(setting, output, start, parameters, device)))
    together(output.check_visible)
    _run(setting, trainer, output, start, device)


def _trainer(setting: Setting, is_new: bool) -> Trainer:
    """The adapted model and its optimizer, as a new run starts with them or ready to load a checkpoint."""
    batches = setting.arguments.batches
    dtype = _dtype(setting.arguments)
    chunks = together(
        lambda: build_model(
            setting.base,
            setting.sizes,
            dtype=dtype,
            seq_length=batches.seq_length,
            transformer_impl=setting.transformer_impl,
            **setting.arguments.implementation.overrides(),
            **batches.recompute(),
        )
    )
    mlora.apply(chunks, setting.adapter.config, family=setting.base.family)
    for way, count in Counter(ways(chunks).values()).items():
        logger.info("the low-rank terms of %d linears of this rank: %s", count, way)
    if is_new:
        setting.adapter.load(chunks)
    if setting.reference is not None:
        setting.reference.attach(chunks)
    return Trainer(chunks, setting.optimizer, setting.objective)


def _run(setting: Setting, trainer: Trainer, output: Output, start: int, device: torch.device) -> None:
    """Trains, and writes what is to be written at the end."""
    reports = setting.arguments.reports
    tensorboard = reports.tensorboard_dir or output.tensorboard
    metrics = only_rank_zero(lambda: Metrics(output.metrics, tensorboard, start, open_wandb(reports, output)))
    evaluated = from_rank_zero(lambda: metrics.evaluated if metrics else set())
    loop = Loop(
        trainer,
        *_data(setting, device),
        reports,
        device=device,
        checkpoints=output.checkpoints,
        ranks=output.ranks,
        base={"path": str(setting.base.path), "model_type": setting.base.family.model_type},
        start=start,
        end=setting.iterations,
        evaluated=evaluated,
    )
    with Interruption(device) as interruption:
        if metrics is None:
            loop.run(interruption)
        else:
            with Progress(start, setting.iterations, reports.log_interval, setting.objective.metrics) as progress:
                loop.metrics, loop.progress = metrics, progress
                loop.run(interruption)
    on_rank_zero(lambda: _conclude(loop, output))


def _data(setting: Setting, device: torch.device) -> tuple[TrainData, EvalData | None]:
    arguments, batches = setting.arguments, setting.arguments.batches

    def feed(dataset: Dataset) -> Feed:
        return Feed(
            dataset.rows,
            micro_batch_size=batches.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            device=device,
            packed=batches.packing,
            joined=setting.transformer_impl != "local",
            rows_of_item=setting.objective.rows_of_item,
        )

    plan = BatchPlan(setting.train.items, batches.global_batch_size, batches.seed)
    train = TrainData(setting.train, plan, feed(setting.train))
    if setting.heldout is None:
        return train, None
    eval_plan = EvalPlan(setting.heldout.items, batches.global_batch_size)
    count = min(eval_plan.num_batches, arguments.reports.eval_iters or eval_plan.num_batches)
    return train, EvalData(eval_plan, feed(setting.heldout), count)


def _conclude(loop: Loop, output: Output) -> None:
    """On rank 0: the loss curve, and the exported adapter or how to go on."""
    if loop.metrics:
        loop.metrics.close()
        plot_losses(loop.metrics.records, output.plot, loop.trainer.objective.unit)
    if loop.finished:
        adapter = open_adapter(latest_checkpoint(output.checkpoints))
        profile = "portable" if adapter.is_plain else "peft"
        write_peft(peft_adapter(adapter, profile), output.peft, replace=True, keep=(adapter.source,))
        logger.info("finished at iteration %d; the adapter for Hugging Face PEFT is in %s", loop.iteration, output.peft)
    elif loop.saved:
        logger.info(
            "stopped after iteration %d of %d, which is saved in %s; the same command with --resume goes on",
            loop.iteration,
            loop.end,
            output.checkpoints,
        )
    else:
        logger.info("stopped before the first iteration: nothing is saved, so there is nothing to resume")


def _config(
    setting: Setting, output: Output, start: int, parameters: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """The content of ``config.json``: everything that the run uses."""
    trainable, total = parameters
    batches, sizes = setting.arguments.batches, setting.sizes
    this_start = {
        "iteration": start,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": dist.get_world_size(),
        **dataclasses.asdict(sizes),
        "data": parallel_state.get_data_parallel_world_size(),
        "micro_batch_size": batches.micro_batch_size,
        "transformer_impl": setting.transformer_impl,
        **setting.arguments.implementation.overrides(),
        **batches.recompute(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": dist.get_backend(),
        "versions": versions(),
    }
    return {
        "arguments": setting.arguments.plain(),
        "settings": setting.settings,
        "train_iters": setting.iterations,
        "base": {"path": str(setting.base.path), "model_type": setting.base.family.model_type},
        "data": setting.train.facts,
        "eval_data": setting.heldout.facts if setting.heldout else None,
        "lora": setting.adapter.config.to_dict(),
        "parameters": {"trainable": trainable, "total": total},
        "starts": [*(output.read_config()["starts"] if output.config.is_file() else []), this_start],
    }
