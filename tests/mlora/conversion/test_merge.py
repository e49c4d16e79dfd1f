"""Merging: PEFT's own numbers, one rounding, the base's files around them, and nothing left behind when it fails."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlora.conversion import delta, open_adapter, shards
from mlora.conversion import merge as merging
from mlora.conversion.merge import MergeReport, merge
from mlora.conversion.safetensors_file import SafetensorsFile
from tests.mlora.conversion.adapters import PREFIX, tensors_of, weights, write_adapter, write_base, write_peft
from tests.tiny import hf_logits, tokens, write_model

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama", attention_bias=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, and copies of a few bytes, so that tiny tensors need several."""
    monkeypatch.setattr(shards, "BLOCK", 100)
    monkeypatch.setattr(shards, "COPIED", 1000)
    monkeypatch.setattr(shards, "PIECE", 70)


def do(base: Path, adapter: Path, output: Path, **options: Any) -> MergeReport:
    return merge(base, [(open_adapter(adapter), 1.0)], output, **{"verified": True, **options})


CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"mlp.up_proj": 1}},
    "dora": {"target_modules": ALL, "use_dora": True, "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "dora-embeddings": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    "biases": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "layers": {"target_modules": ["o_proj"], "layers_to_transform": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_blocks")
def test_float32_gives_pefts_merge_to_1e_6(base: Path, tmp_path: Path, name: str) -> None:
    model = write_peft(tmp_path / "a", base, **CONFIGS[name])
    report = do(base, tmp_path / "a", tmp_path / "out")
    theirs = model.merge_and_unload().state_dict()
    ours = weights(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 1e-6 * max(1.0, float(value.abs().max())), key
    before = weights(base)
    changed = {key for key, value in ours.items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[0] for key in changed} == set(report.changed)
    assert report.unchanged == () and not report.unties
    assert report.verification is not None and report.verification.parameters == len(ours)


FACTORS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=15, deadline=None)
@given(
    r=st.integers(1, 9), alpha=st.floats(0.5, 32), rslora=st.booleans(), dora=st.booleans(), factors=FACTORS,
    targets=st.sets(st.sampled_from(ALL), min_size=1), block=st.integers(1, 2000), dtype=st.sampled_from([None, torch.float32]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_adapter_is_merged_with_one_rounding(
    tmp_path_factory: pytest.TempPathFactory, r: int, alpha: float, rslora: bool, dora: bool, factors: torch.dtype, seed: int,
    targets: set[str], block: int, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """bfloat16: the bits of the float32 result, rounded once. float32: the float32 result."""
    folder = tmp_path_factory.mktemp("any")
    before = _random_base(folder / "base", seed)
    tensors = {}
    for name, weight in before.items():
        if (module := name.removesuffix(".weight")).rpartition(".")[2] in targets:
            tensors |= tensors_of((module, r, *weight.shape), seed=seed)
            if dora:
                tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = weight.float().norm(dim=1) * 1.25
    tensors = {key: value.to(factors) for key, value in tensors.items()}
    write_adapter(
        folder / "a", tensors, r=r, lora_alpha=alpha, use_rslora=rslora, use_dora=dora, target_modules=sorted(targets)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", block)
        do(folder / "base", folder / "a", folder / "out", dtype=dtype)
    scaling = alpha / r**0.5 if rslora else alpha / r
    after = weights(folder / "out")
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        exact = weight.float()
        if f"{PREFIX}{module}.lora_A.weight" in tensors:
            A, B = (tensors[f"{PREFIX}{module}.lora_{factor}.weight"].float() for factor in "AB")
            exact = exact + (B * scaling) @ A
            if dora:
                exact = (
                    exact * (tensors[f"{PREFIX}{module}.lora_magnitude_vector"].float() / exact.norm(dim=1))[:, None]
                )
        assert after[name].dtype == (dtype or torch.bfloat16)
        if dtype is torch.float32:
            torch.testing.assert_close(after[name], exact, rtol=2e-6, atol=2e-6)
        else:
            # The two float32 results may differ in the last bit, and with it, rarely, where a value rounds to.
            slack = exact.abs() * 1e-6 + 1e-7
            assert bool(((exact - slack).bfloat16() <= after[name]).all()), name
            assert bool((after[name] <= (exact + slack).bfloat16()).all()), name


def _random_base(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Two layers of seven linears in bfloat16, two shards."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "q_proj": (8, 6),
        "k_proj": (4, 6),
        "v_proj": (4, 6),
        "o_proj": (6, 8),
        "gate_proj": (10, 6),
        "up_proj": (10, 6),
    }
    shapes["down_proj"] = (6, 10)
    whole: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for layer in range(2):
        tensors = {
            f"model.layers.{layer}.x.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / f"model-{layer}.safetensors")
        where |= {key: f"model-{layer}.safetensors" for key in tensors}
        whole |= tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return whole


def test_bfloat16_is_rounded_once_from_float32(tmp_path: Path) -> None:
    """Bit for bit, and not what rounding the delta first would give."""
    write_base(tmp_path / "base", dtype=torch.bfloat16)
    before = weights(tmp_path / "base")
    shape = before[f"{Q0}.weight"].shape
    tensors = {key: value.bfloat16() for key, value in tensors_of((Q0, 4, *shape)).items()}
    write_adapter(tmp_path / "a", tensors, r=4, lora_alpha=2, target_modules=[Q0])
    do(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    A, B = (tensors[f"{PREFIX}{Q0}.lora_{factor}.weight"].float() for factor in "AB")
    update = 0.5 * (B @ A)
    after, weight = weights(tmp_path / "out"), before[f"{Q0}.weight"]
    assert torch.equal(after[f"{Q0}.weight"], (weight.float() + update).bfloat16())
    assert not torch.equal(after[f"{Q0}.weight"], weight + update.bfloat16())


def test_float64_bases_are_merged_in_float64(tmp_path: Path) -> None:
    write_base(tmp_path / "base", dtype=torch.float64)
    before = weights(tmp_path / "base")[f"{Q0}.weight"]
    tensors = tensors_of((Q0, 4, *before.shape))
    write_adapter(tmp_path / "a", tensors, r=4, lora_alpha=3, target_modules=[Q0])
    do(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    A, B = (tensors[f"{PREFIX}{Q0}.lora_{factor}.weight"].double() for factor in "AB")
    assert (weights(tmp_path / "out")[f"{Q0}.weight"] - (before + 0.75 * B @ A)).abs().max() < 1e-14


def test_weighted_adapters_are_added_up_exactly(base: Path, tmp_path: Path) -> None:
    """Different ranks, scalings and modules; a weight below zero subtracts."""
    one = write_peft(tmp_path / "one", base, target_modules=["q_proj", "embed_tokens"], r=3, seed=1)
    write_peft(tmp_path / "two", base, target_modules=["q_proj", "up_proj"], r=5, use_rslora=True, seed=2)
    one.load_adapter(str(tmp_path / "two"), "two")
    adapters = [(open_adapter(tmp_path / "one"), 0.75), (open_adapter(tmp_path / "two"), -1.5)]
    merge(base, adapters, tmp_path / "out", verified=True)
    before, after = weights(base), weights(tmp_path / "out")
    for name, module in one.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        update = sum(
            weight * module.get_delta_weight(adapter)
            for adapter, weight in (("default", 0.75), ("two", -1.5))
            if adapter in module.scaling and adapter in {**module.lora_A, **module.lora_embedding_A}
        )
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + update, rtol=0, atol=3e-6)
    assert {key for key in before if torch.equal(before[key], after[key])} == {
        key for key in before if not any(part in key for part in ("q_proj.weight", "up_proj.weight", "embed_tokens"))
    }


FAMILIES: dict[str, Any] = {
    "llama": "all-linear",
    "qwen2": "all-linear",
    "qwen3": "all-linear",
    "mistral": "all-linear",
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"],  # fused modules of Hugging Face's own
    "gemma2": "all-linear",
    "gemma3": ["q_proj", "down_proj", "embed_tokens"],  # its embedding is scaled, its output layer tied
    "olmo2": "all-linear",
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_merged_model_answers_as_pefts(tmp_path: Path, kind: str) -> None:
    base = write_model(tmp_path / "base", kind)
    model = write_peft(tmp_path / "a", base, target_modules=FAMILIES[kind])
    do(base, tmp_path / "a", tmp_path / "out")
    ids = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
    assert (hf_logits(tmp_path / "out", ids) - wanted).abs().max() < 5e-5 * wanted.abs().max()


# PEFT writes merged deltas into the one tensor that both embeddings share; what it computes unmerged is what was trained.
TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "linears": ({"target_modules": ["q_proj"]}, False),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "output": ({"target_modules": ["lm_head"]}, True),
    "dora-embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, True),
    "saved-output": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "saved-embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "trained-as-one": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "saved-as-one": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(tmp_path: Path, name: str, shard_size: str) -> None:
    config, unties = TIED[name]
    base = write_model(tmp_path / "base", "llama-tied", num_hidden_layers=1, shard_size=shard_size)
    model = write_peft(tmp_path / "a", base, **config)
    report = do(base, tmp_path / "a", tmp_path / "out")
    assert report.unties == unties
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (not unties)
    assert ("lm_head.weight" in weights(tmp_path / "out")) == unties
    ids = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
    assert (hf_logits(tmp_path / "out", ids) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    if shard_size != "1GB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        stored = weights(tmp_path / "out")
        assert index["weight_map"].keys() == stored.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
        for key, file in index["weight_map"].items():
            assert key in load_file(tmp_path / "out" / file)


def test_a_tied_base_that_stores_the_output_layer_too(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama-tied", num_hidden_layers=1, shard_size="1GB")
    tensors = load_file(base / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    write_peft(tmp_path / "one", base, target_modules=["embed_tokens"], ensure_weight_tying=True)
    do(base, tmp_path / "one", tmp_path / "out")
    after = weights(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_embeddings_that_were_trained_as_one_must_be_one(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama-tied", num_hidden_layers=1)
    write_peft(tmp_path / "a", base, target_modules=["embed_tokens"], ensure_weight_tying=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}lm_head.lora_A.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"says ensure_weight_tying, but its lm_head\.weight differs"):
        do(base, tmp_path / "a", tmp_path / "out")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    write_peft(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])
    return tmp_path / "adapter"


def test_shards_index_and_files_beside_are_the_bases(base: Path, adapter: Path, tmp_path: Path) -> None:
    dressed = tmp_path / "dressed"
    shutil.copytree(base, dressed)
    kept = {
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "modeling_mine.py",
        "generation_config.json",
    }
    dropped = {
        "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "model.gguf", ".gitattributes", "x.tmp",
        "pytorch_model.bin.index.json", "consolidated.safetensors", "optimizer.pt", "mlora.json",
    }  # fmt: skip
    for name in kept | dropped:
        (dressed / name).write_text(f"content of {name}")
    (dressed / "additional_chat_templates").mkdir()
    (dressed / "additional_chat_templates" / "tools.jinja").write_text("x")
    (dressed / ".cache").mkdir()
    do(dressed, adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    own = {path.name for path in base.iterdir()}
    assert len(own) > 4 and names == own | kept | {"additional_chat_templates"}
    for name in own | kept:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (dressed / name).read_bytes()
            continue
        ours, theirs = SafetensorsFile(tmp_path / "out" / name), SafetensorsFile(dressed / name)
        assert ours.header == theirs.header
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "x"
    assert (tmp_path / "out").stat().st_mode & 0o777 == base.stat().st_mode & 0o777


def test_another_dtype_for_the_whole_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    do(base, adapter, tmp_path / "exact")
    do(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    exact, rounded = weights(tmp_path / "exact"), weights(tmp_path / "out")
    assert all(torch.equal(rounded[key], value.bfloat16()) for key, value in exact.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (
        json.loads((path / "model.safetensors.index.json").read_text()) for path in (base, tmp_path / "out")
    )
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] // 2
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def _zero(adapter: Path, name: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if key.endswith("lora_B.weight") and name in key:
            tensors[key].zero_()
    save_file(tensors, file)


def test_a_result_that_equals_the_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    _zero(adapter, "q_proj")
    report = do(base, adapter, tmp_path / "out")
    assert all("q_proj" in name for name in report.unchanged) and len(report.unchanged) == 2
    _zero(adapter, "")
    with pytest.raises(ValueError, match="the result equals the base"):
        do(base, adapter, tmp_path / "zero")
    assert not (tmp_path / "zero").exists()


def test_a_delta_that_rounding_takes_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", dtype=torch.bfloat16)
    shape = weights(tmp_path / "base")[f"{Q0}.weight"].shape
    tensors = tensors_of((Q0, 2, *shape), (Q0.replace("q_proj", "o_proj"), 2, *reversed(shape)))
    tensors[f"{PREFIX}{Q0}.lora_B.weight"] *= 1e-12
    write_adapter(tmp_path / "a", tensors, target_modules=["layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"])
    with pytest.raises(ValueError, match=f"{Q0}.weight: its delta is lost in rounding to bfloat16 everywhere"):
        do(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    # One element that keeps some of it is enough.
    tensors[f"{PREFIX}{Q0}.lora_B.weight"][0] = 1
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    assert Q0 in do(tmp_path / "base", tmp_path / "a", tmp_path / "out").changed


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda base: _edit(base / "config.json", **changes)


def _change_map(base: Path, key: str, name: Any) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    _edit(base / "model.safetensors.index.json", weight_map={**index["weight_map"], key: name})


def _first_shard(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (_config(quantization_config={"quant_method": "awq"}), "the base is quantised (awq)"),
        (_config(model_type="gpt2"), "gpt2 stores its linears transposed"),
        (lambda base: (base / "config.json").unlink(), "it has no config.json"),
        (lambda base: (base / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda base: (base / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (lambda base: _change_map(base, f"{Q0}.weight", "../x.safetensors"), "which is no shard beside the index"),
        (lambda base: _change_map(base, f"{Q0}.weight", "/etc/passwd"), "'/etc/passwd', which is no shard beside the index"),
        (lambda base: _change_map(base, f"{Q0}.weight", 3), "which is no shard beside the index"),
        (lambda base: _change_map(base, "more.weight", "model-9.safetensors"), "model-9.safetensors is missing"),
        (lambda base: _change_map(base, "more.weight", _first_shard(base).name), "which does not hold it"),
        (lambda base: _edit(base / "model.safetensors.index.json", weight_map={}), "has no weight_map"),
        (lambda base: _first_shard(base).unlink(), "is missing, and model.safetensors.index.json names it"),
        (lambda base: _first_shard(base).write_bytes(_first_shard(base).read_bytes()[:-5]), "is truncated"),
    ],
)  # fmt: skip
def test_a_damaged_or_unsuitable_base_is_named(
    base: Path, adapter: Path, tmp_path: Path, damage: Callable[[Path], None], rule: str
) -> None:
    shutil.copytree(base, tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        do(tmp_path / "bad", adapter, tmp_path / "out")
    assert str(tmp_path / "bad") in str(error.value) and rule in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tensor_twice_or_outside_of_the_index_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bad")
    first, *_, last = sorted((tmp_path / "bad").glob("*.safetensors"))
    tensors = load_file(first)
    save_file(tensors | {"stray.weight": torch.ones(2)}, first)
    with pytest.raises(ValueError, match=r"holds stray\.weight, which model\.safetensors\.index\.json does not name"):
        do(tmp_path / "bad", adapter, tmp_path / "out")
    save_file(tensors | {next(iter(load_file(last))): torch.ones(2)}, first)
    with pytest.raises(ValueError, match=f"is in {first.name} and in {last.name}"):
        do(tmp_path / "bad", adapter, tmp_path / "out")


def test_a_quantised_tensor_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bad")
    file = (
        tmp_path
        / "bad"
        / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][f"{DOWN1}.weight"]
    )
    tensors = load_file(file)
    save_file(tensors | {f"{DOWN1}.weight": tensors[f"{DOWN1}.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match=f"{DOWN1}.weight is F8_E4M3: the base is quantised"):
        do(tmp_path / "bad", adapter, tmp_path / "out")


def test_another_base_is_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    wide = write_base(tmp_path / "wide", intermediate_size=64)
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.mlp\.down_proj\.weight of shape \[32, 48\], and that of .*wide has \[32, 64\]",
    ):
        do(wide, adapter, tmp_path / "out")
    short = write_model(tmp_path / "short", "llama", num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"adapts model\.layers\.1\..*, which .*short has not; the nearest is model\.layers\.0"
    ):
        do(short, adapter, tmp_path / "out")
    deep = write_model(tmp_path / "deep", "llama", num_hidden_layers=3, attention_bias=True)
    with pytest.raises(
        ValueError, match=r"targets model\.layers\.2\.\w+\.\w+_proj, but the file has no tensors for it"
    ):
        do(deep, adapter, tmp_path / "out")
    write_peft(tmp_path / "bias", base, target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(ValueError, match=r"adapts model\.layers\.0\.self_attn\.q_proj\.bias, which .*plain has not"):
        do(write_base(tmp_path / "plain"), tmp_path / "bias", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"modules_to_save": ["model.norm"]}, r"brings model\.norm\.weight as a whole"),
    ],
)
def test_what_cannot_be_added_up_is_named(base: Path, tmp_path: Path, adapter: Path, config: Any, rule: str) -> None:
    write_peft(tmp_path / "a", base, target_modules=["q_proj"], **config)
    one, plain = open_adapter(tmp_path / "a"), open_adapter(adapter)
    for adapters in ([(one, 0.5)], [(one, 1.0), (plain, 1.0)], [(plain, 1.0), (one, 1.0)]):
        with pytest.raises(ValueError, match=rule):
            merge(base, adapters, tmp_path / "out")
    with pytest.raises(ValueError, match="weight 0"):
        merge(base, [(plain, 0.0)], tmp_path / "out")


def test_values_that_overflow_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}{DOWN1}.lora_B.weight"][0, 0] = 1e6
    save_file(tensors, file)
    words = rf"safetensors: {DOWN1}\.weight would have values that are not finite in float16"
    with pytest.raises(ValueError, match=words):
        do(base, adapter, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapted", [True, False])
def test_values_of_the_base_that_are_not_finite_are_named(
    base: Path, adapter: Path, tmp_path: Path, adapted: bool
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    key = f"{DOWN1}.weight" if adapted else "model.norm.weight"
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        if key in tensors:
            tensors[key].view(-1)[-1] = torch.inf
            save_file(tensors, file)
            broken = file
    dtype = None if adapted else torch.bfloat16  # What is only copied is not looked at.
    with pytest.raises(ValueError, match=rf"{broken}: {key} has values that are not finite"):
        do(copy, adapter, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_verification_notices_a_wrong_result(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beside = merging.write_beside

    def flip(parameter: str) -> None:
        def spoil(*arguments: Any) -> None:
            target: Path = arguments[-1]
            for path in target.glob("*.safetensors"):
                file = SafetensorsFile(path)
                if parameter in file.entries:
                    with path.open("rb+") as opened:
                        opened.seek(file.entries[parameter].begin + 5)
                        byte = opened.read(1)[0]
                        opened.seek(-1, 1)
                        opened.write(bytes([byte ^ 4]))
            write_beside(*arguments)

        monkeypatch.setattr(merging, "write_beside", spoil)

    for parameter, rule in (
        (f"{Q0}.weight", f"{Q0}.weight is .* where W \\+ delta is"),
        (f"{Q0}.bias", f"{Q0}.bias is not the base's, and no adapter changes it"),
    ):
        flip(parameter)
        with pytest.raises(ValueError, match=rule):
            do(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        do(base, adapter, tmp_path / "unseen", verified=False, replace=True)


def test_verification_notices_a_unit_in_the_last_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a second rounding would leave: here, in every element of a matrix."""
    write_base(tmp_path / "base", dtype=torch.bfloat16)
    write_peft(tmp_path / "a", tmp_path / "base", target_modules=["q_proj"])
    write_beside = merging.write_beside

    def spoil(*arguments: Any) -> None:
        for path in arguments[-1].glob("*.safetensors"):
            tensors = load_file(path)
            if f"{Q0}.weight" in tensors:
                tensors[f"{Q0}.weight"] = (tensors[f"{Q0}.weight"].view(torch.int16) + 1).view(torch.bfloat16)
                save_file(tensors, path)
        write_beside(*arguments)

    monkeypatch.setattr(merging, "write_beside", spoil)
    with pytest.raises(ValueError, match="where W \\+ delta is"):
        do(tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_verification_notices_a_delta_of_the_wrong_scale(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(self: delta.Delta, rows: torch.Tensor, first: int) -> torch.Tensor:
        return rows.addmm_(
            self.left[first : first + rows.shape[0]], self.right, alpha=1 + 1e-4 * (rows.dtype == torch.float32)
        )

    monkeypatch.setattr(delta.Delta, "add_to", twice)
    with pytest.raises(ValueError, match="where W \\+ delta is"):
        do(base, adapter, tmp_path / "out")


def _fail_after(count: int, error: BaseException) -> Callable[..., bool]:
    calls: Iterator[int] = iter(range(10**9))

    def is_finite(tensor: torch.Tensor) -> bool:
        if next(calls) >= count:
            raise error
        return True

    return is_finite


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SystemExit(1)])
@pytest.mark.parametrize("replace", [False, True])
def test_an_interrupted_merge_leaves_what_was_there(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, replace: bool
) -> None:
    if replace:
        shutil.copytree(base, tmp_path / "out")
    monkeypatch.setattr(shards, "is_finite", _fail_after(3, error))
    with pytest.raises(type(error)):
        do(base, adapter, tmp_path / "out", replace=replace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", *(["out"] if replace else [])]
    if replace:
        before = weights(base)
        assert all(torch.equal(value, before[key]) for key, value in weights(tmp_path / "out").items())


def test_progress_counts_every_byte_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    size = sum(value.nbytes for value in weights(base).values())
    seen: list[int] = []
    do(base, adapter, tmp_path / "one", verified=False, progress=seen.append)
    assert sum(seen) == size
    seen.clear()
    do(base, adapter, tmp_path / "two", progress=seen.append)
    assert sum(seen) == 2 * size
