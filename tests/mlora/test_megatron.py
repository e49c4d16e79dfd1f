"""The plug for Megatron's scripts: its options, and chunks whose checkpoints hold the adapter alone.

Checkpoints are saved and loaded here by the calls that ``megatron.training.checkpointing`` makes; whole scripts are in
``tests/tools/test_pretrain_gpt_lora.py``.
"""

import argparse
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.models.gpt import GPTModel

import mlora
from mlora import LoraConfig
from mlora.checkpoint import load_checkpoint
from mlora.conversion import open_adapter
from mlora.description import PREFIX, checkpoints, read_info, read_lora_config
from mlora.megatron.arguments import add_lora_args, lora_config_from_args
from mlora.megatron.chunk import DESCRIPTION, check_description, save_adapter_only
from mlora.options import Lora
from mlora.train import OptimizerSettings, Trainer
from mlora_tools.options import parse
from parallel.optimizer import load as load_optimizer
from parallel.optimizer import saveable
from parallel.sizes import ParallelSizes
from parallel.storage import Reader
from tests import gpt
from tests.ranks import end_writers, run_ranks

CONFIG = LoraConfig(r=3, lora_alpha=6, rank_pattern={"v_proj": 2}, modules_to_save=["model.norm"], seed=5)
LAYOUTS = {
    "TP1": (1, ParallelSizes()),
    "DP2": (2, ParallelSizes()),
    "TP2xPP2": (4, ParallelSizes(tensor=2, pipeline=2)),
    "PP2xVPP2": (2, ParallelSizes(pipeline=2, virtual_pipeline=2)),
}


def _parse(words: Sequence[str]) -> LoraConfig | None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--kv-lora-rank", type=int, default=32)  # Megatron's own, of MLA
    assert add_lora_args(parser) is parser
    return lora_config_from_args(parser.parse_args(words))


@pytest.mark.parametrize(
    "words",
    [
        "--lora-rank 16",
        "--lora-alpha 32",
        "--lora-rank 4 --lora-alpha 8 --lora-dropout 0.1 --lora-target-modules q_proj linear_fc2 --lora-layers 0 2",
        "--lora-target-modules .*proj --lora-use-rslora --lora-init olora --lora-adapter-dtype float32",
        "--lora-exclude-modules o_proj --lora-shared-a --lora-use-dora",
    ],
)
def test_options_mean_what_they_mean_to_our_trainer(words: str) -> None:
    ((ours,), _) = parse([Lora], words.split(), "")
    assert _parse(["--seed", "7", *words.split()]) == LoraConfig.from_dict(ours.fields(7))


def test_without_an_option_there_is_no_lora(tmp_path: Path) -> None:
    assert _parse(["--seed", "3", "--kv-lora-rank", "8"]) is None
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 5, "peft_type": "LORA", "target_modules": ["q_proj"]})
    )
    config = _parse(["--lora-config", str(tmp_path / "adapter_config.json")])
    assert config is not None and (config.r, config.target_modules, config.seed) == (5, ("q_proj",), 1234)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora-rank 0", "r is 0"),
        ("--lora-alpha 0", "lora_alpha is 0"),
        ("--lora-target-modules q_proj .*x", "is no name"),
        ("--lora-init best", "init_lora_weights is 'best'"),
    ],
)
def test_values_that_make_no_sense_are_named(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _parse(words.split())


def _trainer(sizes: ParallelSizes, config: LoraConfig) -> Trainer:
    chunks = gpt.build_to_train(sizes)
    mlora.apply(chunks, config)
    save_adapter_only(chunks)
    return Trainer(chunks, OptimizerSettings(lr=1e-2, decay_iters=8))


def _step(trainer: Trainer, iteration: int) -> tuple[float, float]:
    result = trainer.step(gpt.global_batch(iteration), iteration)
    return result.loss, result.grad_norm


def _state(trainer: Trainer, is_loading: bool) -> dict[str, Any]:
    """As Megatron's ``generate_state_dict`` puts it together."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": group,
    }
    many = len(trainer.chunks) > 1
    state: dict[str, Any] = {"iteration": 1, "checkpoint_version": 3.0}
    for number, chunk in enumerate(trainer.chunks):
        state[f"model{number}" if many else "model"] = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
    with saveable(trainer.optimizer):
        state["optimizer"] = trainer.optimizer.sharded_state_dict(state, metadata=metadata, is_loading=is_loading)
    return state


def _save(trainer: Trainer, folder: Path, *, asynchronous: bool) -> None:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), group)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    named = (
        {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
    )
    try:
        request = dist_checkpointing.save(
            _state(trainer, is_loading=False), str(folder), strategy, async_sharded_save=asynchronous, **named
        )
        if asynchronous:
            queue = AsyncCallsQueue()
            queue.schedule_async_request(request)
            queue.maybe_finalize_async_calls(blocking=True, no_dist=False)
            queue.close()
    finally:
        end_writers()


def _load(trainer: Trainer, folder: Path) -> None:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), group)
    loaded = dist_checkpointing.load(_state(trainer, is_loading=True), str(folder), strategy)
    for number, chunk in enumerate(trainer.wrapped):
        chunk.load_state_dict(loaded[f"model{number}" if len(trainer.wrapped) > 1 else "model"], strict=True)
    load_optimizer(trainer.optimizer, loaded["optimizer"])


def _never_stop(rank: int, sizes: ParallelSizes, folder: Path, asynchronous: bool) -> dict[str, Any]:
    trainer = _trainer(sizes, CONFIG)
    _step(trainer, 0)
    _save(trainer, folder, asynchronous=asynchronous)
    saved = gpt.pieces(trainer.chunks)
    return {"saved": saved, "next": _step(trainer, 1), "end": gpt.pieces(trainer.chunks)}


def _resume(rank: int, sizes: ParallelSizes, folder: Path) -> dict[str, Any]:
    trainer = _trainer(sizes, LoraConfig(**{**CONFIG.to_dict(), "seed": 77}))
    _load(trainer, folder)
    loaded = gpt.pieces(trainer.chunks)
    return {"loaded": loaded, "next": _step(trainer, 1), "end": gpt.pieces(trainer.chunks)}


def _whole(ranks: Sequence[Mapping[str, Any]], what: str) -> dict[str, torch.Tensor]:
    return gpt.whole([rank[what] for rank in ranks])


@pytest.mark.parametrize(
    ("saving", "loading", "asynchronous"),
    [
        ("TP2xPP2", "DP2", False),
        ("DP2", "PP2xVPP2", True),
        ("PP2xVPP2", "TP2xPP2", True),
        ("TP1", "TP1", False),
    ],
)
def test_training_goes_on_from_an_adapter_only_checkpoint(
    saving: str, loading: str, asynchronous: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "iter_0000001"
    size, sizes = LAYOUTS[saving]
    straight = run_ranks(size, _never_stop, sizes, folder, asynchronous, sizes=sizes)
    size, sizes = LAYOUTS[loading]
    resumed = run_ranks(size, _resume, sizes, folder, sizes=sizes)

    saved, loaded = _whole(straight, "saved"), _whole(resumed, "loaded")
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    torch.testing.assert_close(resumed[0]["next"], straight[0]["next"], rtol=1e-5, atol=0)
    torch.testing.assert_close(_whole(resumed, "end"), _whole(straight, "end"), rtol=1e-4, atol=1e-6)

    with Reader(folder) as reader:
        keys = set(reader.tensors())
        assert {key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)} == saved.keys()
        assert all(PREFIX in key for key in keys), "the base or its optimizer state is in the checkpoint"
        for name, tensor in saved.items():
            assert torch.equal(reader.tensor(PREFIX + name), tensor)
    _check_converters(folder, saved)


def _check_converters(folder: Path, saved: Mapping[str, torch.Tensor]) -> None:
    assert checkpoints(folder.parent) == [folder]
    info = read_info(folder)
    assert info["iteration"] == 1 and info["layers"] == gpt.LAYERS
    assert read_lora_config(folder) == CONFIG
    state = open_adapter(folder.parent)
    assert len(state.modules) == gpt.LAYERS * 7
    (module,) = (module for module in state.modules if module.name == "model.layers.2.self_attn.v_proj")
    assert torch.equal(module.B.load(), saved["decoder.layers.2.self_attention.linear_qkv.v.lora_B"])
    assert (module.rank, module.scaling) == (2, 3.0)
    assert {name: tensor.shape for name, tensor in state.full.items()} == {"model.norm.weight": (gpt.HIDDEN,)}


def _attached(sizes: ParallelSizes, config: LoraConfig) -> list[torch.nn.Module]:
    chunks: list[torch.nn.Module] = list(gpt.build(sizes))
    mlora.apply(chunks, config)
    save_adapter_only(chunks)
    return chunks


def _names(rank: int, sizes: ParallelSizes) -> None:
    plain = gpt.build(sizes)
    keys = [set(chunk.state_dict()) for chunk in plain]
    base = [
        {key: None if value is None else torch.full_like(value, 2) for key, value in chunk.state_dict().items()}
        for chunk in plain
    ]
    # Only the first layer: chunks, and a whole stage, hold no adapter.
    chunks = _attached(sizes, LoraConfig(r=2, layers_to_transform=[0], target_modules=["q_proj"]))
    assert [set(chunk.state_dict()) for chunk in chunks] == keys
    for chunk, state in zip(chunks, base, strict=True):
        assert isinstance(chunk, GPTModel) and type(chunk).__name__ == "LoraGPTModel"
        chunk.load_state_dict(state)
        assert all(bool((value == 2).all()) for value in chunk.state_dict().values() if value is not None)
        with pytest.raises(RuntimeError, match="Missing key"):
            chunk.load_state_dict(dict(list(state.items())[1:]))
    states = [chunk.sharded_state_dict() for chunk in chunks]  # type: ignore[operator]
    held = [set(state) - {DESCRIPTION} for state in states]
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    names = {f"{PREFIX}decoder.layers.0.self_attention.linear_qkv.q.lora_{factor}" for factor in "AB"}
    assert held == [names if first and number == 0 else set() for number in range(len(chunks))]
    for chunk, state in zip(chunks, states, strict=True):
        loaded = {key: piece.data for key, piece in state.items()}
        chunk.load_state_dict(loaded)
        if names & loaded.keys():
            with pytest.raises(ValueError, match=r"linear_qkv\.q\.lora_A is in one of them only"):
                chunk.load_state_dict(
                    {key: value for key, value in loaded.items() if not key.endswith("lora_A")}, strict=False
                )


@pytest.mark.parametrize("layout", ["PP2xVPP2", "TP2xPP2"])
def test_the_base_keeps_its_names_and_loads_as_before(layout: str) -> None:
    size, sizes = LAYOUTS[layout]
    run_ranks(size, _names, sizes, sizes=sizes)


def _buffers(rank: int) -> None:
    trainer = _trainer(ParallelSizes(), CONFIG)
    (wrapped,) = trainer.wrapped
    adapter = sum(piece.numel() for _, _, piece in gpt.pieces(trainer.chunks).values())
    assert sum(parameter.numel() for buffer in wrapped.buffers for parameter in buffer.params) == adapter
    assert (
        sum(parameter.numel() for group in trainer.optimizer.param_groups for parameter in group["params"]) == adapter
    )


def test_only_the_adapter_has_gradient_buffers_and_optimizer_states() -> None:
    run_ranks(1, _buffers)


def _said(rank: int, folder: Path, changes: Sequence[dict[str, Any]]) -> list[str]:
    said = []
    for change in changes:
        chunks = gpt.build(ParallelSizes())
        mlora.apply(chunks, LoraConfig(**{**CONFIG.to_dict(), **change}))
        attached = save_adapter_only(chunks)
        with pytest.raises(ValueError) as error:
            check_description(read_info(folder), attached, "--load out")
        said.append(str(error.value))
    return said


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    run_ranks(1, _never_stop, ParallelSizes(), folder, False)
    expected: list[tuple[dict[str, Any], str]] = [
        ({"r": 4}, "--load out: its adapter has rank 3 at decoder.layers.0.mlp.linear_fc1.gate; the options say 4"),
        ({"lora_alpha": 12}, "has scaling 2.0 at decoder.layers.0.mlp.linear_fc1.gate; the options say 4.0"),
        ({"exclude_modules": ["up_proj"]}, "has decoder.layers.0.mlp.linear_fc1.up, which the options do not ask for"),
        ({"modules_to_save": []}, "trains decoder.final_layernorm whole; the options say no module"),
        ({"use_dora": True}, "has use_dora = False; the options say True"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights = True; the options say 'olora'"),
    ]
    (said,) = run_ranks(1, _said, folder, [change for change, _ in expected])
    for (_, words), message in zip(expected, said, strict=True):
        assert words in message


def _other_scaling(rank: int, folder: Path) -> None:
    trainer = _trainer(ParallelSizes(), LoraConfig(**{**CONFIG.to_dict(), "lora_alpha": 12}))
    with pytest.raises(ValueError, match=r"has scaling 2\.0"):
        _load(trainer, folder)


def test_loading_compares_too(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    run_ranks(1, _never_stop, ParallelSizes(), folder, False)
    run_ranks(1, _other_scaling, folder)


def _adapt_the_vocabulary(rank: int, sizes: ParallelSizes) -> None:
    for change in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}):
        chunks = gpt.build(sizes)
        mlora.apply(chunks, LoraConfig(r=2, **change))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Megatron's scripts pad the vocabulary"):
            save_adapter_only(chunks)


def test_the_padded_vocabulary_is_refused_on_every_stage() -> None:
    size, sizes = LAYOUTS["PP2xVPP2"]
    run_ranks(size, _adapt_the_vocabulary, sizes, sizes=sizes)


def _load_plainly(rank: int, folder: Path) -> dict[str, Any]:
    chunks = gpt.build(ParallelSizes(), params_dtype=torch.float32)
    mlora.apply(chunks, read_lora_config(folder))
    load_checkpoint(folder, chunks)
    return gpt.pieces(chunks)


def test_our_own_loading_reads_it_as_a_native_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    sizes = ParallelSizes(tensor=2)
    saved = _whole(run_ranks(2, _never_stop, sizes, folder, False, sizes=sizes), "saved")
    loaded = gpt.whole(run_ranks(1, _load_plainly, folder))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_folder_of_other_checkpoints_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "metadata.json").write_text("{}")
    (tmp_path / "iter_0000001" / ".metadata").write_bytes(b"no pickle")
    assert checkpoints(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="is no mlora checkpoint"):
        read_info(tmp_path / "iter_0000001")
