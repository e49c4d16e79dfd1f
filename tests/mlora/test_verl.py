"""verl's configuration words: what they attach, and what contradicts itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mlora
from mlora import LoraConfig, verl
from mlora.attach import factors
from mlora.checkpoint import adapter_config, save_checkpoint
from mlora.config import LoraConfig as Config
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks

TP2 = ParallelSizes(tensor=2)
WORDS: dict[str, Any] = {
    "lora_rank": 3,
    "lora_alpha": 6,
    "target_modules": "all-linear",
    "exclude_modules": ["down_proj"],
    "lora_adapter_path": None,
}


def attached(rank: int, folder: Path) -> None:
    chunks = verl.attach(gpt.build(TP2), WORDS)
    assert adapter_config(chunks) == LoraConfig(r=3, lora_alpha=6, exclude_modules=["down_proj"])
    assert not any("linear_fc2" in factor.name for factor in factors(chunks))
    gpt.fill_adapter(chunks)
    saved = save_checkpoint(folder, chunks)
    again = verl.attach(gpt.build(TP2), WORDS | {"lora_adapter_path": str(saved)})
    for ours, theirs in zip(factors(again), factors(chunks), strict=True):
        assert ours.name == theirs.name and torch.equal(ours.parameter, theirs.parameter)
    with pytest.raises(ValueError, match=f"lora_rank is 4, and the adapter at {saved} has 3"):
        verl.attach(gpt.build(TP2), WORDS | {"lora_adapter_path": str(saved), "lora_rank": 4})
    with pytest.raises(ValueError, match="verl's settings: unknown field 'lora_alpa'; did you mean 'lora_alpha'"):
        verl.attach(gpt.build(TP2), {"lora_adapter_path": str(saved), "lora_alpa": 6})
    free = gpt.build(TP2)
    assert verl.attach(free, WORDS | {"lora_rank": 0}) == free
    assert mlora.adapter_names(free) == [] and all(p.requires_grad for chunk in free for p in chunk.parameters())
    with pytest.raises(ValueError, match="verl's settings: unknown field 'lora_rnk'; did you mean 'lora_rank'"):
        verl.attach(free, {"lora_rnk": 4})
    with pytest.raises(ValueError, match="verl's settings: unknown field 'lora_alpa'; did you mean 'lora_alpha'"):
        verl.attach(free, {"lora_rank": 4, "lora_alpa": 8})


def test_the_words_attach_what_they_say(tmp_path: Path) -> None:
    run_ranks(2, attached, tmp_path, sizes=TP2)


def test_verls_rank_is_r() -> None:
    assert Config.from_dict({"lora_rank": 5, "lora_adapter_path": None}) == Config.from_dict({"lora_rank": 5, "r": 5})
    assert Config.from_dict({"lora_rank": 5}).r == 5
    with pytest.raises(ValueError, match="r is 4 and lora_rank is 5; they are the same: give one of them"):
        Config.from_dict({"lora_rank": 5, "r": 4})
    with pytest.raises(ValueError, match=r"lora_adapter_path = 'a' is no field.*mlora\.verl\.attach"):
        Config.from_dict({"lora_rank": 5, "lora_adapter_path": "a"})
    with pytest.raises(ValueError, match="r is 0; a LoRA rank"):
        Config.from_dict({"lora_rank": 0})
