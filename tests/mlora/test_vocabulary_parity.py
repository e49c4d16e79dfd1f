"""Embedding, output layer and norms, trained whole or by low-rank terms, at every layout against Hugging Face PEFT."""

from pathlib import Path

import pytest
import torch

from mlora import LoraConfig
from tests.parity import Shares, in_peft, shares_of, write_models
from tests.training import LAYOUTS, PADDING, Case, Run, failures, join

LORA = {"r": 5, "lora_alpha": 10, "init_lora_weights": False}
ENDS = ["embed_tokens", "lm_head"]
CASES = {
    "saved": Case(lora=LoraConfig(**LORA, modules_to_save=[*ENDS, "model.norm", "input_layernorm"])),
    "norms": Case(
        kind="qwen3",
        lora=LoraConfig(
            **LORA, modules_to_save=["q_norm", "k_norm", "model.layers.1.post_attention_layernorm"], lora_dropout=0.1
        ),
    ),
    "scaled": Case(kind="gemma2-untied", lora=LoraConfig(**LORA, modules_to_save=ENDS), packed=True, steps=3),
    "adapted": Case(
        kind="qwen2",
        lora=LoraConfig(**LORA, target_modules=["q_proj", *ENDS], lora_dropout=0.2, rank_pattern={"lm_head": 3}),
    ),
    "both": Case(lora=LoraConfig(**LORA, target_modules=["v_proj", "lm_head"], modules_to_save=["embed_tokens"])),
    # The embedding's scale acts on its term, and the output layer keeps the base's weight.
    "tied": Case(
        kind="gemma3", lora=LoraConfig(**LORA, target_modules=["o_proj", "embed_tokens"]), packed=True, steps=3
    ),
    "tied whole": Case(
        kind="gemma3", lora=LoraConfig(**LORA, target_modules=["v_proj"], modules_to_save=["embed_tokens"]), steps=3
    ),
    "dora": Case(kind="qwen2", lora=LoraConfig(**LORA, target_modules=["k_proj", "lm_head"], use_dora=True)),
    "pissa": Case(lora=LoraConfig(r=4, lora_alpha=3, target_modules=["v_proj", "lm_head"], init_lora_weights="pissa")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), CASES, pad_token_id=PADDING)


@pytest.fixture(scope="module")
def shares(models: dict[str, Path]) -> Shares:
    return shares_of(models, CASES)


@pytest.fixture(scope="module")
def references(models: dict[str, Path], shares: Shares) -> dict[str, Run]:
    return in_peft(models, CASES, shares("TP1"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_pefts(shares: Shares, references: dict[str, Run], layout: str, case: str) -> None:
    ours = join([share[case] for share in shares(layout)])
    assert not failures(ours, references[case])


def test_a_module_trained_whole_starts_as_the_base(models: dict[str, Path], references: dict[str, Run]) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32).state_dict()
    initial = references["saved"].initial
    whole = {key.removeprefix("base_model.model."): value for key, value in initial.items() if ".lora_" not in key}
    assert len(whole) == 2 + 1 + 4
    assert all(torch.equal(value, base[key]) for key, value in whole.items())
