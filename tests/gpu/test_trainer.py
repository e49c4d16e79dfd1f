"""The trainer's command line on Transformer Engine's layers: the numbers of Megatron's local ones, and an export that PEFT runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mlora
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.launch import distributed
from parallel.sizes import ParallelSizes
from tests.gpu.test_training import TE

TOKENS = torch.arange(4 * 20).view(4, 20) % 57 + 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tokenizers")
    from tests.tools.runs import write_base, write_pairs

    made = tmp_path_factory.mktemp("trainer")
    write_base(made / "base")
    write_pairs(made / "train.jsonl", 50)
    write_pairs(made / "heldout.jsonl", 9, first=50)
    return made


def train(folder: Path, name: str, *options: Any) -> list[dict[str, Any]]:
    """The metrics of a run in two parts, the second resumed."""
    from mlora_tools.finetune_lora import main
    from tests.tools.runs import metrics

    words = [
        *("--model", folder / "base", "--data", folder / "train.jsonl", "--eval-data", folder / "heldout.jsonl"),
        *("--seq-length", 24, "--global-batch-size", 8, "--micro-batch-size", 2, "--packing", "--lr", 0.02),
        *("--train-iters", 6, "--save-interval", 3, "--log-interval", 1, "--lora-rank", 5, "--lora-dropout", 0.1),
        *("--output", folder / name, *options),
    ]
    for more in (["--exit-interval", 3], ["--resume"]):
        assert main([str(word) for word in [*words, *more]]) == 0
    return metrics(folder / name)


def series(records: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.tensor([record[key] for record in records if key in record], dtype=torch.float64)


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "peft" / "adapter_model.safetensors")


def off(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[key].double(), theirs[key].double()) for key in theirs]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


@torch.no_grad()
def logits_of_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits: torch.Tensor = PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits
    return logits


def test_the_export_is_that_of_local_layers_and_pefts_model_is_ours(folder: Path, no_world: None) -> None:
    te = ("--transformer-impl", "transformer_engine")
    runs = {
        "te": train(folder, "te", *te),
        "local": train(folder, "local", "--transformer-impl", "local"),
        "bf16": train(folder, "bf16", *te, "--bf16"),
    }
    for key in ("loss", "grad_norm", "eval_loss"):
        exact = series(runs["local"], key)
        torch.testing.assert_close(series(runs["te"], key), exact, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(series(runs["bf16"], key), exact, rtol=0.06, atol=0.02)
    start = series(runs["te"], "loss")
    assert start[-1] < 0.9 * start[0]
    assert off(exported(folder, "te"), exported(folder, "local")) < 1e-3

    base = Pretrained.open(folder / "base")
    theirs = logits_of_peft(folder / "base", folder / "te" / "peft")
    with distributed(ParallelSizes()):
        chunks = build_model(base, ParallelSizes(), **TE)
        without = whole_logits(chunks, TOKENS, base.architecture.vocab_size).cpu()
        mlora.load_adapter(chunks, folder / "te" / "peft", base=base)
        ours = whole_logits(chunks, TOKENS, base.architecture.vocab_size).cpu()
    assert (ours - theirs).abs().max() < 1e-4 < 0.1 < (ours - without).abs().max()
