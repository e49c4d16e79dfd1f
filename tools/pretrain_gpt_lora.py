"""Megatron's own `pretrain` of a GPT with LoRA plugged in: the example to copy. Needs megatron-core 0.18 or newer.

Megatron's arguments, data sets, checkpoints, logging and evaluation are as ever; the lines that speak of LoRA are all that is new.
Without `--lora-...` options it trains the whole model. With MODEL, DATA and TRAINING standing for Megatron's options of these:

  base    torchrun ... tools/pretrain_gpt_lora.py MODEL DATA TRAINING --save base
  LoRA    torchrun ... ... --pretrained-checkpoint base --save out --load out --lora-rank 16
  resume  the same again
  export  python tools/export_peft.py --adapter out --output peft
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import broadcast_data
from megatron.core.utils import get_attr_wrapped_model

from mlora.megatron import add_lora_args, pre_wrap_hook

try:
    from megatron.training import get_args, get_timers, get_tokenizer, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
except ImportError as error:
    raise SystemExit(
        f"error: {error}: this needs megatron-core 0.18 or newer, whose wheels are for Python 3.12"
    ) from None


def get_batch(data: Iterator[dict[str, torch.Tensor]] | None) -> dict[str, torch.Tensor]:
    """A micro batch, [b, s] each, which the first tensor-parallel rank reads for the others."""
    batch = next(data) if data is not None else {}
    integers = broadcast_data(["tokens", "labels", "position_ids"], batch, torch.int64)
    return {**integers, **broadcast_data(["loss_mask"], batch, torch.float32)}


def sum_of_losses(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(sum over the target tokens, their number, what is logged); Megatron divides the one by the other."""
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), {"lm loss": torch.stack([total.detach(), tokens])}


def forward_step(data: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro batch through one model chunk; Megatron calls it."""
    get_timers()("batch-generator", log_level=2).start()
    # Stages between the first and the last need no data.
    outer = is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage"))
    batch: dict[str, Any] = get_batch(data) if outer else defaultdict(lambda: None)
    get_timers()("batch-generator").stop()
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(sum_of_losses, batch["loss_mask"])


def datasets(counts: list[int], vp_stage: int | None = None) -> Any:
    """(training, validation, test) for so many samples: of ``--data-path``, or invented with ``--mock-data``."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )

    def is_built_here() -> bool:
        return bool(is_first_or_last_pipeline_stage(vp_stage)) and parallel_state.get_tensor_model_parallel_rank() == 0

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, counts, is_built_here, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # Every rank builds what it needs.


def use_compiled_index_builder() -> None:
    """Wheels hold the data sets' index builder compiled, and not the Makefile with which `pretrain` would compile it again."""
    if not Path(dataset_utils.__file__).with_name("Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def main() -> None:
    """Train, on this rank; the arguments are Megatron's and LoRA's."""
    use_compiled_index_builder()
    args = parse_and_validate_args(extra_args_provider=add_lora_args)
    cfg = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    cfg.model.pre_wrap_hooks.append(pre_wrap_hook)
    pretrain(cfg, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
