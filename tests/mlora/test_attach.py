"""``apply`` on a small GPTModel: the base stays what it is, only adapters train, and every layout and stage agrees."""

import copy
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

import mlora
from mlora import LoraConfig
from mlora.attach import banks, factors
from mlora.families import LLAMA
from mlora.train import OptimizerSettings, Trainer
from parallel.sizes import ParallelSizes
from parallel.stages import named_parameters
from tests import gpt
from tests.ranks import run_ranks

ONE, TP2 = ParallelSizes(), ParallelSizes(tensor=2)
PP2, VPP2 = ParallelSizes(pipeline=2), ParallelSizes(pipeline=2, virtual_pipeline=2)
LAYOUTS: dict[str, tuple[int, ParallelSizes]] = {
    "one": (1, ONE),
    "TP2": (2, TP2),
    "TP2+SP": (2, ParallelSizes(tensor=2, sequence_parallel=True)),
    "TP4": (4, ParallelSizes(tensor=4)),
    "PP2": (2, PP2),
    "VPP2": (2, VPP2),
    "DP2": (2, ONE),
    "TP2xPP2+SP": (4, ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True)),
}
EVERYTHING = LoraConfig(r=3, rank_pattern={"k_proj": 5})


def at(layout: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, sizes, *args)`` returns on every rank of a layout."""
    size, sizes = LAYOUTS[layout]
    return run_ranks(size, function, sizes, *args, sizes=sizes)


# --- the base stays what it is ---


def base_is_unchanged(rank: int, sizes: ParallelSizes) -> None:
    chunks, untouched = gpt.build(sizes), gpt.build(sizes)
    tokens, positions = gpt.micro_batch(0)["tokens"], torch.arange(gpt.LENGTH).expand(gpt.ROWS, -1)
    modules = [dict(chunk.named_modules()) for chunk in chunks]
    parameters = [dict(chunk.named_parameters()) for chunk in chunks]
    states = [chunk.state_dict(keep_vars=True) for chunk in chunks]
    sharded = [sharded_keys(chunk) for chunk in chunks]
    logits = chunks[0](tokens, positions, None) if sizes.pipeline == 1 else None
    assert mlora.apply(chunks, EVERYTHING) == chunks
    adapted = 0
    for chunk, theirs, plain, state, keys in zip(chunks, modules, parameters, states, sharded, strict=True):
        ours = dict(chunk.named_modules())
        assert [name for name in ours if ".lora" not in name] == list(theirs)
        for name, module in theirs.items():
            assert ours[name] is module
            linear = name.rpartition(".")[2] in ("linear_qkv", "linear_fc1", "linear_proj", "linear_fc2")
            assert hasattr(module, "lora") is linear
            if linear:
                kind = RowParallelLinear if name.endswith(("proj", "fc2")) else ColumnParallelLinear
                assert isinstance(module, kind) and type(module) is not kind
                adapted += 1
        for name, parameter in plain.items():
            assert dict(chunk.named_parameters())[name] is parameter
        now = chunk.state_dict(keep_vars=True)
        assert list(now) == list(state) and all(now[key] is state[key] for key in state)
        assert sharded_keys(chunk) == keys
    assert adapted == 4 * sum(len(chunk.decoder.layers) for chunk in untouched)
    if logits is not None:  # B is zero: not a bit of the output is another.
        assert torch.equal(chunks[0](tokens, positions, None), logits)


def sharded_keys(chunk: Any) -> list[str]:
    return sorted(chunk.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group()}))


@pytest.mark.parametrize("layout", ["one", "TP2+SP", "PP2", "VPP2"])
def test_the_base_keeps_its_modules_parameters_keys_and_output(layout: str) -> None:
    at(layout, base_is_unchanged)


def checkpoints_go_both_ways(rank: int, sizes: ParallelSizes) -> None:
    plain, adapted = gpt.build(sizes), gpt.build(sizes)
    mlora.apply(adapted, EVERYTHING)
    gpt.fill_adapter(adapted)
    filled = gpt.pieces(adapted)
    for source, target in ((plain, adapted), (adapted, plain)):
        with torch.no_grad():
            for number, (ours, theirs) in enumerate(zip(source, target, strict=True)):
                for parameter in ours.parameters():
                    parameter.add_(number + 1)
                state = {key: copy.deepcopy(value) for key, value in ours.state_dict().items()}
                theirs.load_state_dict(state, strict=True)
                for key, value in ours.state_dict().items():
                    assert value is None or torch.equal(theirs.state_dict()[key], value)
                for parameter in ours.parameters():
                    parameter.sub_(number + 1)
    for name, (_, _, weight) in gpt.pieces(adapted).items():
        assert torch.allclose(weight, filled[name][2], atol=1e-12), name
    stray = "decoder.layers.0.mlp.linear_fc2.lora.adapters.default.lora_A.whole"
    state = {**adapted[0].state_dict(), stray: torch.zeros_like(dict(adapted[0].named_parameters())[stray])}
    assert adapted[0].load_state_dict(state, strict=False) == ([], [stray])
    assert dict(adapted[0].named_parameters())[stray].all()
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{re.escape(stray)}"'):
        adapted[0].load_state_dict(state, strict=True)


@pytest.mark.parametrize("layout", ["TP2", "VPP2"])
def test_a_base_checkpoint_loads_with_and_without_adapters(layout: str) -> None:
    at(layout, checkpoints_go_both_ways)


def look_alikes(rank: int) -> None:
    """A base that has low-rank projections of its own, by names that look like ours."""
    [chunk] = gpt.build(ONE)
    attention = chunk.decoder.layers[0].self_attention
    attention.q_lora_rank = 8
    attention.linear_q_lora_down = torch.nn.Linear(4, 4, dtype=torch.float64)
    attention.lora_norm = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    before = list(chunk.state_dict())
    mlora.apply([chunk], EVERYTHING)
    assert list(chunk.state_dict()) == before and any("lora" in key for key in before)
    assert not any("linear_q_lora_down" in f.name or "lora_norm" in f.name for f in factors([chunk]))
    assert not attention.lora_norm.requires_grad and not attention.linear_q_lora_down.weight.requires_grad
    trainable, total = mlora.parameter_counts([chunk])
    assert trainable == sum(factor.parameter.numel() for factor in factors([chunk]))
    assert total == sum(parameter.numel() for parameter in chunk.parameters())


def test_adapters_are_told_by_what_they_are_not_by_a_name() -> None:
    run_ranks(1, look_alikes)


# --- what trains ---


def trainable_names(rank: int, sizes: ParallelSizes) -> tuple[set[str], set[str]]:
    chunks = gpt.build(sizes)
    mlora.apply(chunks, EVERYTHING)
    named = [item for chunk in chunks for item in named_parameters(chunk)]
    trained = {id(parameter) for _, parameter in named if parameter.requires_grad}
    assert trained == {id(factor.parameter) for factor in factors(chunks)}
    return {name for name, p in named if p.requires_grad}, {factor.name for factor in factors(chunks)}


@pytest.mark.parametrize("layout", ["one", "TP2", "TP2xPP2+SP"])
def test_adapters_and_nothing_else_require_gradients(layout: str) -> None:
    parts = [("self_attention.linear_qkv", "qkv"), ("mlp.linear_fc1", ("gate", "up"))]
    parts += [("self_attention.linear_proj", ("whole",)), ("mlp.linear_fc2", ("whole",))]
    expected = {
        f"decoder.layers.{layer}.{module}.{part}.lora_{factor}"
        for layer in range(gpt.LAYERS)
        for module, names in parts
        for part in names
        for factor in "AB"
    }
    found = at(layout, trainable_names)
    assert set().union(*(names for _, names in found)) == expected
    assert all(".lora.adapters.default.lora_" in name for names, _ in found for name in names)


def trainer(chunks: list[Any]) -> Trainer:
    return Trainer(chunks, OptimizerSettings(lr=1e-2, weight_decay=0.1, clip_grad=0.5))


def train(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    results = [trainer.step(gpt.global_batch(iteration), iteration) for iteration in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def trained(rank: int, sizes: ParallelSizes, config: LoraConfig) -> tuple[list[tuple[float, float]], gpt.Pieces, int]:
    """(losses and norms, weights after two steps, number of this rank's adapted linears); the base has not moved."""
    chunks = gpt.build_to_train(sizes)
    mlora.apply(chunks, config)
    gpt.fill_adapter(chunks)
    before = [{key: copy.deepcopy(value) for key, value in chunk.state_dict().items()} for chunk in chunks]
    run = trainer(chunks)
    held = {id(parameter) for parameter in in_optimizer(run.optimizer)}
    assert held == {id(factor.parameter) for factor in factors(chunks)}
    buffered = [p for wrapped in run.wrapped for buffer in wrapped.buffers for p in buffer.params]
    assert {id(parameter) for parameter in buffered} == held
    results = train(run, 2)
    for chunk, state in zip(chunks, before, strict=True):
        for key, value in chunk.state_dict().items():
            assert value is None or torch.equal(value, state[key]), f"{key} has moved"
    return results, gpt.pieces(chunks), len(list(banks(chunks)))


def in_optimizer(optimizer: Any) -> list[torch.nn.Parameter]:
    """The model's parameters that Megatron's optimizer updates, over all data-parallel ranks' shards."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    found: list[torch.nn.Parameter] = []
    for part in parts:
        if not part.is_stub_optimizer:
            found += part.model_param_group_index_map
            found += [p for buffer in part.buffers for p in buffer.params if p not in part.model_param_group_index_map]
    return found


FIRST_ONLY = LoraConfig(r=3, lora_dropout=0.1, layers_to_transform=[0, 1])
LAST_ONLY = LoraConfig(r=3, lora_dropout=0.1, layers_to_transform=[3], target_modules=["v_proj", "down_proj"])


@pytest.mark.parametrize("name", ["everything", "first", "last"])
def test_a_stage_without_targets_trains_and_the_optimizer_holds_adapters_only(name: str) -> None:
    config = {"everything": EVERYTHING, "first": FIRST_ONLY, "last": LAST_ONLY}[name]
    [(results, weights, _)] = at("one", trained, config)
    expected = gpt.whole([weights])
    for layout in ("PP2", "VPP2", "TP2xPP2+SP", "DP2"):
        ranks = at(layout, trained, config)
        if layout == "PP2":
            assert (0 in [count for _, _, count in ranks]) is (name != "everything")
        for found, _, _ in ranks:
            for ours, theirs in zip(found, results, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4), layout
        for key, weight in gpt.whole([held for _, held, _ in ranks]).items():
            assert (weight - expected[key]).norm() < 1e-4 * expected[key].norm(), (layout, key)


def keeps_its_dtype(rank: int) -> None:
    [chunk] = gpt.build(ONE, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True)
    mlora.apply([chunk], LoraConfig(r=2, adapter_dtype=torch.float32))
    mlora.apply([chunk], LoraConfig(r=2), "same")
    chunk = Float16Module(chunk.config, chunk).module
    assert {factor.parameter.dtype for factor in factors(chunk)} == {torch.float32}
    assert {factor.parameter.dtype for factor in factors(chunk, "same")} == {torch.bfloat16}


def test_megatrons_half_precision_wrapper_leaves_an_adapter_its_dtype() -> None:
    run_ranks(1, keeps_its_dtype)


# --- counts and initial weights ---


KINDS: list[bool | str] = [True, False, "gaussian"]
SHARING = [(tied, shared_A) for tied in (False, True) for shared_A in (False, True)]


@functools.cache
def fresh(layout: str) -> list[tuple[list[tuple[int, int]], list[gpt.Pieces]]]:
    """(counts by SHARING, initial weights by KINDS) on every rank of a layout."""
    return at(layout, fresh_adapters)


def fresh_adapters(rank: int, sizes: ParallelSizes) -> tuple[list[tuple[int, int]], list[gpt.Pieces]]:
    counts, weights = [], []
    for tied, shared_A in SHARING:
        chunks = gpt.build(sizes, tied=tied)
        counts.append(mlora.parameter_counts(mlora.apply(chunks, LoraConfig(r=2, shared_A=shared_A))))
    for kind in KINDS:
        chunks = gpt.build(sizes)
        mlora.apply(chunks, LoraConfig(r=3, rank_pattern={"k_proj": 5}, init_lora_weights=kind, seed=11))
        weights.append(gpt.pieces(chunks))
    return counts, weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_global_and_equal_at_every_layout(layout: str) -> None:
    h, f, q, kv = gpt.HIDDEN, gpt.FFN, gpt.HIDDEN, gpt.GROUPS * gpt.HIDDEN // gpt.HEADS
    for number, (tied, shared_A) in enumerate(SHARING):
        layer = (q + 2 * kv) * h + h * q + 2 * f * h + h * f + 2 * h
        base = gpt.LAYERS * layer + h + gpt.VOCAB * h * (1 if tied else 2)
        inputs = (1 if shared_A else 3) * h + q + (1 if shared_A else 2) * h + f
        adapter = gpt.LAYERS * 2 * (inputs + (q + 2 * kv) + h + 2 * f + h)
        assert {counts[number] for counts, _ in fresh(layout)} == {(adapter, base + adapter)}


def counted_experts(rank: int, expert_tensor: int) -> tuple[int, int]:
    tensor = torch.distributed.get_world_size()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, expert_tensor_parallel_size=expert_tensor)
    model_parallel_cuda_manual_seed(1)
    sizes = ParallelSizes(tensor=tensor, sequence_parallel=tensor > 1)
    chunks = gpt.build(sizes, experts=2, expert_layers=[1], expert_tensor_parallel_size=expert_tensor)
    return mlora.parameter_counts(chunks)


def test_experts_that_every_rank_holds_whole_count_once() -> None:
    [expected] = run_ranks(1, counted_experts, 1)
    assert run_ranks(2, counted_experts, 2) == run_ranks(2, counted_experts, 1) == [expected] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_those_of_one_process(layout: str) -> None:
    for number, kind in enumerate(KINDS):
        [expected] = [gpt.whole([weights[number]]) for _, weights in fresh("one")]
        found = gpt.whole([weights[number] for _, weights in fresh(layout)])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), kind
        A = [weight for name, weight in found.items() if name.endswith("lora_A")]
        assert len({tuple(weight.flatten()[:4].tolist()) for weight in A}) == len(A) == gpt.LAYERS * 7
        for name, weight in found.items():
            assert bool((weight == 0).all()) is (name.endswith("lora_B") and kind is not False), name


# --- what is refused, on every rank alike ---


def refusal(rank: int, sizes: ParallelSizes, kwargs: dict[str, Any], name: str, build: dict[str, Any]) -> str:
    """The message of an error of ``apply``, which leaves the model as it was."""
    chunks = gpt.build(sizes, **build)
    before = [[(key, p.requires_grad) for key, p in chunk.named_parameters()] for chunk in chunks]
    with pytest.raises(ValueError) as raised:
        mlora.apply(chunks, LoraConfig(**kwargs), name)
    assert [[(key, p.requires_grad) for key, p in chunk.named_parameters()] for chunk in chunks] == before
    assert not list(banks(chunks))
    return str(raised.value)


REFUSALS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"target_modules": ["q_porj"]}, "default", ["'q_porj' matches no module on any stage", "did you mean 'q_proj'"]),
    ({"target_modules": ["q_proj", "linear_fc3"]}, "default", ["'linear_fc3'", "linear_fc1", "linear_fc2"]),
    ({"target_modules": r".*\\.query_key_value"}, "default", ["matches no module", "model.layers.*.self_attn.q_proj"]),
    ({"exclude_modules": ["o_porj"]}, "default", ["exclude_modules: 'o_porj'", "did you mean 'o_proj'"]),
    ({"rank_pattern": {"v_porj": 2}}, "default", ["rank_pattern: 'v_porj'"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": [4]}, "default", ["no layer 4", "layers 0 to 3"]),
    ({"exclude_modules": ".*"}, "default", ["nothing is left to adapt"]),
    ({}, "my-adapter", ["'my-adapter' must be a Python identifier"]),
    ({"shared_A": True, "rank_pattern": {"layers.3.*k_proj": 2}}, "default", ["layers.3", "shared_A needs one rank"]),
]


@pytest.mark.parametrize(("kwargs", "name", "words"), REFUSALS)
@pytest.mark.parametrize("layout", ["PP2", "VPP2"])
def test_a_mistake_is_told_on_every_stage(layout: str, kwargs: dict[str, Any], name: str, words: list[str]) -> None:
    messages = at(layout, refusal, kwargs, name, {})
    assert len(set(messages)) == 1, messages
    for word in words:
        assert word in messages[0], messages[0]


def test_experts_are_refused_also_where_one_stage_has_none() -> None:
    messages = at("PP2", refusal, {}, "default", {"experts": 2, "expert_layers": [3]})
    assert len(set(messages)) == 1
    assert re.search(r"layers\.3\.mlp\.experts\.local_experts\.0\.linear_fc1 is an expert's linear", messages[0])
    assert "exclude_modules" in messages[0]


def grouped(rank: int, sizes: ParallelSizes) -> str:
    """Experts of Transformer Engine, known by their class's name: one module holds the weights of all."""
    chunks = gpt.build(sizes, experts=2, expert_layers=[3])
    if parallel_state.is_pipeline_last_stage():
        linear = type("TEColumnParallelGroupedLinear", (torch.nn.Module,), {})()
        for expert in range(2):
            linear.register_parameter(f"weight{expert}", torch.nn.Parameter(torch.zeros(2 * gpt.FFN, gpt.HIDDEN)))
        linear.config, linear.tp_group = chunks[0].config, parallel_state.get_tensor_model_parallel_group()
        experts = torch.nn.Module()
        experts.linear_fc1 = linear
        chunks[0].decoder.layers[-1].mlp.experts = experts
    with pytest.raises(ValueError) as raised:
        mlora.apply(chunks, LoraConfig(r=2))
    assert not list(banks(chunks))
    mlora.apply(chunks, LoraConfig(r=2, exclude_modules=["experts.linear_fc1"]))
    return str(raised.value)


def test_grouped_experts_are_not_left_out_in_silence() -> None:
    messages = at("PP2", grouped)
    assert len(set(messages)) == 1
    assert messages[0].startswith("decoder.layers.3.mlp.experts.linear_fc1 is an expert's linear")


SHARED_EXPERTS = {"experts": 2, "expert_layers": [3], "moe_shared_expert_intermediate_size": 16}
OVERLAPPED = {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"}


def test_a_linear_that_does_not_communicate_itself_is_refused() -> None:
    config = {"exclude_modules": r".*local_experts.*"}
    for message in at("TP2+SP", refusal, config, "default", SHARED_EXPERTS | OVERLAPPED):
        assert "layers.3.mlp.shared_experts.linear_fc1: with moe_shared_expert_overlap" in message
        assert "add 'shared_experts.linear_fc1' to exclude_modules" in message


def with_in_proj(rank: int, sizes: ParallelSizes) -> None:
    chunks = gpt.build(sizes)
    config = chunks[0].config
    chunks[0].decoder.layers[0].mixer = torch.nn.Module()
    chunks[0].decoder.layers[0].mixer.in_proj = ColumnParallelLinear(
        gpt.HIDDEN, 64, config=config, init_method=torch.nn.init.zeros_, bias=False, gather_output=False
    )
    if sizes.tensor > 1:
        with pytest.raises(ValueError, match=r"layers\.0\.mixer\.in_proj: each rank holds a piece of every part"):
            mlora.apply(chunks, LoraConfig(r=2))
    mlora.apply(chunks, LoraConfig(r=2, exclude_modules=["in_proj"] if sizes.tensor > 1 else None))


@pytest.mark.parametrize("layout", ["one", "TP2"])
def test_rows_that_mean_others_at_another_tensor_parallel_size_are_refused(layout: str) -> None:
    at(layout, with_in_proj)


def with_context_parallelism(rank: int, sizes: ParallelSizes) -> None:
    """It needs Transformer Engine's attention: here the configuration alone says it."""
    chunks = gpt.build(sizes)
    chunks[0].config.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"a lora_dropout of 0\.1 does not go with context parallelism"):
        mlora.apply(chunks, LoraConfig(lora_dropout=0.1))
    mlora.apply(chunks, LoraConfig())


def test_masks_that_would_repeat_over_the_pieces_of_a_sequence_are_refused() -> None:
    at("one", with_context_parallelism)


def of_no_family(rank: int, sizes: ParallelSizes) -> tuple[str, str]:
    """The messages where the last stage alone has a linear, or another module, that the family does not know."""
    chunks = gpt.build(sizes, experts=2, expert_layers=[3])
    with pytest.raises(ValueError) as linear:
        mlora.apply(chunks, LoraConfig(target_modules=["q_proj"]), family=LLAMA)
    chunks = gpt.build(sizes)
    if parallel_state.is_pipeline_last_stage():
        chunks[-1].value_head = torch.nn.Linear(gpt.HIDDEN, 1)
    with pytest.raises(ValueError) as other:
        mlora.apply(chunks, LoraConfig(modules_to_save=["model.norm"]), family=LLAMA)
    return str(linear.value), str(other.value)


@pytest.mark.parametrize("layout", ["PP2", "VPP2"])
def test_a_module_that_the_family_has_not_is_told_on_every_stage(layout: str) -> None:
    messages = at(layout, of_no_family)
    assert len(set(messages)) == 1
    assert "layers.3.mlp.experts.local_experts.0.linear_fc1 (gate) is no module of the llama family" in messages[0][0]
    assert "value_head (whole) is no module of the llama family" in messages[0][1]


def beside_experts(rank: int, sizes: ParallelSizes) -> list[str]:
    chunks = gpt.build(sizes, experts=2, expert_layers=[3])
    mlora.apply(chunks, LoraConfig(r=2, exclude_modules=r".*experts.*"))
    return sorted({factor.name for factor in factors(chunks)})


def test_the_rest_of_a_model_with_experts_is_adapted() -> None:
    names = [name for found in at("PP2", beside_experts) for name in found]
    assert not any("experts" in name for name in names)
    assert len(names) == 2 * (4 * 4 + 3 * 3)


def duplicates(rank: int, sizes: ParallelSizes) -> None:
    chunks = gpt.build(sizes)
    mlora.apply(chunks, FIRST_ONLY, "one")
    with pytest.raises(ValueError, match="there is an adapter 'one' already"):
        mlora.apply(chunks, LAST_ONLY, "one")
    mlora.apply(chunks, LAST_ONLY, "two")
    with pytest.raises(ValueError, match="there is no adapter 'three'; there is one, two"):
        list(factors(chunks, "three"))
    with pytest.raises(ValueError, match="there is an adapter 'two' already"):
        mlora.apply(chunks, FIRST_ONLY, "two")


def test_a_name_is_taken_once_over_all_stages() -> None:
    at("PP2", duplicates)


def in_ddp(rank: int) -> str:
    [chunk] = gpt.build(ONE, params_dtype=torch.float32)
    wrapped = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), module=chunk)
    with pytest.raises(ValueError) as raised:
        mlora.apply([wrapped], EVERYTHING)
    assert not list(banks([chunk])) and all(parameter.requires_grad for parameter in chunk.parameters())
    return str(raised.value)


def test_a_model_in_ddp_is_refused() -> None:
    assert "attach it before" in run_ranks(1, in_ddp)[0]


def second(rank: int, sizes: ParallelSizes) -> None:
    """Another adapter comes frozen and off, on linears that have one and on others."""
    chunks = gpt.build(sizes)
    mlora.apply(chunks, FIRST_ONLY)
    gpt.fill_adapter(chunks)
    loss = gpt.run(chunks, forward_only=True)
    mlora.apply(chunks, EVERYTHING, "other")
    gpt.fill_adapter(chunks, "other")
    assert gpt.run(chunks, forward_only=True) == loss
    assert not any(factor.parameter.requires_grad for factor in factors(chunks, "other"))
    assert all(factor.parameter.requires_grad for factor in factors(chunks))
    mlora.set_adapter(chunks, "other")
    changed = gpt.run(chunks, forward_only=True)
    assert changed != loss or not parallel_state.is_pipeline_last_stage()
    assert all(factor.parameter.requires_grad for factor in factors(chunks, "other"))
    assert not any(factor.parameter.requires_grad for factor in factors(chunks))


@pytest.mark.parametrize("layout", ["one", "PP2"])
def test_a_second_adapter_comes_frozen_and_off(layout: str) -> None:
    at(layout, second)


def targeted(rank: int, sizes: ParallelSizes, config: LoraConfig) -> list[str]:
    chunks = gpt.build(sizes)
    mlora.apply(chunks, config)
    return sorted(factor.name for factor in factors(chunks))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=r".*\.layers\.0\..*q_proj"),
        LoraConfig(
            target_modules=r"decoder\.layers\.0\.self_attention\.linear_qkv", exclude_modules=["k_proj", "v_proj"]
        ),
        LoraConfig(target_modules=["q_proj"], layers_to_transform=0),
        LoraConfig(target_modules=["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_layer_0_is_that_of_the_whole_model(config: LoraConfig) -> None:
    for layout in ("one", "PP2", "VPP2"):
        names = [name for found in at(layout, targeted, config) for name in found]
        assert names == [f"decoder.layers.0.self_attention.linear_qkv.q.lora_{factor}" for factor in "AB"], layout


# --- recomputation with a frozen embedding ---


def gradients(
    rank: int, sizes: ParallelSizes, config: LoraConfig, recompute: dict[str, Any]
) -> tuple[float, gpt.Pieces]:
    chunks = gpt.build(sizes, **recompute)
    mlora.apply(chunks, config)
    gpt.fill_adapter(chunks)
    for chunk in chunks:
        chunk.train()
    loss = gpt.run(chunks, step=3)
    return loss, gpt.pieces(chunks, "grad")


RECOMPUTE: list[dict[str, Any]] = [
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
]
# In the first layer nothing in front of the MLP requires a gradient.
MLP_ONLY = LoraConfig(r=3, lora_dropout=0.2, target_modules=["gate_proj", "down_proj"])
DROPPING = LoraConfig(r=3, lora_dropout=0.2)


@pytest.mark.parametrize("config", [MLP_ONLY, DROPPING], ids=["mlp", "all"])
@pytest.mark.parametrize("layout", ["one", "PP2", "TP2xPP2+SP"])
def test_recomputing_gives_the_same_gradients(layout: str, config: LoraConfig) -> None:
    plain = at("one", gradients, config, {})
    expected = gpt.whole([held for _, held in plain])
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for recompute in RECOMPUTE:
        ranks = at(layout, gradients, config, recompute)
        assert max(loss for loss, _ in ranks) == pytest.approx(plain[0][0], rel=1e-6)
        found = gpt.whole([held for _, held in ranks])
        assert found.keys() == expected.keys()
        tolerance = 1e-12 if LAYOUTS[layout][1].tensor == 1 else 1e-6  # The loss over a cut vocabulary is float32.
        for name, gradient in found.items():
            assert (gradient - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), (recompute, name)


def summaries(rank: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mlora.attach")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    chunks = gpt.build(ParallelSizes(tensor=4), num_query_groups=2)  # Two ranks hold no row of k, two none of v.
    mlora.apply(chunks, LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    total = mlora.parameter_counts(chunks)[1]
    mlora.apply(chunks, LoraConfig(r=4, target_modules=["k_proj"]), adapter_name="second")
    logger.removeHandler(handler)
    return [*said, str(total)]


def test_the_summary_counts_the_adapter_that_was_added() -> None:
    first, *others = run_ranks(4, summaries, sizes=ParallelSizes(tensor=4))
    assert all(other[:-1] == [] for other in others)
    # A [r, 32] and B [2 groups x 4, r] of each projection, in four layers.
    one, two = 4 * 2 * (2 * 32 + 8 * 2), 4 * (4 * 32 + 8 * 4)
    total = int(first[-1])
    assert first[:-1] == [
        f"LoRA adapter 'default' on 4 linears; {one:,} of {total:,} parameters train ({one / total:.4%})",
        f"LoRA adapter 'second' on 4 linears; {two:,} of {total + two:,} parameters are its own, and do not train "
        f"({two / (total + two):.4%})",
    ]
