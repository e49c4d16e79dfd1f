"""GRPO on the CPU in a minute: a tiny model learns by reward alone to count up from the number that it is given.

  one process    python tools/example_grpo.py --output grpo-run
  several ranks  torchrun --nproc-per-node 2 tools/example_grpo.py --output grpo-run --tensor-model-parallel-size 2

An example of reinforcement learning on the library, to copy and change: a rule for the reward, a plain generation loop with the
adapter on, advantages relative to a prompt's other answers (GRPO; Shao et al. 2024), updates of the adapter alone, and, as the
reference that the KL term holds the policy to, the same model with the adapter off. The base is a small Llama with random weights:
nothing but the reward can teach it.
"""

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from megatron.core import parallel_state

import mlora
from mlora import LoraConfig
from mlora.checkpoint import save_checkpoint
from mlora.log_probs import log_probs
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.objective import MicroBatches
from mlora.pretrained import Pretrained
from mlora.train import OptimizerSettings, Trainer
from mlora_tools.failure import one_line_errors
from mlora_tools.messages import own_rank
from mlora_tools.options import Help, check_at_least, check_positive, parse
from parallel.launch import distributed
from parallel.sizes import ParallelSizes
from parallel.together import on_rank_zero, together

logger = logging.getLogger(__name__)

NUMBERS = 10  # of the vocabulary: each is a token
ANSWER = 8  # tokens of an answer, behind a prompt of one


@dataclass(frozen=True, kw_only=True)
class Options:
    """options"""

    output: Annotated[Path, Help("directory for the base model and the trained adapter", "DIR")]
    train_iters: Annotated[int, Help("optimizer steps")] = 200
    prompts: Annotated[int, Help("of a step, on each data-parallel rank")] = 8
    group_size: Annotated[int, Help("answers to a prompt, which are held against each other")] = 16
    lr: Annotated[float, Help("learning rate")] = 5e-3
    kl_beta: Annotated[float, Help("how much straying from the base costs")] = 0.01
    clip: Annotated[float, Help("how far a token's probability may move from that at generation")] = 0.2
    lora_rank: Annotated[int, Help("r")] = 8
    tensor_model_parallel_size: Annotated[int, Help("ranks that share each linear")] = 1
    pipeline_model_parallel_size: Annotated[int, Help("pipeline stages")] = 1
    seed: Annotated[int, Help("of the prompts and answers")] = 1234

    def __post_init__(self) -> None:
        check_at_least(1, self, "train_iters", "prompts", "lora_rank")
        check_at_least(2, self, "group_size")
        check_positive(self, "lr", "clip")
        check_at_least(0, self, "kl_beta", "seed")


def reward(answers: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """The rule: the share of an answer that is right up to its first mistake, [n]; after the last number comes 0.

    Args:
        answers: [n, s].
        prompts: [n], the number before the first.
    """
    before = torch.cat([prompts[:, None], answers[:, :-1]], dim=1)
    return (answers == (before + 1) % NUMBERS).cumprod(1).float().mean(1)


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """How much better each answer is than the others to its prompt, in standard deviations: [prompts, group] -> the same."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def generate(chunks: Sequence[torch.nn.Module], prompts: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Answers [n, s] to prompts [n], token by token; the same on every rank of the model, which draws from the same stream."""
    tokens = torch.zeros(len(prompts), ANSWER + 1, dtype=torch.int64)
    tokens[:, 0] = prompts
    for at in range(ANSWER):
        # Attention is causal: what stands behind the last token does not matter yet.
        logits = whole_logits(chunks, tokens[:, :ANSWER], NUMBERS, micro_batch_size=len(prompts))
        chances = logits[:, at].float().softmax(-1).cpu()
        tokens[:, at + 1] = torch.multinomial(chances, 1, generator=random)[:, 0]
    return tokens[:, 1:]


class Grpo:
    """The objective: a clipped policy gradient, and the KL divergence from the base; see :class:`mlora.objective.Objective`.

    The estimate of the divergence, ``x - log x - 1`` with x = π_ref / π, is never negative (Schulman 2020).
    """

    unit = "token of an answer"
    metrics: tuple[str, ...] = ("kl",)

    def __init__(self, clip: float, kl_beta: float) -> None:
        self.clip, self.kl_beta = clip, kl_beta

    def prepare(self, chunks: Sequence[torch.nn.Module], micro_batches: MicroBatches) -> MicroBatches:
        """Log-probabilities as generation had them, and as the base has them, on the ranks that compute the loss."""
        before = log_probs(chunks, micro_batches)
        with mlora.disable_adapter(chunks):
            base = log_probs(chunks, micro_batches)
        if not before:
            return micro_batches
        return [
            {**batch, "before": old, "base": reference}
            for batch, old, reference in zip(micro_batches, before, base, strict=True)
        ]

    def sums(self, batch: Mapping[str, Any], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over the answers' tokens."""
        now, mask, advantage = -losses.float(), batch["loss_mask"], batch["advantages"][:, None]
        ratio = (now - batch["before"]).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        off = batch["base"] - now
        kl = off.exp() - off - 1
        return ((self.kl_beta * kl - gain) * mask).sum(), mask.sum(), (kl.detach() * mask).sum()[None]


def write_base(path: Path) -> None:
    """A Llama with random weights, unless it is there already."""
    if path.is_dir():
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def micro_batch(prompts: torch.Tensor, answers: torch.Tensor, advantage: torch.Tensor, first: int) -> dict[str, Any]:
    """What the trainer takes: prompts [n], answers [n, s], advantages [n], number of the first row."""
    tokens = torch.cat([prompts[:, None], answers[:, :-1]], dim=1)
    return {
        "tokens": tokens,
        "labels": answers,
        "position_ids": torch.arange(ANSWER).expand(tokens.shape),
        "loss_mask": torch.ones(tokens.shape),
        "attention_mask": None,
        "first_row": first,
        "advantages": advantage,
    }


def learn(options: Options, chunks: list[torch.nn.Module]) -> Iterator[tuple[int, float, float, str]]:
    """(iteration, mean reward of its answers, KL divergence, one of its answers), of this data-parallel rank."""
    trainer = Trainer(chunks, OptimizerSettings(lr=options.lr), Grpo(options.clip, options.kl_beta))
    rank = parallel_state.get_data_parallel_rank()
    random = torch.Generator().manual_seed(options.seed + rank)
    rows = options.prompts * options.group_size
    for iteration in range(1, options.train_iters + 1):
        prompts = torch.randint(0, NUMBERS, (options.prompts,), generator=random).repeat_interleave(options.group_size)
        answers = generate(chunks, prompts, random)
        rewards = reward(answers, prompts)
        advantage = advantages(rewards.view(-1, options.group_size)).flatten()
        result = trainer.step([micro_batch(prompts, answers, advantage, rank * rows)], iteration - 1)
        shown = f"{int(prompts[0])}: {' '.join(map(str, answers[0].tolist()))}"
        yield iteration, float(rewards.mean()), result.metrics["kl"], shown


def run(options: Options) -> None:
    """Train, and save the adapter, as one of the ranks that the environment names."""
    sizes = ParallelSizes(tensor=options.tensor_model_parallel_size, pipeline=options.pipeline_model_parallel_size)
    with distributed(sizes, seed=options.seed):
        on_rank_zero(lambda: write_base(options.output / "base"))
        base = Pretrained.open(options.output / "base")
        chunks = together(lambda: build_model(base, sizes, transformer_impl="local"))
        mlora.apply(chunks, LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank), family=base.family)
        began = time.monotonic()
        for iteration, score, kl, shown in learn(options, chunks):
            if iteration == 1 or iteration % 10 == 0 or iteration == options.train_iters:
                seconds = time.monotonic() - began
                logger.info(
                    "iteration %3d | reward %.3f | kl %.3f | %4.1f s | %s", iteration, score, kl, seconds, shown
                )
        saved = save_checkpoint(options.output / "checkpoints", chunks, iteration=options.train_iters)
        logger.info("the adapter is in %s", saved)


def main(argv: Sequence[str] | None = None) -> int:
    """The example, on this rank; its exit code."""
    rank = own_rank()
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    warnings.simplefilter("ignore")  # Megatron's and torch's, to their developers.
    with one_line_errors(rank) as outcome:
        (options,), _ = parse((Options,), argv, __doc__ or "")
        run(options)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
