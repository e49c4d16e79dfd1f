"""Windows, caps and angles against their definitions, with masks of packed samples."""

import torch
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import attention_mask_func

from mlora.attention import Angles, Cap, Window, soft_cap
from mlora.sft.batches import attention_mask

LENGTH, WINDOW = 9, 3


def softmax(*hooks: Cap | Window) -> FusedScaleMaskSoftmax:
    """Megatron's, as its local spec makes it for causal attention."""
    module = FusedScaleMaskSoftmax(False, False, AttnMaskType.causal, False, attention_mask_func, True, None)
    for hook in hooks:
        module.register_forward_pre_hook(hook)
    return module


def scores() -> torch.Tensor:
    return torch.randn(2, 2, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def allowed(segments: torch.Tensor, window: int) -> torch.Tensor:
    """[b, 1, s, s]: key no later than the query, of the same segment, at most window - 1 places before it."""
    places = torch.arange(segments.shape[1])
    distance = places[:, None] - places[None, :]
    return (segments[:, None, :, None] == segments[:, None, None, :]) & (distance >= 0) & (distance < window)


def test_a_window_lets_a_token_see_itself_and_those_before_it() -> None:
    one, several = torch.zeros(2, LENGTH), torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [1] * 6 + [2]])
    for segments, mask in ((one, None), (one, attention_mask(one)), (several, attention_mask(several))):
        expected = scores().masked_fill(~allowed(segments, WINDOW), -torch.inf).softmax(-1)
        assert torch.equal(softmax(Window(WINDOW))(scores(), mask, None), expected)


def test_a_window_of_the_whole_sequence_changes_nothing() -> None:
    assert Window(LENGTH)(None, (scores(), None, None)) is None
    mask = attention_mask(torch.zeros(2, LENGTH))
    assert torch.equal(softmax(Window(LENGTH))(scores(), mask), softmax()(scores(), mask))
    assert not torch.equal(softmax(Window(LENGTH - 1))(scores(), mask), softmax()(scores(), mask))


def test_a_cap_comes_before_the_mask() -> None:
    expected = (2 * torch.tanh(scores() / 2)).masked_fill(~allowed(torch.zeros(2, LENGTH), WINDOW), -torch.inf)
    assert torch.allclose(softmax(Cap(2.0), Window(WINDOW))(scores(), None), expected.softmax(-1), rtol=0, atol=1e-15)
    assert soft_cap(torch.tensor(1e9), 30.0) == 30.0


def test_angles_are_those_of_one_rope() -> None:
    """The model joins frequencies, and Megatron writes every angle twice."""
    positions = torch.arange(LENGTH).double()
    first, second = torch.tensor([1.0, 0.5]).double(), torch.tensor([0.1, 0.01]).double()
    both = torch.outer(positions, torch.cat([first, second]))
    rotary = torch.cat([both, both], dim=-1)[:, None, None, :]
    for which, frequencies in enumerate((first, second)):
        inputs, kwargs = Angles(which)(None, ("x",), {"rotary_pos_emb": rotary, "attention_mask": None})
        angles = torch.outer(positions, frequencies)
        assert torch.equal(kwargs["rotary_pos_emb"], torch.cat([angles, angles], dim=-1)[:, None, None, :])
        assert (inputs, kwargs["attention_mask"]) == (("x",), None)
