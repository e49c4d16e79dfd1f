"""The padded vocabulary: rows that tensor parallelism adds to the embedding, and logits that no softmax may see."""

from typing import Any

import torch

_ALIGNMENT = 128  # Megatron's make_vocab_size_divisible_by: whole tiles for each rank's matrix product.


def padded_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding at tensor parallel size ``tensor``."""
    multiple = _ALIGNMENT * tensor
    return -(-vocab_size // multiple) * multiple


class MaskPadding:
    """A forward hook on the output layer that takes the padded vocabulary out of every softmax and maximum.

    Their weights are zero, so their logits would be zero, each adding exp(0) to the softmax's sum. They become the least
    finite value instead: its exponential is exactly zero, and so is the gradient that comes back. Finite, because zero
    probability times an infinite logit is not a number.

    Args:
        vocab_size: rows of the vocabulary that are real.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        """logits [s, b, padded/t], or [s, b, padded] if the layer gathered them; changed in place."""
        logits = output[0]
        width = logits.shape[-1]
        first = 0 if width == module.output_size else module.tp_group.rank() * width
        real = min(max(self._vocab_size - first, 0), width)
        # Behind autograd's back: copying all logits to write some columns would double the model's largest tensor.
        logits.detach()[..., real:].fill_(torch.finfo(logits.dtype).min)
