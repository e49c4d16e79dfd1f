"""Dropout masks: the integers that they are defined by, pieces of the whole, statistics, and recomputation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput, model_parallel_cuda_manual_seed

from mlora.dropout import Dropout, MicroBatch, current_micro_batch, set_micro_batch
from tests.ranks import run_ranks

KEY = 0x9D3C_5B1E_F0A7_2468


def kept(dropout: Dropout, *shape: int, first_token: int = 0, first_feature: int = 0) -> torch.Tensor:
    return dropout.kept(
        torch.Size(shape), torch.device("cpu"), first_token=first_token, first_feature=first_feature
    )  # fmt: skip


def combine(x: int) -> int:
    x = x * 0x7FEB352D & 0xFFFFFFFF
    return (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF


def mix(x: int) -> int:
    x = combine(x ^ (x >> 16))
    return x ^ (x >> 16)


def reference(dropout: Dropout, row: int, token: int, feature: int) -> bool:
    """Whether an element is kept, in Python's integers: the definition that any kernel has to give."""
    token_hash = mix(((row * dropout.length + token) ^ dropout.key) & 0xFFFFFFFF)
    feature_hash = mix((feature ^ (dropout.key >> 32)) & 0xFFFFFFFF)
    return combine(token_hash ^ feature_hash) >= dropout.probability * 2**32


@given(
    st.floats(0, 1, exclude_max=True), st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(8, 2**20),
    st.integers(0, 2**20), st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_mask_is_the_one_defined(
    probability: float, key: int, first_row: int, length: int, first_token: int, first_feature: int
) -> None:
    dropout = Dropout(probability, key, first_row, length)
    mask = kept(dropout, 3, 2, 4, first_token=first_token, first_feature=first_feature)
    for token, row, feature in ((t, r, f) for t in range(3) for r in range(2) for f in range(4)):
        expected = reference(dropout, first_row + row, first_token + token, first_feature + feature)
        assert mask[token, row, feature] == expected


def joined(rank: int) -> tuple[Any, Any, MicroBatch]:
    """Masks of three rows of 8 tokens, as three sequences and as one."""
    set_micro_batch(MicroBatch(2, first_row=5))
    apart = kept(Dropout.of(0.4, 1, "linear", 8), 8, 3, 6)
    set_micro_batch(MicroBatch(2, first_row=5, row_length=8))
    together = kept(Dropout.of(0.4, 1, "linear", 24), 24, 1, 6)
    return apart.numpy(), together.numpy(), current_micro_batch()


def test_rows_in_one_sequence_have_the_masks_that_they_have_apart() -> None:
    ((apart, together, batch),) = run_ranks(1, joined)
    assert (together == apart.swapaxes(0, 1).reshape(24, 1, 6)).all()
    assert batch == MicroBatch(2, 5, 8)


def test_pieces_are_slices_of_the_whole() -> None:
    whole = kept(Dropout(0.4, KEY, 0, 12), 12, 6, 20)
    for tokens in (slice(0, 4), slice(4, 12)):
        for rows in (slice(0, 2), slice(2, 6)):
            for features in (slice(0, 7), slice(7, 20)):
                piece = whole[tokens, rows, features]
                mine = kept(
                    Dropout(0.4, KEY, rows.start, 12),
                    *piece.shape,
                    first_token=tokens.start,
                    first_feature=features.start,
                )
                assert torch.equal(mine, piece)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_features_are_divided_by_their_probability_and_the_others_zero(dtype: torch.dtype) -> None:
    dropout = Dropout(0.1, KEY, 2, 8)
    x = torch.randn(8, 3, 500, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    mask = kept(dropout, 8, 3, 500)
    y = dropout(x)
    assert y.dtype == dtype
    exact = torch.where(mask, x.detach().double() / 0.9, 0.0)
    error = (y.detach().double() - exact).abs() / exact.abs().clamp(min=1e-30)
    assert (
        float(error.max()) <= 1.01 * torch.finfo(dtype).eps
    )  # the product rounded, and the scale in float32 or better
    assert abs(float(y.detach().double().abs().sum() / exact.abs().sum()) - 1) < 1e-3  # the scale itself is not rounded
    y.sum().backward()
    gradient = x.grad
    assert gradient is not None
    assert torch.equal(gradient != 0, mask)


def test_what_is_dropped_is_zero_even_if_it_was_not_finite() -> None:
    dropout = Dropout(0.5, KEY, 0, 4)
    y = dropout(torch.full((4, 1, 64), torch.inf))
    assert torch.equal(y == 0, ~kept(dropout, 4, 1, 64))


def z_scores(share: torch.Tensor, probability: float, number: int) -> torch.Tensor:
    """Deviations of shares of ``number`` draws each from the probability, in standard deviations."""
    return (share.double() - probability) / math.sqrt(probability * (1 - probability) / number)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_each_element_row_and_feature_is_dropped_at_the_probability(probability: float) -> None:
    tokens, features = 1024, 2048
    dropped = ~kept(Dropout(probability, KEY, 0, tokens), tokens, 1, features)[:, 0]
    assert abs(float(z_scores(dropped.float().mean(), probability, dropped.numel()))) < 4
    for dim, number in ((0, tokens), (1, features)):
        z = z_scores(dropped.float().mean(dim), probability, number)
        assert float(z.abs().max()) < 7 if probability < 0.01 else float(z.abs().max()) < 5
        assert float(z.square().mean()) == pytest.approx(1, abs=6 * math.sqrt(2 / len(z)))


def signs(dropout: Dropout, *shape: int, **firsts: int) -> torch.Tensor:
    """The mask as -1 and 1, [tokens * rows, features], for probability 0.5."""
    return kept(dropout, *shape, **firsts).flatten(0, 1).double() * 2 - 1


@pytest.mark.parametrize("key", [KEY, 0, 1, 2**32, 2**64 - 1])
def test_tokens_and_features_show_no_common_structure(key: int) -> None:
    tokens, features = 512, 2048
    mask = signs(Dropout(0.5, key, 0, tokens), tokens, 1, features)
    between_tokens = mask @ mask.T / features - torch.eye(tokens)
    assert between_tokens.abs().max() < 5.5 / math.sqrt(features)
    between_features = mask.T @ mask / tokens - torch.eye(features)
    assert between_features.abs().max() < 6 / math.sqrt(tokens)
    # The hashes of token and feature meet in one XOR. Were the mask near a product of the two, its spectrum would show it.
    largest = torch.linalg.matrix_norm(mask, 2)
    assert largest < 1.03 * (math.sqrt(tokens) + math.sqrt(features))
    for step in (1, 2, 3, 64, 256):  # four corners of a rectangle: 0 if independent, 1 for a product
        corners = mask[:-step, :-step] * mask[step:, step:] * mask[:-step, step:] * mask[step:, :-step]
        assert abs(float(corners.mean())) < 5 / math.sqrt(corners.numel())


@pytest.mark.parametrize("bit", [0, 1, 15, 31, 32, 40, 63])
def test_keys_that_differ_in_one_bit_give_unrelated_masks(bit: int) -> None:
    shape = (256, 1, 1024)
    one, other = signs(Dropout(0.5, KEY, 0, 256), *shape), signs(Dropout(0.5, KEY ^ (1 << bit), 0, 256), *shape)
    assert abs(float((one * other).mean())) < 5 / math.sqrt(one.numel())


def masks_of_steps_modules_and_seeds(rank: int) -> torch.Tensor:
    found = []
    for seed, step, module in (
        (0, 0, "a"),
        (0, 0, "b"),
        (0, 1, "a"),
        (1, 0, "a"),
        (0, 1, "b"),
        (0, 10, "a"),
        (1, 0, "0/a"),
    ):
        set_micro_batch(MicroBatch(step, 0))
        found.append(signs(Dropout.of(0.5, seed, module, 64), 64, 2, 512).flatten())
    set_micro_batch(MicroBatch(0, 2))
    found.append(signs(Dropout.of(0.5, 0, "a", 64), 64, 2, 512).flatten())
    return torch.stack(found)


def test_masks_of_different_steps_modules_seeds_and_rows_are_independent() -> None:
    (masks,) = run_ranks(1, masks_of_steps_modules_and_seeds)
    correlation = masks @ masks.T / masks.shape[1] - torch.eye(len(masks))
    assert correlation.abs().max() < 5 / math.sqrt(masks.shape[1])


def without_a_micro_batch(rank: int) -> list[str]:
    messages = []
    for _ in range(2):
        try:
            Dropout.of(0.5, 0, "a", 4)
        except RuntimeError as error:
            messages.append(str(error))
        set_micro_batch(MicroBatch(5, 6))
        assert current_micro_batch() == MicroBatch(5, 6)
        model_parallel_cuda_manual_seed(1)  # forgets all states
    return messages


def test_dropout_without_a_micro_batch_is_an_error() -> None:
    (messages,) = run_ranks(1, without_a_micro_batch)
    assert (
        messages == ["dropout needs to know the micro batch: call mlora.set_micro_batch() before the forward pass"] * 2
    )


def recomputed(rank: int, kind: str) -> dict[str, Any]:
    """Two micro batches through a recomputed layer, backward in the order of 1F1B's warm-up: both forward passes first."""
    seen: list[MicroBatch] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(current_micro_batch())
        return Dropout.of(0.5, 0, "layer", 16)(x)

    def run(x: torch.Tensor) -> torch.Tensor:
        if kind == "full":
            return tensor_parallel.checkpoint(lambda x: layer(x).square(), False, x)  # type: ignore[no-any-return]
        selective = CheckpointWithoutOutput(fp8=None)  # otherwise it asks Transformer Engine for its FP8 state
        y = selective.checkpoint(layer, x)
        z: torch.Tensor = y.square()
        selective.discard_output_and_register_recompute(z)
        return z

    batches = [MicroBatch(3, 0), MicroBatch(3, 2)]
    inputs = [torch.ones(16, 2, 8, requires_grad=True) for _ in batches]
    outputs = []
    for batch, x in zip(batches, inputs, strict=True):
        set_micro_batch(batch)
        outputs.append(run(x))
    values = [y.detach().clone() for y in outputs]
    for y in outputs:
        y.sum().backward()
    same = [torch.equal(x.grad, 2 * value) for x, value in zip(inputs, values, strict=True)]  # type: ignore[arg-type]
    return {"same": same, "differ": not torch.equal(*values), "seen": seen, "after": current_micro_batch()}


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_sees_the_micro_batch_of_the_forward_pass(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Newer Megatrons compile C++ in this, and wait without end for a lock that a killed process has left in the user's folder.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (found,) = run_ranks(1, recomputed, kind)
    first, second = MicroBatch(3, 0), MicroBatch(3, 2)
    assert found == {"same": [True, True], "differ": True, "seen": [first, second, first, second], "after": second}
