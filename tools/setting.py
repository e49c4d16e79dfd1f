"""What a run consists of before there is a model: options, data and adapter, and what of them decides the numbers."""

import dataclasses
import logging
from typing import Any

from mlora.conversion.importing import base_projections
from mlora.objective import DataObjective
from mlora.pretrained import Pretrained
from mlora.spec import TransformerImpl, transformer_engine_obstacle
from mlora.targets import select
from mlora.train import OptimizerSettings
from mlora_tools.arguments import Arguments
from mlora_tools.data import Dataset, load_data, open_tokenizer
from mlora_tools.options import UsageError, flag
from mlora_tools.output import model_digest
from mlora_tools.reference import Reference
from mlora_tools.start import Start
from parallel.sizes import ParallelSizes

logger = logging.getLogger(__name__)

# Fields of the optimizer's settings -> the options that give them, where the names differ.
_OPTIONS = {
    "warmup_iters": "--lr-warmup-iters",
    "decay_iters": "--lr-decay-iters",
    "decay_style": "--lr-decay-style",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run consists of before there is a model.

    Attributes:
        settings: what decides the numbers, by the names of the options; a resumed run must have the same.
    """

    arguments: Arguments
    base: Pretrained
    sizes: ParallelSizes
    adapter: Start
    objective: DataObjective
    reference: Reference | None
    optimizer: OptimizerSettings
    train: Dataset
    heldout: Dataset | None
    iterations: int
    settings: dict[str, Any]
    transformer_impl: TransformerImpl

    @classmethod
    def read(cls, arguments: Arguments, base: Pretrained, sizes: ParallelSizes, adapter: Start) -> "Setting":
        """Read the data, and look at the weights' files without reading them.

        Raises:
            ValueError, OSError: something that was given is wrong.
        """
        inputs, batches = arguments.inputs, arguments.batches
        with base.weights():
            pass
        tokenizer = open_tokenizer(inputs.model)
        options: dict[str, Any] = {
            "seq_length": batches.seq_length,
            "packing": batches.packing,
            "vocab_size": base.architecture.vocab_size,
        }
        objective, reference = arguments.objective.make(), arguments.objective.reference_adapter
        train = load_data(inputs.data, tokenizer, objective, **options)
        heldout = load_data(inputs.eval_data, tokenizer, objective, **options) if inputs.eval_data else None
        longest = base.architecture.max_position_embeddings
        if batches.seq_length > longest:
            logger.warning(
                "--seq-length %d is more than the %d that the base model was made for", batches.seq_length, longest
            )
        select(base_projections(base), adapter.config)  # A misspelt target is seen before the base is read.
        frozen = Reference.open(reference, base) if reference else None
        iterations = batches.iterations(train.items)
        optimizer = OptimizerSettings(**arguments.schedule.optimizer(iterations))
        settings = {
            "--model": model_digest(inputs.model),
            "--data": train.digest,
            "--eval-data": heldout.digest if heldout else None,
            "--eval-iters": arguments.reports.eval_iters,
            **{
                flag(name): getattr(batches, name)
                for name in ("global_batch_size", "seq_length", "packing", "seed", "bf16")
            },
            **{flag(name): getattr(arguments.implementation, name) for name in ("fp8_format", "fp8_recipe")},
            **{_OPTIONS.get(name, flag(name)): value for name, value in dataclasses.asdict(optimizer).items()},
            **{f"LoRA's {name}": value for name, value in adapter.config.to_dict().items()},
            **arguments.objective.settings(),
            **({"--reference-adapter": frozen.digest()} if frozen else {}),
        }
        transformer_impl = arguments.implementation.transformer_impl
        if transformer_impl != "local" and (why := transformer_engine_obstacle(base.architecture)):
            raise UsageError(f"--transformer-impl {transformer_impl}: {why}")
        return cls(
            arguments,
            base,
            sizes,
            adapter,
            objective,
            frozen,
            optimizer,
            train,
            heldout,
            iterations,
            settings,
            transformer_impl,
        )
