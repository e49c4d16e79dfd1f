"""Named adapters on Transformer Engine's layers: switched, off, merged, loaded and deleted, beside each other and beside training.

In float32 the low-rank term stands beside Transformer Engine's product, and all is as on Megatron's local layers. In bfloat16 the
base weight is a view into a buffer that holds an adapter too (:mod:`mlora.packed`): what one adapter leaves there must not be seen
by another, by the base, or by whatever reads the weight.
"""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.adapter import LinearAdapter
from mlora.attach import banks, factors, linear_adapters
from mlora.bank import AdapterBank
from mlora.checkpoint import save_checkpoint
from mlora.forward import on_device, run_model
from mlora.log_probs import log_probs
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.te import ways
from mlora.train import OptimizerSettings, Trainer
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules
from tests import gpt
from tests.gpu.linears import FC1, ROWS, TOKENS, Case, build, random
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.mlora.test_saved import ADAPTERS as SAVED
from tests.mlora.test_saved import labelled, micro_batches
from tests.tiny import VOCAB, write_model

TE: dict[str, Any] = {"transformer_impl": "transformer_engine"}
LOCAL: dict[str, Any] = {"transformer_impl": "local"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
DTYPES = [torch.float32, torch.bfloat16]
# "twin" shares the buffer of "wide" and has less to put into it; "broad" needs a wider one; in bfloat16 the last two cannot be
# fused and leave the weight in it.
ADAPTERS = {
    "wide": LoraConfig(r=5, lora_alpha=10, lora_dropout=0.2, seed=3),
    "twin": LoraConfig(r=3, lora_alpha=4),
    "broad": LoraConfig(r=70, lora_alpha=70),
    "some": LoraConfig(r=3, lora_alpha=4, target_modules=["v_proj", "down_proj"], layers_to_transform=[0, 2]),
    "beside": LoraConfig(r=3, adapter_dtype=torch.float64),
    "dora": LoraConfig(r=3, use_dora=True),
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bases by kind."""
    made = tmp_path_factory.mktemp("models")
    for kind in {"llama", *(kind for kind, _ in SAVED.values())}:
        write_model(made / kind, kind, shard_size="1GB")
    return made


def model(folder: Path, dtype: torch.dtype, *names: str, **overrides: Any) -> list[Any]:
    """Chunks with filled adapters, the first of them on."""
    base = Pretrained.open(folder / "llama")
    chunks = build_model(base, ParallelSizes(), dtype=dtype, **{**TE, **overrides})
    for name in names:
        add(chunks, name)
    return chunks


def add(chunks: list[Any], name: str) -> None:
    mlora.apply(chunks, ADAPTERS[name], name)
    gpt.fill_adapter(chunks, name)


def losses(chunks: list[Any], iteration: int = 0) -> torch.Tensor:
    """Of the labels of a micro batch, as the schedules run it."""
    return run_model(chunks[0], on_device(micro_batches()[1]), iteration)


@torch.no_grad()
def evaluated(chunks: list[Any]) -> torch.Tensor:
    """Log-probabilities of all labels, without dropout."""
    return torch.cat(log_probs(chunks, micro_batches())).cpu()


def gradients(chunks: list[Any], name: str) -> Tensors:
    found = {}
    for factor in factors(chunks, name):
        assert factor.parameter.grad is not None, factor.name
        found[factor.name], factor.parameter.grad = factor.parameter.grad, None
    return found


def trained(chunks: list[Any], name: str) -> Tensors:
    """Losses with dropout and gradients of the adapter that is on, and what it gives in evaluation."""
    found = losses(chunks)
    found.sum().backward()
    return {"losses": found.detach(), **gradients(chunks, name), "evaluated": evaluated(chunks)}


def base_weights(chunks: list[Any]) -> Tensors:
    """The base's bits; of quantized weights what they stand for."""
    return {
        name: parameter.detach().clone() if type(parameter) is torch.nn.Parameter else parameter.detach().dequantize()
        for name, parameter in chunks[0].named_parameters()
        if ".lora." not in name
    }


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of the error over the tensor's own."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def worst(ours: Tensors, exact: Tensors) -> float:
    assert ours.keys() == exact.keys()
    return max(error(ours[key], exact[key]) for key in exact)


def kept_where_they_must_be(chunks: list[Any], dtype: torch.dtype) -> None:
    """In bfloat16 every adapted weight is a view into its buffer, so that the tests below are of that."""
    for _, module in adapted(chunks):
        packed = module.lora.packed
        assert (packed is not None) == (dtype == torch.bfloat16)
        if packed is not None:
            assert packed.is_of(module.weight) and not module.weight.is_contiguous()


def adapted(chunks: list[Any]) -> Iterator[tuple[str, Any]]:
    for name, module in named_modules(chunks[0]):
        if isinstance(getattr(module, "lora", None), AdapterBank):
            yield name, module


def every_way(folder: Path, name: str, adapter: Path) -> Tensors:
    """Log-probabilities with a loaded adapter in every way to have it on or off."""
    base = Pretrained.open(folder / SAVED[name][0])
    chunks = build_model(base, ParallelSizes(), **TE)
    found = {"off never": evaluated(chunks)}
    mlora.load_adapter(chunks, adapter, base=base)
    found["on"] = evaluated(chunks)
    with mlora.disable_adapter(chunks):
        found["off"] = evaluated(chunks)
    mlora.merge_adapter(chunks)
    found["on merged"] = evaluated(chunks)
    with mlora.disable_adapter(chunks):
        found["off merged"] = evaluated(chunks)
    mlora.unmerge_adapter(chunks)
    saved = save_checkpoint(adapter.with_name(f"{adapter.name}-native"), chunks)
    mlora.load_adapter(chunks, saved, "again", base=base)
    found["on default"] = evaluated(chunks)
    with mlora.use_adapter(chunks, "again"):
        found["on again"] = evaluated(chunks)
        with mlora.disable_adapter(chunks):
            found["off again"] = evaluated(chunks)
    mlora.set_adapter(chunks, "again")
    mlora.delete_adapter(chunks, "default")
    found["on alone"] = evaluated(chunks)
    mlora.delete_adapter(chunks, "again")
    found["off deleted"] = evaluated(chunks)
    return found


@pytest.mark.parametrize("name", SAVED)
def test_log_probabilities_are_pefts(folder: Path, tmp_path: Path, name: str) -> None:
    kind, config = SAVED[name]
    peft = write_with_peft(tmp_path / "adapter", folder / kind, seed=3, **config)
    ids = torch.cat([batch["tokens"] for batch in micro_batches()])
    with torch.no_grad():
        expected = {"on": labelled(peft(ids).logits)}
        with peft.disable_adapter():
            expected["off"] = labelled(peft(ids).logits)
    assert (expected["on"] - expected["off"]).abs().max() > 0.1
    found = every_way(folder, name, tmp_path / "adapter")
    for way, ours in found.items():
        theirs = expected[way.partition(" ")[0]]
        off = (ours - theirs).abs().max() / theirs.abs().max()
        # cuBLAS sums in another order than the CPU; a merged weight is rounded to float32 once more.
        assert off < 1e-5, (way, off)
        if way.startswith("off"):
            assert torch.equal(ours, found["off never"]), way
        elif way != "on merged":
            assert torch.equal(ours, found["on"]), way


@torch.no_grad()
def on_off_merged(chunks: list[Any]) -> Tensors:
    found = {"on": evaluated(chunks)}
    with mlora.disable_adapter(chunks):
        found["off"] = evaluated(chunks)
    mlora.merge_adapter(chunks, "twin")
    found["merged"] = evaluated(chunks)
    return found


def test_in_bfloat16_log_probabilities_are_as_exact_as_on_local_layers(folder: Path) -> None:
    exact = on_off_merged(model(folder, torch.float32, "twin"))
    ours = on_off_merged(model(folder, torch.bfloat16, "twin"))
    theirs = on_off_merged(model(folder, torch.bfloat16, "twin", **LOCAL))
    for way in exact:
        assert error(ours[way], exact[way]) < 2 * error(theirs[way], exact[way]) + 1e-3, way
    assert error(exact["on"], exact["off"]) > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_adapter_is_as_if_it_were_alone(folder: Path, dtype: torch.dtype) -> None:
    """To the bit, whatever was on before it; in bfloat16, where a base has no part in a fused product, to another GEMM's bits."""
    alone = {name: trained(model(folder, dtype, name), name) for name in ADAPTERS}
    together = model(folder, dtype, *ADAPTERS)
    before, places = base_weights(together), set()
    for name in ("wide", "twin", "some", "wide", "broad", "some", "twin", "beside", "wide", "dora", "broad", "wide"):
        mlora.set_adapter(together, name)
        found = trained(together, name)
        if dtype == torch.float32 or name in ("wide", "twin", "broad"):
            assert same(found, alone[name]), name
        else:
            assert worst(found, alone[name]) < 0.05, name
        assert same(base_weights(together), before), name
        places.add(tuple(module.weight.data_ptr() for _, module in adapted(together)))
    assert len(places) == (2 if dtype == torch.bfloat16 else 1), (
        "a weight is copied when a wider buffer is made, and never else"
    )
    kept_where_they_must_be(together, dtype)
    assert {way.partition(":")[0] for way in ways(together).values()} == {
        "fused" if dtype == torch.bfloat16 else "beside"
    }


def test_switching_takes_no_memory(folder: Path) -> None:
    """A buffer that an adapter leaves behind is freed."""
    names = ("wide", "broad", "beside")
    chunks, used = model(folder, torch.bfloat16, *names), set()
    for round_ in range(3):
        for name in names:
            mlora.set_adapter(chunks, name)
            trained(chunks, name)
        gc.collect()
        if round_:
            used.add(torch.cuda.memory_allocated())
    assert len(used) == 1, used


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_is_the_base_and_on_again_whatever_ends_it(folder: Path, dtype: torch.dtype) -> None:
    base, exact = evaluated(model(folder, dtype)), evaluated(model(folder, torch.float32))
    chunks = model(folder, dtype, "wide", "broad")
    before, fresh = base_weights(chunks), evaluated(chunks)
    for name in ("wide", "broad"):
        mlora.set_adapter(chunks, name)
        on = trained(chunks, name)
        with mlora.disable_adapter(chunks):
            off = evaluated(chunks)
            with mlora.disable_adapter(chunks):
                assert torch.equal(evaluated(chunks), off)
            with mlora.use_adapter(chunks, "wide"):
                assert torch.equal(evaluated(chunks), fresh)
        if dtype == torch.float32:
            assert torch.equal(off, base)
        else:
            assert error(off, exact) < 2 * error(base, exact) + 1e-3
        with pytest.raises(KeyError, match="mine"), mlora.disable_adapter(chunks):
            with pytest.raises(ZeroDivisionError), mlora.use_adapter(chunks, "wide"):
                evaluated(chunks)
                raise ZeroDivisionError
            assert error(evaluated(chunks), off) < 1e-2
            raise KeyError("mine")
        assert same(trained(chunks, name), on) and same(base_weights(chunks), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_off_or_deleted_cannot_spoil_the_base(folder: Path, dtype: torch.dtype) -> None:
    """Not even numbers that are none: nothing of an adapter that training has lost goes into the base's products."""
    chunks = model(folder, dtype, "wide", "twin")
    with mlora.disable_adapter(chunks):
        base = evaluated(chunks)
    mlora.set_adapter(chunks, "twin")
    good = trained(chunks, "twin")
    mlora.set_adapter(chunks, "wide")
    with torch.no_grad():
        for factor in factors(chunks, "wide"):
            factor.parameter.fill_(torch.nan)
    assert evaluated(chunks).isnan().all()
    with mlora.disable_adapter(chunks):
        off = evaluated(chunks)
        assert not off.isnan().any() and error(off, base) < 2e-2
    mlora.set_adapter(chunks, "twin")
    assert same(trained(chunks, "twin"), good)
    mlora.set_adapter(chunks, "wide", inference_mode=True)
    evaluated(chunks)
    mlora.delete_adapter(chunks, "wide")
    off = evaluated(chunks)
    assert not off.isnan().any() and error(off, base) < 2e-2


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Tensors:
    """A pass of one adapter that is alone, with all activations kept."""
    return trained(model(folder, torch.bfloat16, "wide"), "wide")


@pytest.mark.parametrize("reference", [None, "twin", "broad", "beside", "dora"])
@pytest.mark.parametrize("recompute", [{}, FULL, MLP], ids=["kept", "full", "mlp"])
def test_a_reference_pass_between_forward_and_backward_changes_no_bit(
    folder: Path, undisturbed: Tensors, recompute: dict[str, Any], reference: str | None
) -> None:
    """Nor does one with its own graph, whose backward comes later; what is computed again runs with the adapter that was on."""
    chunks = model(folder, torch.bfloat16, "wide", *([reference] if reference else []), **recompute)
    found = losses(chunks)
    with mlora.use_adapter(chunks, reference) if reference else mlora.disable_adapter(chunks):
        first = evaluated(chunks)
    found.sum().backward()
    assert same({"losses": found.detach(), **gradients(chunks, "wide"), "evaluated": evaluated(chunks)}, undisturbed)
    with mlora.use_adapter(chunks, reference) if reference else mlora.disable_adapter(chunks):
        assert torch.equal(evaluated(chunks), first)


def test_graphs_of_two_adapters_live_beside_each_other(folder: Path) -> None:
    """Forward, forward, backward, backward: each finds its own B in a buffer that both share, and its own buffer else."""
    for other in ("twin", "broad"):
        expected = {name: trained(model(folder, torch.bfloat16, name), name) for name in ("wide", other)}
        chunks = model(folder, torch.bfloat16, "wide", other)
        for parameter in chunks[0].parameters():
            parameter.requires_grad_(False)
        graphs = {}
        for name in ("wide", other):
            with mlora.use_adapter(chunks, name):
                for factor in factors(chunks, name):
                    factor.parameter.requires_grad_(True)
                graphs[name] = losses(chunks)
        for name, found in graphs.items():
            found.sum().backward()
            ours = {"losses": found.detach(), **gradients(chunks, name)}
            assert all(torch.equal(value, expected[name][key]) for key, value in ours.items()), (other, name)


@torch.no_grad()
def rounded_once(chunks: list[Any], name: str) -> Tensors:
    """W + σ B A of every adapted linear, float64, by the definition."""
    found = {}
    for path, module in adapted(chunks):
        held, whole = module.lora.adapters[name], module.weight.detach().double()
        assert isinstance(held, LinearAdapter)
        for part, B in held.lora_B.items():
            whole[held.index(part)] += held.scaling[part] * B.double() @ held.lora_A[part].double()
        found[path] = whole
    return found


@pytest.mark.parametrize("name", ["wide", "broad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_is_the_adapter_and_unmerged_the_same_bits(folder: Path, dtype: torch.dtype, name: str) -> None:
    """Whether or not the weight has become a view, and whichever adapter its buffer holds."""
    chunks = model(folder, dtype, "wide", "broad")
    before, expected = base_weights(chunks), rounded_once(chunks, name)
    merged = []
    for forward in (False, True):
        if forward:
            mlora.set_adapter(chunks, name)
            on = evaluated(chunks)
            mlora.set_adapter(chunks, "wide")
            wide = evaluated(chunks)
            kept_where_they_must_be(chunks, dtype)
            with mlora.disable_adapter(chunks):
                base = evaluated(chunks)
        mlora.merge_adapter(chunks, name)
        merged.append(base_weights(chunks))
        for path, module in adapted(chunks):
            # Half a unit in the last place of the weight, and float32's error of the sum.
            limit = expected[path].abs() * torch.finfo(dtype).eps / 2 + 3e-6
            assert ((module.weight.double() - expected[path]).abs() <= limit).all(), path
        if forward:
            assert error(evaluated(chunks), on) < (1e-5 if dtype == torch.float32 else 2e-2) < error(base, on)
            with mlora.disable_adapter(chunks):
                assert torch.equal(evaluated(chunks), base) and same(base_weights(chunks), before)
            assert same(base_weights(chunks), merged[1])
        mlora.unmerge_adapter(chunks)
        assert same(base_weights(chunks), before)
    assert same(*merged) and torch.equal(evaluated(chunks), wide)
    kept_where_they_must_be(chunks, dtype)


def test_a_frozen_quantized_base_is_what_it_was_and_takes_no_merge(folder: Path) -> None:
    overrides = {**FP8, "fp8_param": True}
    base = evaluated(model(folder, torch.bfloat16, **overrides))
    chunks = model(folder, torch.bfloat16, "wide", "some", **overrides)
    before, on = base_weights(chunks), trained(chunks, "wide")
    assert error(on["evaluated"], base) > 0.1
    for name in ("wide", "some"):
        with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp\.linear_fc1 has a quantized weight"):
            mlora.merge_adapter(chunks, name)
    with mlora.disable_adapter(chunks):
        assert torch.equal(evaluated(chunks), base)
    mlora.set_adapter(chunks, "some")
    trained(chunks, "some")
    mlora.set_adapter(chunks, "wide")
    assert same(trained(chunks, "wide"), on) and same(base_weights(chunks), before)


@torch.no_grad()
def test_a_merge_is_seen_where_products_are_in_fp8(folder: Path) -> None:
    """Transformer Engine keeps a weight in FP8 until it is told of a new one, which a plain call of the model does not do."""
    chunks = model(folder, torch.bfloat16, "broad", **FP8)
    batch = on_device(micro_batches()[0])

    def logits() -> torch.Tensor:
        found: torch.Tensor = chunks[0].eval()(batch["tokens"], batch["position_ids"], None)
        return found[..., :VOCAB]

    on = logits()
    with mlora.disable_adapter(chunks):
        base = logits()
    mlora.merge_adapter(chunks, "broad")
    assert error(logits(), on) < 0.3 * error(base, on)
    with mlora.disable_adapter(chunks):
        assert error(logits(), base) < 0.3 * error(base, on)
    mlora.unmerge_adapter(chunks)
    assert error(logits(), on) < 0.3 * error(base, on)


def train_beside(folder: Path, adapter: Path, dtype: torch.dtype, disturbed: bool) -> tuple[list[Any], gpt.Pieces]:
    """Three steps; between them, if ``disturbed``, everything that can be done with other adapters."""
    base = Pretrained.open(folder / "llama")
    chunks = model(folder, dtype, "wide")
    trainer = Trainer(chunks, OptimizerSettings(lr=1e-2, weight_decay=0.1))
    before, bits = addresses(trainer), base_weights(chunks)
    parameters = [parameter for parameter in chunks[0].parameters()]
    steps: list[Any] = []
    for iteration in range(3):
        if disturbed:
            mlora.load_adapter(trainer.wrapped, adapter, "reference", base=base)
            add(chunks, "broad")
            for name in ("reference", "broad"):
                with mlora.use_adapter(trainer.wrapped, name):
                    evaluated(chunks)
                mlora.set_adapter(chunks, name, inference_mode=True)
                assert not any(parameter.requires_grad for parameter in chunks[0].parameters())
                mlora.merge_adapter(chunks, name)
                evaluated(chunks)
                mlora.unmerge_adapter(chunks)
            mlora.set_adapter(chunks, "wide")
            if iteration == 0:
                evaluated(chunks)
            with mlora.disable_adapter(chunks):
                mlora.delete_adapter(chunks, "reference")
            mlora.delete_adapter(chunks, "broad")
        result = trainer.step(micro_batches(), iteration)
        steps.append((result.loss, result.grad_norm))
    assert addresses(trainer) == before
    assert [id(parameter) for parameter in chunks[0].parameters()] == [id(parameter) for parameter in parameters]
    assert same(base_weights(chunks), bits)
    return steps, gpt.pieces(chunks, adapter_name="wide")


def addresses(trainer: Trainer) -> list[int]:
    """Where the adapter and its gradients lie."""
    held = [factor.parameter for factor in factors(trainer.chunks, "wide")]
    held += [factor.parameter.main_grad for factor in factors(trainer.chunks, "wide")]  # type: ignore[attr-defined]
    held += [buffer.grad_data for chunk in trainer.wrapped for buffer in chunk.buffers]
    return [tensor.data_ptr() for tensor in held]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_on_as_if_no_other_adapter_had_been(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write_with_peft(tmp_path / "adapter", folder / "llama", seed=3, target_modules=["q_proj", "v_proj", "up_proj"])
    (steps, weights), (same_steps, same_weights) = (
        train_beside(folder, tmp_path / "adapter", dtype, way) for way in (False, True)
    )
    assert steps == same_steps
    assert all(torch.equal(weights[name][2], same_weights[name][2]) for name in weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deleted_adapter_is_let_go(folder: Path, dtype: torch.dtype) -> None:
    chunks = model(folder, dtype, "wide", "twin")
    mlora.set_adapter(chunks, "twin", inference_mode=True)
    evaluated(chunks)
    held = [weakref.ref(adapter) for adapter in linear_adapters(chunks, "twin")]
    held += [weakref.ref(factor.parameter) for factor in factors(chunks, "twin")]
    mlora.delete_adapter(chunks, "twin")
    gc.collect()
    assert not any(reference() is not None for reference in held)
    assert mlora.adapter_names(chunks) == ["wide"] and len(list(banks(chunks))) == 16


@pytest.mark.parametrize(
    ("dtype", "leaf"),
    [(torch.bfloat16, "weight"), (torch.bfloat16, "layer_norm_weight"), (torch.float32, "layer_norm_weight")],
    ids=str,
)
def test_a_base_that_should_train_is_refused(folder: Path, dtype: torch.dtype, leaf: str) -> None:
    """As on Megatron's local layers: it would get no gradient, or one without the adapter's part."""
    chunks = model(folder, dtype, "wide")
    fused = next(module for path, module in adapted(chunks) if path.endswith("linear_qkv"))
    fused.get_parameter(leaf).requires_grad_(True)
    with pytest.raises(RuntimeError, match="must stay frozen"):
        losses(chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_and_merging_may_follow_inference(folder: Path, dtype: torch.dtype) -> None:
    """What the first pass makes, also one in inference mode, serves whatever comes after it."""
    expected = {name: trained(model(folder, dtype, name), name) for name in ("wide", "twin")}
    chunks = model(folder, dtype, "wide", "twin")
    before = base_weights(chunks)
    with torch.inference_mode():
        evaluated(chunks)
    type(
        chunks[0].rotary_pos_emb
    ).forward.cache_clear()  # Megatron's own angles, made in inference mode, serve no training.
    for name in ("wide", "twin"):
        mlora.set_adapter(chunks, name)
        assert same(trained(chunks, name), expected[name])
    mlora.merge_adapter(chunks, "twin")
    mlora.unmerge_adapter(chunks)
    assert same(base_weights(chunks), before)


def test_a_state_dict_serves_a_model_without_adapters(folder: Path) -> None:
    """Also one that takes the tensors as they are: Transformer Engine would misread a view into a buffer."""
    chunks, plain = model(folder, torch.bfloat16, "wide"), model(folder, torch.bfloat16)
    evaluated(chunks)
    kept_where_they_must_be(chunks, torch.bfloat16)
    expected = evaluated(plain)
    plain[0].load_state_dict(chunks[0].state_dict(), assign=True)
    assert torch.equal(evaluated(plain), expected)


@torch.no_grad()
def test_a_graph_outlives_a_switch() -> None:
    """What a captured graph reads and writes stays its own while another adapter runs, and is not given to other tensors."""
    layer, linear = build(Case(FC1), torch.bfloat16)
    mlora.apply([layer], LoraConfig(r=70, target_modules=["linear_fc1"]), "broad")
    x = random(3, TOKENS, ROWS, linear.in_features, dtype=torch.bfloat16)
    linear(x)  # Here, so that the memory that a switch frees is this stream's.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        linear(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = linear(x)
    graph.replay()
    expected = y.clone()
    sizes = [linear.lora.packed.weight.shape, linear.lora.packed.lora_A.shape]
    mlora.set_adapter([layer], "broad")
    linear(x)
    gc.collect()
    others = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in sizes for _ in range(4)]
    mlora.set_adapter([layer], "default")
    graph.replay()
    assert torch.equal(y, expected)
    assert not any(other.any() for other in others)
