"""The quickstart's logits: a checkpoint of one layout, run at another, against Hugging Face PEFT."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlora_tools.quickstart_logits import main
from tests.tiny import VOCAB, tokens
from tests.tools.runs import Ranks, run, write_base, write_pairs


@pytest.mark.parametrize(
    "layout", [("--tensor-model-parallel-size", 2, "--sequence-parallel"), ("--pipeline-model-parallel-size", 2)]
)
def test_they_are_those_of_peft(tmp_path: Path, layout: tuple[object, ...]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, data = write_base(tmp_path / "base"), write_pairs(tmp_path / "train.jsonl", 20)
    argv = ["--model", base, "--data", data, "--seq-length", 24, "--lr", 0.05, "--train-iters", 3]
    (trained,) = run(1, [*argv, "--output", tmp_path / "run"], tmp_path / "log")
    assert trained.code == 0, trained.text
    save_file({"tokens": tokens(3, 20)}, tmp_path / "tokens.safetensors")
    argv = [
        "--base",
        base,
        "--checkpoints",
        tmp_path / "run" / "checkpoints",
        "--tokens",
        tmp_path / "tokens.safetensors",
    ]
    ranks = Ranks(2, [*argv, "--output", tmp_path / "logits.safetensors", *layout], tmp_path / "log", entry=main).wait()
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
    ours = load_file(tmp_path / "logits.safetensors")["logits"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bare = model(tokens(3, 20)).logits.detach()
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "run" / "peft")).eval()(tokens(3, 20)).logits.detach()
    assert ours.shape == (3, 20, VOCAB)
    assert (ours - adapted).abs().max() < 1e-4 < 1e-2 < (ours - bare).abs().max()
