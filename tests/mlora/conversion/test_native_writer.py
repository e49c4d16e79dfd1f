"""Native checkpoints written in one process: of any adapter, for any layout, whole or not at all."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mlora
from mlora import LoraConfig
from mlora.checkpoint import load_checkpoint, save_checkpoint
from mlora.conversion import native_writer, open_adapter
from mlora.conversion.difference import compare
from mlora.conversion.importing import Import, plan_import
from mlora.conversion.native_writer import IMPORTED_FILE, read_original, write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.description import INFO_FILE, read_info
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from tests.mlora.conversion.adapters import PREFIX, peft_model, tensors_of, write_adapter
from tests.ranks import run_ranks
from tests.tiny import GROUPS, HEADS, HIDDEN, LAYERS, write_model

FFN, WIDTH = 48, HIDDEN // HEADS
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (GROUPS * WIDTH, HIDDEN),
    "self_attn.v_proj": (GROUPS * WIDTH, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
SHAPES = {f"model.layers.{layer}.{leaf}": shape for layer in range(LAYERS) for leaf, shape in LINEARS.items()}
Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
# (world, how it is divided)
LAYOUTS = [
    (1, ParallelSizes()),
    (2, ParallelSizes(tensor=2)),
    (4, ParallelSizes(tensor=4)),
    (2, ParallelSizes(pipeline=2, virtual_pipeline=2)),
    (4, ParallelSizes(pipeline=4)),
    (4, ParallelSizes(tensor=2, pipeline=2)),
    (2, ParallelSizes()),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Pretrained:
    """The base without its weights."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return Pretrained.open(folder)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """What :func:`write` makes a PEFT directory of."""
    names = draw(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=12))
    return {
        "ranks": {name: draw(st.integers(1, 9)) for name in sorted(names)},
        "alphas": {name: draw(st.sampled_from([1, 2.5, 16])) for name in sorted(names)},
        "use_rslora": draw(st.booleans()),
        "dtypes": draw(st.sampled_from([[torch.float32], [torch.bfloat16], [torch.float16], [torch.float32, torch.bfloat16]])),
        "pickled": draw(st.booleans()),
        "infix": draw(st.sampled_from(["", ".default"])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def write(folder: Path, drawn: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write the adapter; its tensors."""
    ranks, dtypes = drawn["ranks"], drawn["dtypes"]
    plain = tensors_of(*((name, rank, *SHAPES[name]) for name, rank in ranks.items()), seed=drawn["seed"])
    tensors = {
        key.replace(".weight", f"{drawn['infix']}.weight"): tensor.to(dtypes[number % len(dtypes)])
        for number, (key, tensor) in enumerate(plain.items())
    }
    write_adapter(
        folder,
        tensors,
        pickled=drawn["pickled"],
        target_modules=sorted(ranks),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): alpha for name, alpha in drawn["alphas"].items()},
        use_rslora=drawn["use_rslora"],
    )
    return tensors


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == value.dtype and torch.equal(ours[key], value) for key, value in theirs.items()
    )


@settings(max_examples=20, deadline=None)
@given(drawn=adapters())
def test_any_adapter_comes_back(
    tmp_path_factory: pytest.TempPathFactory, bare: Pretrained, drawn: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = write(folder / "peft", drawn)
    write_import(plan_import(open_adapter(folder / "peft"), bare), folder / "native")
    write_peft(peft_adapter(open_adapter(folder / "native"), "peft"), folder / "back")
    assert _same(load_file(folder / "back" / "adapter_model.safetensors"), tensors)
    for profile in ("portable", "sglang"):
        write_peft(peft_adapter(open_adapter(folder / "native"), profile, base=bare), folder / profile)
        found = compare(open_adapter(folder / "peft"), open_adapter(folder / profile))
        assert max(difference.relative for difference in found) < 2e-7


def _save_again(rank: int, base: Path, native: Path, saved: Path, sizes: ParallelSizes) -> None:
    pretrained = Pretrained.open(base)
    config = LoraConfig.from_json(native / "adapter_config.json")
    chunks = mlora.apply(build_model(pretrained, sizes), config, family=pretrained.family)
    load_checkpoint(native, chunks)
    save_checkpoint(saved, chunks)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=adapters(), layout=st.sampled_from(LAYOUTS))
def test_any_layout_loads_it_and_saves_it(
    tmp_path_factory: pytest.TempPathFactory, base: Path, drawn: dict[str, Any], layout: tuple[int, ParallelSizes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = write(folder / "peft", drawn | {"infix": ""})
    write_import(plan_import(open_adapter(folder / "peft"), Pretrained.open(base)), folder / "native")
    run_ranks(layout[0], _save_again, base, folder / "native", folder / "saved", layout[1], sizes=layout[1])
    write_peft(peft_adapter(open_adapter(folder / "saved"), "peft"), folder / "back")
    back = load_file(folder / "back" / "adapter_model.safetensors")
    # The model has one dtype for all of an adapter: one that holds every tensor.
    assert len({tensor.dtype for tensor in back.values()}) == 1
    assert _same({key: tensor.to(tensors[key].dtype) for key, tensor in back.items()}, tensors)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16], torch.bfloat16),
        ([torch.float16], torch.float32),
        ([torch.float64, torch.float32], torch.float64),
        ([torch.float16, torch.bfloat16], torch.float32),
    ],
)
def test_it_is_trained_in_a_dtype_that_holds_it(
    tmp_path: Path, bare: Pretrained, dtypes: list[torch.dtype], wanted: torch.dtype
) -> None:
    drawn = {
        "ranks": {Q0: 2},
        "alphas": {},
        "use_rslora": False,
        "dtypes": dtypes,
        "pickled": False,
        "infix": "",
        "seed": 0,
    }
    write(tmp_path / "peft", drawn)
    assert plan_import(open_adapter(tmp_path / "peft"), bare).config.adapter_dtype == wanted


def _plan(folder: Path, bare: Pretrained, ranks: dict[str, int] | None = None, **config: Any) -> Import:
    modules = [(name, rank, *SHAPES[name]) for name, rank in (ranks or {Q0: 2, V0: 2}).items()]
    fields = {"target_modules": sorted(name for name, *_ in modules), **config}
    write_adapter(folder, tensors_of(*modules), **fields)
    return plan_import(open_adapter(folder), bare)


def test_what_lies_beside_the_matrices(tmp_path: Path, bare: Pretrained) -> None:
    plan = _plan(tmp_path / "peft", bare, lora_dropout=0.25, use_rslora=True, task_type="CAUSAL_LM")
    write_import(plan, tmp_path / "native")
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "metadata.json", "adapter_config.json", INFO_FILE, IMPORTED_FILE}
    config = LoraConfig.from_json(tmp_path / "native" / "adapter_config.json")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (2, 4, 0.25, True)
    info = read_info(tmp_path / "native")
    assert (info["iteration"], info["layers"], info["training"]) == (0, LAYERS, False)
    assert info["base"] == {"path": str(bare.path), "model_type": "llama"}
    original = read_original(tmp_path / "native")
    assert original is not None and original.config["task_type"] == "CAUSAL_LM"
    assert original.keys[Q0] == [f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"]


def test_keys_that_only_a_wrapped_model_would_load(tmp_path: Path, bare: Pretrained) -> None:
    """They are read, and exported so that PEFT finds them."""
    plain = tensors_of((Q0, 2, *SHAPES[Q0]))
    wrapped = {key.replace("model.layers", "model._orig_mod.layers"): tensor for key, tensor in plain.items()}
    write_adapter(tmp_path / "peft", wrapped, target_modules=[Q0])
    write_import(plan_import(open_adapter(tmp_path / "peft"), bare), tmp_path / "native")
    write_peft(peft_adapter(open_adapter(tmp_path / "native"), "peft"), tmp_path / "back")
    assert _same(load_file(tmp_path / "back" / "adapter_model.safetensors"), plain)


def test_damage_beside_the_matrices_is_named(tmp_path: Path, bare: Pretrained) -> None:
    write_import(_plan(tmp_path / "peft", bare), tmp_path / "native")
    path = tmp_path / "native" / IMPORTED_FILE
    content = json.loads(path.read_text())
    for change, words in (
        ({"keys": {Q0: content["keys"][Q0]}}, f"{IMPORTED_FILE} has no keys for {V0}"),
        ({"keys": []}, "lacks the configuration or the keys"),
        ({"config": None}, "lacks the configuration or the keys"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=re.escape(words)):
            peft_adapter(open_adapter(tmp_path / "native"), "peft")


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]
A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
BAD: dict[str, tuple[Change, str]] = {
    "other base": (
        lambda t, c: t.update({B: torch.ones(HIDDEN + 8, 2)}),
        rf"{Q0} of shape \[40, 32\], and that of .* has \[32, 32\]",
    ),
    "no such layer": (
        lambda t, c: (
            t.update(tensors_of((Q0.replace("0", "9"), 2, 32, 32))),
            c.update(target_modules=["q_proj", "v_proj"]),
        ),
        r"layers\.9\.self_attn\.q_proj: .* has no such module",
    ),
    "a hole": (
        lambda t, c: c.update(target_modules=["q_proj", V0]),
        r"targets model\.layers\.1\.self_attn\.q_proj, but the file has no",
    ),
    "no lm_head": (lambda t, c: c.update(target_modules=[Q0, V0, "lm_head"]), "targets lm_head, but the file has no"),
    "other vocabulary": (
        lambda t, c: (t.update(tensors_of(("lm_head", 2, 100, 32))), c.update(target_modules=[Q0, V0, "lm_head"])),
        r"lm_head of shape \[100, 32\], and that of .* has \[101, 32\]",
    ),
    "embedding as a linear": (
        lambda t, c: (
            t.update(tensors_of(("model.embed_tokens", 2, 101, 32))),
            c.update(target_modules=[Q0, V0, "embed_tokens"]),
        ),
        r"model\.embed_tokens is an embedding in",
    ),
    "not every norm": (
        lambda t, c: (t.update({f"{PREFIX}model.norm.weight": torch.ones(32)}), c.update(modules_to_save=["norm"])),
        r"modules_to_save names model\.layers\.0\.input_layernorm\.weight, but the file has no tensor of it",
    ),
    "whole linear": (
        lambda t, c: (
            t.update({f"{PREFIX}model.layers.0.mlp.down_proj.weight": torch.ones(32, 48)}),
            c.update(modules_to_save=["layers.0.mlp.down_proj"]),
        ),
        r"down_proj\.weight is a whole linear",
    ),
    "norm of another size": (
        lambda t, c: (
            t.update({f"{PREFIX}model.norm.weight": torch.ones(9)}),
            c.update(modules_to_save=["model.norm"]),
        ),
        r"model\.norm\.weight has shape \[9\]",
    ),
    "wrong rank": (lambda t, c: c.update(r=3), r"of rank 2; adapter_config\.json says rank 3"),
    "negative alpha": (lambda t, c: c.update(lora_alpha=-4), r"adapter_config\.json: lora_alpha is -4"),
    "unknown key": (
        lambda t, c: t.update({"other.lora_A.weight": torch.ones(2, 32)}),
        r"other\.lora_A\.weight does not begin with",
    ),
    "another method": (lambda t, c: c.update(peft_type="LOHA"), "only LORA adapters"),
    "mutating initialisation": (lambda t, c: c.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_named(tmp_path: Path, bare: Pretrained, name: str) -> None:
    tensors = tensors_of((Q0, 2, *SHAPES[Q0]), (V0, 2, *SHAPES[V0]))
    config: dict[str, Any] = {"target_modules": [Q0, V0]}
    BAD[name][0](tensors, config)
    write_adapter(tmp_path / "peft", tensors, **config)
    with pytest.raises(ValueError, match=BAD[name][1]) as caught:
        plan_import(open_adapter(tmp_path / "peft"), bare)
    assert str(tmp_path / "peft") in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_ends_that_train_as_one_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    tied = write_model(tmp_path / "tied", "llama-tied")
    peft_model(tied, ensure_weight_tying=True, **changes).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match=r"peft/adapter_config\.json: ensure_weight_tying: .* are not supported"):
        plan_import(open_adapter(tmp_path / "peft"), Pretrained.open(tied))


def test_a_native_checkpoint_is_no_peft_directory(tmp_path: Path, bare: Pretrained) -> None:
    write_import(_plan(tmp_path / "peft", bare), tmp_path / "native")
    with pytest.raises(ValueError, match="native is no PEFT directory, but a native checkpoint of iteration 0"):
        plan_import(open_adapter(tmp_path / "native"), bare)


def test_weights_of_the_base_are_looked_at_where_they_are(tmp_path: Path, base: Path) -> None:
    """Only their headers; a base whose weights are not what its configuration says is no base."""
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"extra": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match="extra"):
        _plan(tmp_path / "peft", Pretrained.open(tmp_path))


def test_nothing_half_written_appears(tmp_path: Path, bare: Pretrained) -> None:
    plan = _plan(tmp_path / "peft", bare)
    failures: list[tuple[Any, str, BaseException]] = [
        (native_writer, "write_stream", KeyboardInterrupt()),
        (native_writer, "_check_written", ValueError("x")),
        (os, "fsync", OSError("x")),
        (os, "rename", KeyboardInterrupt()),
    ]
    for owner, name, error in failures:
        with patch.object(owner, name, side_effect=error), pytest.raises(type(error)):
            write_import(plan, tmp_path / "native")
        assert [path.name for path in tmp_path.iterdir()] == ["peft"]
    write_import(plan, tmp_path / "native")
    with pytest.raises(FileExistsError, match="exists already"):
        write_import(plan, tmp_path / "native")
    write_import(plan, tmp_path / "native", replace=True)
    with pytest.raises(FileExistsError, match=f"holds no {INFO_FILE}"):
        write_import(plan, _other(tmp_path), replace=True)
    with pytest.raises(ValueError, match="in each other's way"):
        write_import(plan, tmp_path / "peft" / "inside")


def _other(tmp_path: Path) -> Path:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    return tmp_path / "other"


def test_values_that_are_not_finite(tmp_path: Path, bare: Pretrained) -> None:
    tensors = tensors_of((Q0, 2, *SHAPES[Q0]))
    tensors[B][3, 1] = float("nan")
    write_adapter(tmp_path / "peft", tensors, target_modules=[Q0])
    with pytest.raises(ValueError, match=rf"{re.escape(B)} has values that are not finite"):
        write_import(plan_import(open_adapter(tmp_path / "peft"), bare), tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_torch_uses_one_thread(tmp_path: Path, bare: Pretrained) -> None:
    """More of them would wait for each other at the end of every copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads: list[int] = []

    def tell(size: int) -> None:
        threads.append(torch.get_num_threads())

    try:
        write_import(_plan(tmp_path / "peft", bare), tmp_path / "native", progress=tell)
        write_peft(peft_adapter(open_adapter(tmp_path / "native")), tmp_path / "exported", progress=tell)
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_progress_counts_every_byte(tmp_path: Path, bare: Pretrained) -> None:
    done: list[int] = []
    write_import(_plan(tmp_path / "peft", bare), tmp_path / "native", progress=done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in open_adapter(tmp_path / "peft").tensors)
