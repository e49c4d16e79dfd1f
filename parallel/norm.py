"""RMSNorm that Megatron's local spec can use under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich 2019, eq. 4).

    Megatron's own torch norm refuses sequence parallelism, whose only demand on a norm is that its weight says that its
    gradient is a partial sum over each rank's piece of the sequence.

    Raises:
        ValueError: the configuration asks for another norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"SequenceParallelRMSNorm cannot stand for normalization {config.normalization!r} with "
                f"layernorm_zero_centered_gamma {config.layernorm_zero_centered_gamma}"
            )
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
