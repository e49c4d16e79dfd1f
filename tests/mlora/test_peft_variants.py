"""Every kind of adapter trained at sharded layouts against Hugging Face PEFT with the same configuration."""

from pathlib import Path

import pytest

from mlora import LoraConfig
from tests.parity import Shares, in_peft, shares_of, write_models
from tests.training import Case, Run, failures, join

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
CASES = {
    "LoRA+": Case(lora=LoraConfig(r=4), settings={"lora_plus_ratio": 16.0, "lr": 1e-3, "min_lr": 1e-4}),
    "rsLoRA": Case(lora=LoraConfig(**LORA | {"r": 5, "lora_alpha": 3, "use_rslora": True})),
    "patterns": Case(
        lora=LoraConfig(
            **LORA,
            rank_pattern={"v_proj": 3, r"layers\.[02]\.mlp\.down_proj": 7, "up_proj": 1},
            alpha_pattern={r"layers\.1\..*": 3, "gate_proj": 20},
        ),
    ),
    "q and v": Case(lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")),
    "one of two": Case(lora=LoraConfig(**LORA, target_modules=r".*\.(k_proj|up_proj)")),
    "excluded": Case(lora=LoraConfig(**LORA, exclude_modules=["o_proj", "layers.3.mlp.gate_proj"])),
    # With two stages the second has no adapter, with two virtual ones each rank has a chunk without.
    "layers": Case(lora=LoraConfig(**LORA, layers_to_transform=[0, 1], target_modules=["q_proj", "down_proj"])),
    "last layer": Case(
        lora=LoraConfig(**LORA, layers_to_transform=3, target_modules=["v_proj", "o_proj", "gate_proj", "up_proj"])
    ),
    "shared A": Case(lora=LoraConfig(**LORA, shared_A=True)),
    "shared A of q and v": Case(
        lora=LoraConfig(
            **LORA, shared_A=True, target_modules=["q_proj", "v_proj", "up_proj"], alpha_pattern={"v_proj": 2}
        ),
    ),
    "DoRA": Case(
        lora=LoraConfig(r=4, use_dora=True, use_rslora=True),
        settings={"lora_plus_ratio": 8.0, "lr": 2e-3, "min_lr": 2e-4},
    ),
    "DoRA, dropout": Case(lora=LoraConfig(**LORA | {"lora_alpha": 4}, use_dora=True, lora_dropout=0.2)),
    "DoRA of q and v, shared A": Case(
        lora=LoraConfig(**LORA, use_dora=True, shared_A=True, target_modules=["q_proj", "v_proj", "down_proj"])
    ),
    "PiSSA, rsLoRA": Case(lora=LoraConfig(r=4, lora_alpha=3, use_rslora=True, init_lora_weights="pissa")),
    "OLoRA, DoRA": Case(lora=LoraConfig(r=4, lora_alpha=4, use_dora=True, init_lora_weights="olora")),
    "no clipping": Case(lora=LoraConfig(**LORA), settings={"clip_grad": 0.0, "weight_decay": 0.0}),
    "no warm-up": Case(lora=LoraConfig(**LORA), settings={"warmup_iters": 0, "decay_iters": 5}),
}
SHARDED = ["TP2", "TP2+SP", "PP2", "PP2xVPP2", "DP2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), CASES)


@pytest.fixture(scope="module")
def shares(models: dict[str, Path]) -> Shares:
    return shares_of(models, CASES)


@pytest.fixture(scope="module")
def references(models: dict[str, Path], shares: Shares) -> dict[str, Run]:
    return in_peft(models, CASES, shares("TP2"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", SHARDED)
def test_training_is_pefts(shares: Shares, references: dict[str, Run], layout: str, case: str) -> None:
    ours = join([share[case] for share in shares(layout)])
    assert not failures(ours, references[case])
