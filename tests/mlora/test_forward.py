"""What surrounds a forward pass; the passes themselves are tested by those that need them."""

import pytest
import torch

from mlora.forward import evaluating


def test_evaluation_ends_with_each_chunks_mode_as_it_was_also_after_an_error() -> None:
    training, frozen = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()
    with pytest.raises(ZeroDivisionError), evaluating([training, frozen]):
        assert not training.training and not frozen.training
        raise ZeroDivisionError
    assert training.training and not frozen.training
