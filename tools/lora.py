"""The trainer's options for the adapter, which Megatron's scripts have too."""

from mlora.options import Lora

__all__ = ["Lora"]
