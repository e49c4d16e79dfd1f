"""What some families do to attention and Megatron's specs have no field for, as hooks between its modules.

Megatron's local spec computes scores, hands them with a mask to the softmax, and gives every layer the same rotary angles. The
hooks change what a layer's softmax or attention is given, so that they hold under recomputation and for masks of packed samples
alike. Transformer Engine's attention shows no scores; its windows are fields of the model's config.
"""

from typing import Any

import torch

from mlora.families import Architecture


def shape_attention(layer: Any, architecture: Architecture) -> None:
    """Give one layer the window, cap and angles of its number in the model."""
    attention = layer.self_attention
    window = architecture.windows[layer.layer_number - 1]
    softmax = getattr(attention.core_attention, "scale_mask_softmax", None)
    if softmax is None:
        attention.core_attention.register_forward_pre_hook(refuse_mask, with_kwargs=True)
    else:
        if architecture.attention_cap is not None:
            softmax.register_forward_pre_hook(Cap(architecture.attention_cap))
        if window is not None:
            softmax.register_forward_pre_hook(Window(window))
    if architecture.local_rope is not None:
        attention.register_forward_pre_hook(Angles(0 if window is None else 1), with_kwargs=True)


def refuse_mask(module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook on Transformer Engine's causal attention, which would ignore a mask in silence.

    Raises:
        ValueError: query, key and value come with a mask.
    """
    mask = inputs[3] if len(inputs) > 3 else kwargs.get("attention_mask")
    if mask is not None:
        raise ValueError(
            "Transformer Engine's attention takes no mask: give packed samples as one sequence with cu_seqlens, or build the "
            'model with transformer_impl "local"'
        )


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap · tanh(x / cap)``."""
    return torch.tanh(x / cap) * cap


class Cap:
    """A forward pre-hook on the softmax that caps the scaled scores.

    Args:
        cap: greatest score, in amount.
    """

    def __init__(self, cap: float) -> None:
        self._cap = cap

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Scores [b, n, s, s], mask, offset."""
        scores, *rest = inputs
        return soft_cap(scores, self._cap), *rest


class Window:
    """A forward pre-hook on the softmax that masks keys farther back than the window.

    Rows of a mask that keeps packed samples apart are places in one sequence too, so distance is the same in them.

    Args:
        window: tokens that a token sees, itself included.
    """

    def __init__(self, window: int) -> None:
        self._window = window

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Scores [b, n, s, s], mask (bool, True = masked, broadcast to the scores; None for causal), offset."""
        scores, mask, *rest = inputs
        if scores.shape[-1] <= self._window:
            return None
        every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        return scores, every.tril(-self._window) | (every.triu(1) if mask is None else mask), *rest


class Angles:
    """A forward pre-hook on attention that chooses one of two rotary embeddings, whose frequencies the model has joined.

    Args:
        which: 0 or 1.
    """

    def __init__(self, which: int) -> None:
        self._which = which

    def __call__(self, module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """``rotary_pos_emb`` [s, 1, 1, 2 d]: d/2 angles of the first, d/2 of the second, and both once more."""
        both = kwargs["rotary_pos_emb"]
        mine = both.unflatten(-1, (2, 2, -1))[..., self._which, :].flatten(-2)
        return inputs, {**kwargs, "rotary_pos_emb": mine}
