"""Adapters saved at one layout and loaded at another, bit for bit, and exported to the same bytes from each."""

import dataclasses
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mlora
from mlora import LoraConfig
from mlora.attach import factors, linear_adapters
from mlora.checkpoint import load_checkpoint, save_checkpoint
from mlora.description import PREFIX, checkpoints, latest_checkpoint, read_info
from mlora.export import export_peft
from parallel.reader import Reader
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.ranks import run_ranks

LAYOUTS = {
    "TP1": (1, ParallelSizes()),
    "TP2": (2, ParallelSizes(tensor=2)),
    "TP4": (4, ParallelSizes(tensor=4)),  # more ranks than query groups
    "TP2+SP": (2, ParallelSizes(tensor=2, sequence_parallel=True)),
    "PP2": (2, ParallelSizes(pipeline=2)),
    "PP2xVPP2": (2, ParallelSizes(pipeline=2, virtual_pipeline=2)),
    "TP2xPP2": (4, ParallelSizes(tensor=2, pipeline=2)),
    "DP2": (2, ParallelSizes()),
    "TP2xDP2": (4, ParallelSizes(tensor=2)),
}
ADAPTERS = {
    "everything": LoraConfig(r=5, lora_alpha=10),
    "q_and_v": LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, alpha_pattern={"layers.2.*v_proj": 3}
    ),
    "shared": LoraConfig(r=3, use_rslora=True, shared_A=True, adapter_dtype=torch.bfloat16),
    "middle": LoraConfig(r=1, target_modules=["o_proj", "up_proj"], layers_to_transform=[1, 2]),
    "last": LoraConfig(r=2, target_modules=["model.layers.3.mlp.down_proj"]),
    "dora": LoraConfig(r=2, target_modules=["k_proj", "o_proj"], use_dora=True),
    "start": LoraConfig(r=2, target_modules=["k_proj", "down_proj"], use_rslora=True, init_lora_weights="pissa"),
}


def _model(sizes: ParallelSizes) -> list[torch.nn.Module]:
    """The small model with two query groups and every adapter on it, in float32."""
    chunks: list[torch.nn.Module] = list(
        gpt.build(sizes, num_query_groups=2, params_dtype=torch.float32, pipeline_dtype=torch.float32)
    )
    for name, config in ADAPTERS.items():
        mlora.apply(chunks, config, adapter_name=name)
    return chunks


def _whole(name: str, factor: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return gpt.values(f"{name} {factor}", *shape).to(dtype)


def _save_all(rank: int, sizes: ParallelSizes, folder: Path) -> None:
    chunks = _model(sizes)
    for name in ADAPTERS:
        gpt.fill_adapter(chunks, name)
        save_checkpoint(folder / name, chunks, iteration=3, adapter_name=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layout -> folder that holds each adapter's checkpoint, saved at that layout."""
    folders = {}
    for layout, (size, sizes) in LAYOUTS.items():
        folders[layout] = tmp_path_factory.mktemp(layout.replace("+", "_"))
        run_ranks(size, _save_all, sizes, folders[layout], sizes=sizes)
    return folders


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_hold_each_element_once_and_as_it_was(saved: dict[str, Path], layout: str) -> None:
    for name in ADAPTERS:
        checkpoint = latest_checkpoint(saved[layout] / name)
        with Reader(checkpoint) as reader:
            for key, (shape, dtype) in reader.tensors(PREFIX).items():
                expected = _whole(name, key.removeprefix(PREFIX), shape, dtype)
                assert torch.equal(reader.tensor(key), expected), f"{key} saved at {layout}"
                chunks = reader.metadata.state_dict_metadata[key].chunks
                assert sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape)
            written = sum(place.length for place in reader.metadata.storage_data.values())
        assert sum(path.stat().st_size for path in checkpoint.glob("*.distcp")) == written
        projections = read_info(checkpoint)["projections"]
        reference = read_info(latest_checkpoint(saved["TP1"] / name))["projections"]
        assert projections == reference


def test_every_layout_exports_the_same_bytes(saved: dict[str, Path], tmp_path: Path) -> None:
    for name in ADAPTERS:
        exported = {}
        for layout, folder in saved.items():
            output = tmp_path / f"{name}-{layout}"
            checkpoint = latest_checkpoint(folder / name)
            export_peft(checkpoint, output, profile="peft" if name == "dora" else "portable")
            exported[layout] = _hashes(output)
        assert all(hashes == exported["TP1"] for hashes in exported.values()), (name, exported)


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_what_keeps_its_start_is_exported_as_one_term_of_twice_the_rank(
    saved: dict[str, Path], tmp_path: Path, profile: str
) -> None:
    config = export_peft(saved["TP2"] / "start", tmp_path / "peft", profile=profile)
    assert (config["r"], config["use_rslora"], config["init_lora_weights"]) == (4, False, True)
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / math.sqrt(2), rel=1e-15)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name, hf_name = "decoder.layers.1.mlp.linear_fc2.whole", "base_model.model.model.layers.1.mlp.down_proj"
    A, B, A0, B0 = (
        _whole("start", f"{name}.lora_{factor}", shape, torch.float32)
        for factor, shape in (
            ("A", (2, gpt.FFN)),
            ("B", (gpt.HIDDEN, 2)),
            ("A0", (2, gpt.FFN)),
            ("B0", (gpt.HIDDEN, 2)),
        )
    )
    assert torch.equal(tensors[f"{hf_name}.lora_A.weight"], torch.cat([A, A0]))
    assert torch.equal(tensors[f"{hf_name}.lora_B.weight"], torch.cat([B, -B0], dim=1))


def test_dora_is_refused_where_readers_would_ignore_it(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_magnitude_vector is DoRA's magnitude; the portable profile cannot"):
        export_peft(saved["TP2"] / "dora", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def _load_all(rank: int, sizes: ParallelSizes, folders: dict[str, list[Path]]) -> list[str]:
    """What differs after loading each checkpoint of each adapter."""
    chunks, wrong = _model(sizes), []
    for name, sources in folders.items():
        for source in sources:
            held = [f for adapter in linear_adapters(chunks, name) for f in (*adapter.factors(), *adapter.start())]
            for factor in held:
                factor.parameter.data.fill_(7)
            load_checkpoint(source, chunks, adapter_name=name)
            for factor in held:
                expected = gpt.piece(_whole(name, factor.name, factor.shape, factor.parameter.dtype), factor)
                if not torch.equal(factor.parameter, expected):
                    wrong.append(f"{factor.name} of {name} from {source}")
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_one_layout_saved_another_loads_bit_for_bit(saved: dict[str, Path], layout: str) -> None:
    size, sizes = LAYOUTS[layout]
    chosen = {name: saved if name == "everything" else ("TP1", "TP4", "TP2xPP2", "PP2xVPP2") for name in ADAPTERS}
    sources = {name: [latest_checkpoint(saved[source] / name) for source in chosen[name]] for name in ADAPTERS}
    wrong: list[Any] = run_ranks(size, _load_all, sizes, sources, sizes=sizes)
    assert wrong == [[]] * size


def test_names_of_checkpoints(saved: dict[str, Path]) -> None:
    folder = saved["TP1"] / "everything"
    assert [path.name for path in checkpoints(folder)] == ["iter_0000003"]
    assert {path.name for path in latest_checkpoint(folder).iterdir()} == {
        ".metadata", "__0_0.distcp", "adapter_config.json", "metadata.json", "mlora.json",
    }  # fmt: skip


def _load_with_alpha(rank: int, checkpoint: Path, sizes: ParallelSizes) -> str:
    """What is said where the last layer alone has another alpha; the adapter is as it was."""
    chunks: list[torch.nn.Module] = list(gpt.build(sizes, num_query_groups=2, params_dtype=torch.float32))
    mlora.apply(chunks, dataclasses.replace(ADAPTERS["everything"], alpha_pattern={"layers.3.mlp.down_proj": 20}))
    before = [factor.parameter.clone() for factor in factors(chunks)]
    with pytest.raises(ValueError) as raised:
        load_checkpoint(checkpoint, chunks)
    assert all(torch.equal(old, new.parameter) for old, new in zip(before, factors(chunks), strict=True))
    return str(raised.value)


def test_parameters_that_would_mean_another_function_are_refused_on_every_stage(saved: dict[str, Path]) -> None:
    checkpoint, sizes = latest_checkpoint(saved["TP1"] / "everything"), LAYOUTS["PP2"][1]
    expected = (
        f"{checkpoint} holds an adapter with a scaling of 2.0 at decoder.layers.3.mlp.linear_fc2.whole; the attached"
    )
    for message in run_ranks(2, _load_with_alpha, checkpoint, sizes, sizes=sizes):
        assert message.startswith(expected) and "one has 4.0: attach it with the same lora_alpha" in message


def _load_with_dtype(rank: int, checkpoint: Path, dtype: torch.dtype) -> tuple[list[str], bool]:
    """(what is logged, whether the values are the checkpoint's, rounded) for an adapter of another dtype."""
    chunks: list[torch.nn.Module] = list(
        gpt.build(ParallelSizes(), num_query_groups=2, params_dtype=torch.float32, pipeline_dtype=torch.float32)
    )
    mlora.apply(chunks, dataclasses.replace(ADAPTERS["shared"], adapter_dtype=dtype))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mlora.checkpoint").addHandler(handler)
    load_checkpoint(checkpoint, chunks)
    return said, all(
        torch.equal(factor.parameter, _whole("shared", factor.name, factor.shape, torch.bfloat16).to(dtype))
        for factor in factors(chunks)
    )


def test_loading_into_another_dtype_is_told(saved: dict[str, Path]) -> None:
    checkpoint = latest_checkpoint(saved["TP2"] / "shared")
    told = f"{checkpoint} holds the adapter in torch.bfloat16; it is loaded into torch.float32"
    for dtype, expected in [(torch.bfloat16, []), (torch.float32, [told])]:
        assert run_ranks(1, _load_with_dtype, checkpoint, dtype, sizes=ParallelSizes()) == [(expected, True)]
