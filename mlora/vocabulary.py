"""The model's ends: rows that tensor parallelism adds to the vocabulary, logits that no softmax may see, and families' factors."""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from mlora.attention import soft_cap
from mlora.names import EMBEDDING, OUTPUT_LAYER

_ALIGNMENT = 128  # Megatron's make_vocab_size_divisible_by: whole tiles for each rank's matrix product.


def padded_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding at tensor parallel size ``tensor``."""
    multiple = _ALIGNMENT * tensor
    return -(-vocab_size // multiple) * multiple


def set_vocabulary(module: torch.nn.Module, vocab_size: int, pad_token: int | None = None) -> None:
    """Note at an embedding or output layer how many rows of its whole weight are real, and which row gets no gradient."""
    module._mlora_rows, module._mlora_pad_token = vocab_size, pad_token  # type: ignore[assignment]


def real_rows(module: torch.nn.Module) -> int | None:
    """Rows of the vocabulary without padding; None where nobody has said it, and all rows count as real."""
    return getattr(module, "_mlora_rows", None)


def leave_pad_token(module: torch.nn.Module, parameter: torch.nn.Parameter, dim: int) -> None:
    """Give an embedding's pad token no gradient: Hugging Face's embeddings have ``padding_idx``, and PEFT's terms heed it.

    Args:
        module: the embedding; if nobody has said which token it is, nothing happens.
        parameter: whose ``dim`` holds this rank's tokens.
    """
    token: Any = getattr(module, "_mlora_pad_token", None)
    first: Any = getattr(module, "vocab_start_index", 0)
    if token is None or not 0 <= token - first < parameter.shape[dim]:
        return

    def forget(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.select(dim, token - first).zero_()

    # It comes before Megatron's DDP takes the gradient.
    parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]


def is_embedding(name: str, module: torch.nn.Module) -> bool:
    """Whether a module is the input embedding."""
    return isinstance(module, VocabParallelEmbedding) and name.rpartition(".")[2] == EMBEDDING


def is_output_layer(name: str) -> bool:
    """Whether a module of this name is the output layer."""
    return name.rpartition(".")[2] == OUTPUT_LAYER


class Scale:
    """A forward hook on the embedding that multiplies its output.

    Args:
        factor: rounded to the output's dtype first, as Hugging Face rounds it.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def __call__(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """[s, b, h] -> the same."""
        # As a plain number: a tensor would have to be sent to the GPU, which waits, and no graph could hold it.
        return output * torch.tensor(self._factor, dtype=output.dtype).item()


class CapLogits:
    """A forward hook on the output layer that caps its logits; comes before :class:`MaskPadding`.

    Args:
        cap: greatest logit, in amount.
    """

    def __init__(self, cap: float) -> None:
        self._cap = cap

    def __call__(self, module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        """(logits, bias) -> (capped logits, bias)."""
        return soft_cap(output[0], self._cap), output[1]


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
