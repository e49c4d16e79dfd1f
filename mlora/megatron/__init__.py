"""The plug for Megatron-LM's training scripts: LoRA's options in their parser, and adapters in their model.

A script keeps its parser, data sets, checkpoints, logging and evaluation; without one of LoRA's options it runs as before. Its
checkpoints then hold the adapter alone, with optimizer, scheduler and random states: ``--load`` resumes from them, and the base
comes from ``--pretrained-checkpoint`` at every start.
"""

from mlora.megatron.arguments import add_lora_args, lora_config_from_args
from mlora.megatron.plug import pre_wrap_hook, with_lora

__all__ = ["add_lora_args", "lora_config_from_args", "pre_wrap_hook", "with_lora"]
