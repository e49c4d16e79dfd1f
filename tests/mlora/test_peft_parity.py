"""Training at every layout against Hugging Face PEFT in one process: every loss, norm, rate, gradient, weight and logit."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlora import LoraConfig
from mlora.checkpoint import save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from tests.parity import in_peft, write_models
from tests.peft_oracle import exported_logits
from tests.ranks import run_ranks
from tests.training import LAYOUTS, Case, Layout, Run, Share, adapt, failures, join, train, train_all

# B is not zero at the start, so that every factor gets a gradient from the first step on. 5 does not divide by 2.
LORA = {"r": 5, "lora_alpha": 10, "init_lora_weights": False}
CASES = {
    "llama": Case(lora=LoraConfig(**LORA), steps=10),
    "qwen2": Case(kind="qwen2", lora=LoraConfig(**LORA), steps=10),
    "qwen3": Case(kind="qwen3", lora=LoraConfig(**LORA), steps=10),
    "mistral": Case(kind="mistral", lora=LoraConfig(**LORA), steps=10),
    "phi3": Case(kind="phi3", lora=LoraConfig(**LORA, rank_pattern={"qkv_proj": 3}, lora_dropout=0.2)),
    "gemma2": Case(kind="gemma2", lora=LoraConfig(**LORA), packed=True, steps=3),
    "gemma3": Case(kind="gemma3", lora=LoraConfig(**LORA), packed=True, steps=3),
    "olmo2": Case(kind="olmo2", lora=LoraConfig(**LORA), steps=3),
    "dora": Case(kind="qwen2", lora=LoraConfig(**LORA, use_dora=True)),
    # One A for each of Phi 3's fused modules, and the singular vectors of all its rows.
    "pissa": Case(kind="phi3", lora=LoraConfig(r=5, lora_alpha=5, init_lora_weights="pissa")),
    # Rows of several samples, of which PEFT sees each alone; the rope's scaling depends on no absolute place either.
    "packed": Case(kind="llama3.1", lora=LoraConfig(**LORA), packed=True),
    "dropout": Case(kind="qwen2-tied", lora=LoraConfig(**LORA, lora_dropout=0.2, seed=3)),
}
# Case -> the profile that it is exported in.
EXPORTED = {"qwen3": "portable", "dora": "peft", "pissa": "portable"}
Shares = Callable[[str], tuple[list[dict[str, Share]], Path]]


def train_and_save(
    rank: int, models: dict[str, Path], cases: dict[str, Case], layout: Layout, folder: Path
) -> dict[str, Share]:
    """Train every case, and save some adapters at the end."""
    shares = train_all(rank, models, {name: case for name, case in cases.items() if name not in EXPORTED}, layout)
    for name in EXPORTED:
        case = cases[name]
        chunks = adapt(models[case.kind], case, layout.sizes)
        shares[name] = train(chunks, case, layout)
        save_checkpoint(folder / name, chunks, base={"path": str(models[case.kind])})
    return shares


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), CASES)


@pytest.fixture(scope="module")
def shares(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Shares:
    """Name of a layout -> every rank's share of every case, and the checkpoints' folder. Each layout runs once."""

    @functools.cache
    def run(name: str) -> tuple[list[dict[str, Share]], Path]:
        layout, folder = LAYOUTS[name], tmp_path_factory.mktemp("checkpoints")
        return run_ranks(layout.world, train_and_save, models, CASES, layout, folder, sizes=layout.sizes), folder

    return run


@pytest.fixture(scope="module")
def references(models: dict[str, Path], shares: Shares) -> dict[str, Run]:
    return in_peft(models, CASES, shares("TP1")[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_pefts(shares: Shares, references: dict[str, Run], layout: str, case: str) -> None:
    ours = join([share[case] for share in shares(layout)[0]])
    assert not failures(ours, references[case])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_optimizer_holds_the_adapter_and_nothing_else(
    shares: Shares, references: dict[str, Run], layout: str
) -> None:
    """Each element once in a data-parallel group; on one rank, as many as PEFT trains."""
    sizes, world = LAYOUTS[layout].sizes, LAYOUTS[layout].world
    copies = world // (sizes.tensor * sizes.pipeline)
    for case in CASES:
        ranks = [share[case] for share in shares(layout)[0]]
        held = sum(piece.numel() for share in ranks for _, _, piece in share.final.values())
        assert sum(share.optimizer_elements for share in ranks) * copies == held
        if sizes.tensor == 1:
            assert held == copies * sum(matrix.numel() for matrix in references[case].final.values())


@pytest.mark.parametrize("case", EXPORTED)
@pytest.mark.parametrize("layout", ["TP2xPP2+SP", "PP2xVPP2", "TP2xDP2"])
def test_the_exported_adapter_gives_our_logits(
    models: dict[str, Path],
    shares: Shares,
    tmp_path: Path,
    layout: str,
    case: str,
) -> None:
    ranks, folder = shares(layout)
    write_peft(peft_adapter(open_adapter(folder / case), EXPORTED[case]), tmp_path / "peft")
    logits = exported_logits(models[CASES[case].kind], tmp_path / "peft")
    for share in ranks:
        ours = share[case].logits_after
        assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
        assert (ours - share[case].logits_before).abs().max() > 0.1
        assert torch.equal(ours, ranks[0][case].logits_after)
