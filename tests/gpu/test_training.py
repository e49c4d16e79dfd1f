"""Whole models of Transformer Engine's layers: training runs against Hugging Face PEFT, and against other layouts.

In float32 the low-rank term stands beside Transformer Engine's linears, and every number is PEFT's to the tolerances that hold on
the CPU. In bfloat16 the kernels run; what they may be off by is measured on Megatron's local layers, whose code the CPU proves.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlora import LoraConfig
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from tests.gpu.ranks import run_gpu_ranks
from tests.peft_oracle import train_with_peft
from tests.tiny import tokens, write_model
from tests.training import Case, Layout, Run, errors, failures, join, train_all

LORA = {"r": 5, "lora_alpha": 10, "init_lora_weights": False}
TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}
ONE = Layout(1, ParallelSizes(), 4)
CASES = {
    "llama": Case(lora=LoraConfig(**LORA), overrides=TE),
    "tied, dropout": Case(kind="qwen2-tied", lora=LoraConfig(**LORA, lora_dropout=0.2, seed=3), overrides=TE),
    "packed, dropout": Case(kind="llama3.1", lora=LoraConfig(**LORA, lora_dropout=0.2), packed=True, overrides=TE),
    "qwen3": Case(kind="qwen3", lora=LoraConfig(**LORA), overrides=TE),
    "window": Case(kind="mistral-window", lora=LoraConfig(**LORA), overrides=TE),
    "window, packed": Case(kind="qwen2-window", lora=LoraConfig(**LORA), packed=True, overrides=TE),
    "phi3": Case(kind="phi3", lora=LoraConfig(**LORA, rank_pattern={"qkv_proj": 3}), overrides=TE),
    "gemma3": Case(kind="gemma3", lora=LoraConfig(**LORA), steps=3, overrides=TE),
    "olmo2": Case(kind="olmo2", lora=LoraConfig(**LORA), steps=3, overrides=TE),
    "biases": Case(kind="llama-all-bias", lora=LoraConfig(**LORA), overrides=TE),
    "dora": Case(kind="qwen2", lora=LoraConfig(**LORA, use_dora=True), overrides=TE),
}
LAYOUTS = {
    "TP2": Layout(2, ParallelSizes(tensor=2), 8),
    "TP2+SP": Layout(2, ParallelSizes(tensor=2, sequence_parallel=True), 4),
    "DP2": Layout(2, ParallelSizes(), 1),
    "PP2": Layout(2, ParallelSizes(pipeline=2), 2),
}
BF16 = {"dtype": torch.bfloat16}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in {case.kind for case in CASES.values()}}


@pytest.fixture(scope="module")
def runs(models: dict[str, Path]) -> dict[str, Run]:
    """Every case on one GPU."""
    return on_one_gpu(models, CASES)


def on_one_gpu(models: dict[str, Path], cases: dict[str, Case]) -> dict[str, Run]:
    return {name: join([run]) for name, run in train_all(0, models, cases, ONE).items()}


# PEFT sees each packed sample in a row of its own, which has another mask.
@pytest.mark.parametrize("name", [name for name in CASES if name != "packed, dropout"])
def test_training_is_pefts(models: dict[str, Path], runs: dict[str, Run], name: str) -> None:
    case = CASES[name]
    assert not failures(runs[name], train_with_peft(models[case.kind], case, runs[name].initial))


def test_packed_rows_with_dropout_are_those_of_megatrons_local_layers(
    models: dict[str, Path], runs: dict[str, Run]
) -> None:
    case = replace(CASES["packed, dropout"], overrides={})
    assert not failures(runs["packed, dropout"], join([train_all(0, models, {"": case}, ONE)[""]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_one_gpu(models: dict[str, Path], runs: dict[str, Run], layout: str) -> None:
    given = LAYOUTS[layout]
    ranks = run_gpu_ranks(given.world, train_all, models, CASES, given, sizes=given.sizes)
    for name, run in runs.items():
        assert not failures(join([share[name] for share in ranks]), run), name


def bf16(case: Case, **overrides: Any) -> Case:
    return replace(case, overrides={**case.overrides, **BF16, **overrides})


def distance(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative, of all tensors together."""
    off = sum(float((ours[name] - value).square().sum()) for name, value in exact.items())
    return (off / sum(float(value.square().sum()) for value in exact.values())) ** 0.5


KINDS = ("losses", "norms", "logits_before", "logits_after", "gradients")


def off(runs: dict[str, Run], references: dict[str, Run]) -> dict[str, float]:
    """Each kind of number's error, the root mean square over all of its kind: rounding brings one alone near or far by chance."""
    squares: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name, run in runs.items():
        reference = references[name]
        for what, error in errors(run, reference).items():
            if (kind := what.partition(" ")[0]) in ("losses", "norms", "gradients"):
                squares[kind].append(error**2)
        for kind in ("logits_before", "logits_after"):
            squares[kind].append(distance({kind: getattr(run, kind)}, {kind: getattr(reference, kind)}) ** 2)
    return {kind: (sum(found) / len(found)) ** 0.5 for kind, found in squares.items()}


def much_worse(
    ours: dict[str, float], yardstick: dict[str, float], times: float = 1.5
) -> dict[str, tuple[float, float]]:
    """The kinds of number of which ours are off by more than ``times`` as much; of few numbers, chance alone makes more of it."""
    return {
        kind: (ours[kind], yardstick[kind]) for kind in KINDS if not ours[kind] < times * yardstick[kind] + 1e-3
    }  # fmt: skip


def test_in_bfloat16_the_kernels_are_as_exact_as_plain_torch(models: dict[str, Path]) -> None:
    names = ("llama", "tied, dropout", "packed, dropout", "qwen3", "gemma3")
    cases = {
        f"{name}, {seed}": replace(CASES[name], lora=replace(CASES[name].lora, seed=seed))
        for name in names
        for seed in (1, 2)
    }
    exact = on_one_gpu(models, cases)
    ours = on_one_gpu(models, {name: bf16(case) for name, case in cases.items()})
    theirs = on_one_gpu(models, {name: bf16(case, transformer_impl="local") for name, case in cases.items()})
    assert not much_worse(off(ours, exact), off(theirs, exact))


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
def test_bfloat16_at_two_ranks(models: dict[str, Path], runs: dict[str, Run], layout: str) -> None:
    """Kernels and collectives together, with dropout, whose masks must agree."""
    cases = {name: bf16(CASES[name]) for name in ("llama", "packed, dropout")}
    given = LAYOUTS[layout]
    ranks = run_gpu_ranks(2, train_all, models, cases, given, sizes=given.sizes)
    ours = {name: join([share[name] for share in ranks]) for name in cases}
    assert not much_worse(off(ours, runs), off(on_one_gpu(models, cases), runs), times=2)


@pytest.mark.parametrize(
    "recompute", [FULL, {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}]
)
def test_recomputation_changes_no_bit(models: dict[str, Path], recompute: dict[str, Any]) -> None:
    names = ("tied, dropout", "packed, dropout")
    kept = train_all(0, models, {name: bf16(CASES[name]) for name in names}, ONE)
    again = train_all(0, models, {name: bf16(CASES[name], **recompute) for name in names}, ONE)
    for name in names:
        assert kept[name].steps == again[name].steps
        assert all(torch.equal(mine[2], again[name].final[key][2]) for key, mine in kept[name].final.items())


def weight_gradients(path: Path, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those of the layers' linears without an adapter: what Transformer Engine makes of them alone."""
    (chunk,) = build_model(Pretrained.open(path), ParallelSizes(), **TE, **overrides)
    ids = tokens(8, 24).cuda()
    chunk(
        ids, torch.arange(24, device="cuda").expand(ids.shape), None, labels=ids.roll(-1, 1)
    ).float().mean().backward()
    linears = ((name, p.grad) for name, p in chunk.named_parameters() if "layers." in name and p.ndim == 2)
    return {name: grad.float() for name, grad in linears if grad is not None}


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_an_adapter_trains_on_an_fp8_base(models: dict[str, Path], runs: dict[str, Run], recipe: str) -> None:
    """Losses and gradients are off from float32's by FP8's error, which is that of the base's own gradients without an adapter."""
    fp8 = {**BF16, "fp8": "hybrid", "fp8_recipe": recipe}
    own = distance(weight_gradients(models["llama"], fp8), weight_gradients(models["llama"], {}))
    assert 0.05 < own < 1
    for primary in (False, True):
        case = bf16(CASES["llama"], fp8="hybrid", fp8_recipe=recipe, fp8_param=primary)
        run = join([train_all(0, models, {"llama": case}, ONE)["llama"]])
        assert 1e-4 < off({"llama": run}, runs)["losses"] < 0.03
        assert distance(run.gradients, runs["llama"].gradients) < 1.5 * own
