"""The GRPO example: its rule, its loss, and that the reward rises, at several layouts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

from mlora.conversion import open_adapter
from mlora_tools.example_grpo import NUMBERS, Grpo, advantages, main, reward
from tests.tools.runs import Ranks

LAST = NUMBERS - 1


def test_the_rule_counts_up_to_the_first_mistake() -> None:
    prompts = torch.tensor([3, LAST, 0, 5])
    answers = torch.tensor([[4, 5, 6, 7], [0, 1, 2, 2], [2, 2, 3, 4], [6, 6, 7, 8]])
    assert reward(answers, prompts).tolist() == [1.0, 0.75, 0.0, 0.25]


def test_advantages_are_relative_to_the_group() -> None:
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]))
    assert torch.allclose(found.sum(1), torch.zeros(2), atol=1e-6)
    assert found[0, 0] == pytest.approx(1.5, rel=1e-3) and (found[1] == 0).all()


def test_the_loss_is_the_published_one() -> None:
    """Of the first update the gradient is that of the policy and of the divergence; far from generation the gain is clipped."""
    losses = torch.tensor([[0.5, 2.0], [1.5, 0.1]], dtype=torch.float64, requires_grad=True)
    mask, base = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[-0.7, -2.0], [-1.0, -9.0]])
    batch = {
        "loss_mask": mask,
        "advantages": torch.tensor([2.0, -1.0]),
        "before": -losses.detach().float(),
        "base": base,
    }
    total, units, kl = Grpo(clip=0.2, kl_beta=0.5).sums(batch, losses)
    (gradient,) = torch.autograd.grad(total, losses)
    off = (base + losses.detach()).exp()  # π_ref / π
    expected = (torch.tensor([[2.0], [-1.0]]) - 0.5 * (1 - off)) * mask
    assert torch.allclose(gradient, expected.double(), atol=1e-6)
    assert units == 3 and kl.shape == (1,)
    assert kl.item() == pytest.approx(float(((off - off.log() - 1) * mask).sum()), rel=1e-5)
    moved = {**batch, "before": batch["before"] - 1, "base": -losses.detach().float()}
    (gradient,) = torch.autograd.grad(Grpo(clip=0.2, kl_beta=0.0).sums(moved, losses)[0], losses)
    assert (gradient[0] == 0).all() and gradient[1, 0] != 0


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (1, ["--train-iters", 50]),
        (2, ["--tensor-model-parallel-size", 2]),
        (2, ["--pipeline-model-parallel-size", 2]),
        (2, []),
    ],
    ids=["one", "TP2", "PP2", "DP2"],
)
def test_the_reward_rises(tmp_path: Path, size: int, words: list[Any]) -> None:
    argv = ["--output", tmp_path / "run", "--train-iters", 20, *words]
    ranks = Ranks(size, argv, tmp_path / "log", entry=main).wait()
    assert [rank.code for rank in ranks] == [0] * size, ranks[0].text
    rewards = [float(found) for found in re.findall(r"reward (\d\.\d+)", ranks[0].text)]
    assert rewards[0] < 0.1
    assert rewards[-1] > (0.4 if size == 1 else 0.06) and rewards[-1] > 3 * rewards[0], ranks[0].text
    adapter = open_adapter(tmp_path / "run" / "checkpoints")
    assert all(bool(module.load().B.any()) for module in adapter.modules)
