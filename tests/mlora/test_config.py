"""The configuration: every field checked, and PEFT's files and objects read as PEFT means them."""

import copy
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from mlora.config import LoraConfig

WRONG: list[tuple[str, Any, str]] = [
    ("r", 0, "r is 0; a LoRA rank is a whole number of at least 1"),
    ("r", -4, "r is -4"),
    ("r", 8.0, "r is 8.0"),
    ("r", True, "r is True"),
    ("r", "8", "r is '8'"),
    ("r", None, "r is None"),
    ("lora_alpha", 0, "lora_alpha is 0; it must be a positive number (with 0 the adapter would do nothing)"),
    ("lora_alpha", -1.0, "lora_alpha is -1.0"),
    ("lora_alpha", float("nan"), "lora_alpha is nan"),
    ("lora_alpha", float("inf"), "lora_alpha is inf"),
    ("lora_alpha", True, "lora_alpha is True"),
    ("lora_alpha", "16", "lora_alpha is '16'"),
    ("lora_dropout", 1, "lora_dropout is 1; it must be a number of at least 0 and below 1"),
    ("lora_dropout", -0.1, "lora_dropout is -0.1"),
    ("lora_dropout", float("nan"), "lora_dropout is nan"),
    ("lora_dropout", "0.1", "lora_dropout is '0.1'"),
    ("lora_dropout", None, "lora_dropout is None"),
    ("target_modules", [], "target_modules is empty; name modules in a list"),
    ("target_modules", "", "target_modules holds ''"),
    ("target_modules", None, "target_modules is "),
    ("target_modules", ["q_proj", 3], "target_modules holds 3; give names as strings"),
    ("target_modules", ["q_proj", ""], "target_modules holds ''"),
    ("target_modules", 3, "target_modules is 3; give a list of names, or a regular expression as a string"),
    ("target_modules", {"q_proj": 1}, "target_modules is {'q_proj': 1}; give a list"),
    ("target_modules", b"q_proj", "target_modules is b'q_proj'; give a list"),
    ("target_modules", "q_proj)", "target_modules: 'q_proj)' is no regular expression: unbalanced parenthesis"),
    ("exclude_modules", "*q", "exclude_modules: '*q' is no regular expression: nothing to repeat"),
    ("exclude_modules", [None], "exclude_modules holds None"),
    ("use_rslora", "false", "use_rslora is 'false'; it must be true or false"),
    ("use_rslora", 1, "use_rslora is 1"),
    ("use_dora", "yes", "use_dora is 'yes'; it must be true or false"),
    ("shared_A", None, "shared_A is None"),
    ("rank_pattern", ["q_proj"], "rank_pattern is ['q_proj']; give a mapping"),
    ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] is 0; a LoRA rank"),
    ("rank_pattern", {"q_proj": 4.0}, "rank_pattern['q_proj'] is 4.0"),
    ("rank_pattern", {"q_(": 4}, "rank_pattern: 'q_(' is no regular expression"),
    ("rank_pattern", {3: 4}, "rank_pattern: 3 is no regular expression"),
    ("alpha_pattern", {"q_proj": 0}, "alpha_pattern['q_proj'] is 0; it must be a positive number"),
    ("alpha_pattern", {"q_proj": "1"}, "alpha_pattern['q_proj'] is '1'"),
    ("layers_to_transform", "3", "layers_to_transform is '3'; give a layer's index or a list of them"),
    ("layers_to_transform", [0, "1"], "layers_to_transform is [0, '1']"),
    ("layers_to_transform", [-1], "layers_to_transform is [-1]"),
    ("layers_to_transform", 1.5, "layers_to_transform is 1.5"),
    ("layers_to_transform", True, "layers_to_transform is True"),
    ("layers_pattern", "layers", "layers_pattern is 'layers' without layers_to_transform; give both or neither"),
    ("layers_pattern", ["("], "layers_pattern: '(' is no regular expression"),
    (
        "init_lora_weights",
        "eva",
        'init_lora_weights is \'eva\'; it can be true, false, "gaussian", "orthogonal", "olora",',
    ),
    ("init_lora_weights", "pissa_niter_", "init_lora_weights is 'pissa_niter_'; it can be"),
    ("init_lora_weights", "pissa_niter_4.5", "init_lora_weights is 'pissa_niter_4.5'; it can be"),
    ("init_lora_weights", 1, "init_lora_weights is 1"),
    ("init_lora_weights", None, "init_lora_weights is None"),
    ("bias", "all", "bias is 'all'; only \"none\" is supported"),
    ("modules_to_save", "norm", "modules_to_save is 'norm'; give a list of names"),
    ("modules_to_save", [1], "modules_to_save holds 1"),
    ("adapter_dtype", "int8", "adapter_dtype is 'int8'; it can be one of float32, bfloat16, float16, float64, or null"),
    ("adapter_dtype", torch.int8, "adapter_dtype is torch.int8"),
    ("seed", 1.0, "seed is 1.0; it must be a whole number"),
    ("seed", None, "seed is None"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_value_is_named_with_its_field_and_the_fix(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        LoraConfig(**{name: value})
    assert str(error.value).startswith(message)
    with pytest.raises(ValueError) as error:
        LoraConfig.from_dict({name: value}, source="run.yaml")
    assert str(error.value).startswith(f"run.yaml: {message}")


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, _, _ in WRONG} == {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "orthogonal", "r": 5}, '"orthogonal" with rank 5; it needs ranks that are even'),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, '"orthogonal" with rank 3'),
        (
            {"init_lora_weights": "pissa", "lora_dropout": 0.1},
            "'pissa' with a lora_dropout of 0.1, which would drop parts",
        ),
        ({"init_lora_weights": "OLoRA", "lora_dropout": 0.1}, "'olora' with a lora_dropout of 0.1"),
    ],
)
def test_inits_refuse_what_does_not_go_with_them(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LoraConfig(**values)
    assert str(error.value).startswith(f"init_lora_weights is {message}")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_0", "pissa_niter_16", "olora", "Olora"])
def test_inits_that_are_parts_of_the_weight(init: str) -> None:
    assert LoraConfig(init_lora_weights=init).decomposes
    assert not any(LoraConfig(init_lora_weights=other).decomposes for other in (True, False, "gaussian", "orthogonal"))


def test_a_layer_filter_beside_a_regular_expression_is_refused_as_by_peft() -> None:
    values: dict[str, Any] = {"target_modules": ".*q_proj", "layers_to_transform": [1]}
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(**values)
    with pytest.raises(ValueError, match=r"layers_to_transform is \(1,\) beside the regular expression '\.\*q_proj'"):
        LoraConfig(**values)
    assert LoraConfig(target_modules="all-linear", layers_to_transform=1).layers_to_transform == 1


def test_values_are_normalised() -> None:
    config = LoraConfig(
        target_modules={"v_proj", "q_proj"},
        exclude_modules=[],
        layers_to_transform=range(2),
        layers_pattern=[],
        adapter_dtype="bfloat16",  # type: ignore[arg-type]
        init_lora_weights="Gaussian",
    )
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.exclude_modules is None and config.layers_pattern is None
    assert config.layers_to_transform == (0, 1)
    assert config.adapter_dtype is torch.bfloat16
    assert config.init_lora_weights == "gaussian"
    assert LoraConfig(target_modules="All-Linear").target_modules == "all-linear"
    assert LoraConfig(layers_to_transform=[]).layers_to_transform is None
    assert LoraConfig(target_modules=["b", "a"]).target_modules == ("b", "a")


def test_the_configuration_cannot_change() -> None:
    ranks = {"q_proj": 4}
    config = LoraConfig(rank_pattern=ranks)
    ranks["q_proj"] = 5
    assert config.rank_pattern == {"q_proj": 4}
    with pytest.raises(TypeError):
        config.rank_pattern["q_proj"] = 6  # type: ignore[index]
    with pytest.raises(AttributeError):
        config.r = 4  # type: ignore[misc]


FULL = LoraConfig(
    r=4,
    lora_alpha=2.5,
    lora_dropout=0.25,
    target_modules=["q_proj", "linear_fc1"],
    exclude_modules=r".*\.0\..*",
    use_rslora=True,
    use_dora=True,
    rank_pattern={"^model.x": 3, "q_proj": 2},
    alpha_pattern={"q_proj": 1.5},
    layers_to_transform=[1, 3],
    layers_pattern=["layers", "h"],
    init_lora_weights=False,
    shared_A=True,
    adapter_dtype=torch.bfloat16,
    seed=7,
)


@pytest.mark.parametrize("config", [LoraConfig(), FULL], ids=["default", "full"])
def test_a_configuration_comes_back_from_json_copies_and_pickles(config: LoraConfig, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert LoraConfig.from_json(path) == config
    assert copy.deepcopy(config) == config  # so that a model that holds it can be copied
    assert pickle.loads(pickle.dumps(config)) == config
    assert list(LoraConfig.from_json(path).rank_pattern) == list(config.rank_pattern)  # the first that matches holds


def test_scaling_is_alpha_over_the_rank_or_its_root() -> None:
    assert LoraConfig().scaling(8, 16) == 2
    assert LoraConfig(use_rslora=True).scaling(4, 3) == 1.5


PEFT_CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "r": 3, "lora_alpha": 24, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    {"target_modules": r".*\.q_proj", "exclude_modules": ["lm_head"], "use_rslora": True, "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": "layers", "init_lora_weights": False},
    {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"},
    {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q": 0.5}},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    {"target_modules": ["q_proj"], "use_dora": True, "rank_pattern": None, "alpha_pattern": None, "layers_to_transform": None},
]  # fmt: skip


@pytest.mark.parametrize("values", PEFT_CASES)
def test_peft_files_and_dictionaries_are_read(values: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**values)
    theirs.save_pretrained(str(tmp_path))
    for ours in (LoraConfig.from_json(tmp_path / "adapter_config.json"), LoraConfig.from_dict(theirs.to_dict())):
        for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "bias"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("rank_pattern", "alpha_pattern"):
            assert getattr(ours, name) == (getattr(theirs, name) or {}), name
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            assert _plain(getattr(ours, name)) == _plain(getattr(theirs, name)), name


def _plain(value: Any) -> Any:
    return set(value) if isinstance(value, list | tuple | set) else value


def test_peft_reads_our_fields(tmp_path: Path) -> None:
    ours = {name: value for name, value in FULL.to_dict().items() if name not in ("shared_A", "adapter_dtype", "seed")}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **ours}))
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    for name, value in ours.items():
        assert _plain(getattr(theirs, name)) == _plain(value), name


def test_every_field_that_peft_writes_is_known(tmp_path: Path) -> None:
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    everything = {**written, "enable_lora": None, "merge_weights": False}  # and PEFT 0.2
    assert LoraConfig.from_dict(everything) == LoraConfig(target_modules=["q_proj"])
    assert set(written) >= {field.name for field in fields(peft.LoraConfig)} - {"runtime_config"}


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("target_parameters", ["experts.down_proj"], "target_parameters = ['experts.down_proj'] is not supported"),
    ("trainable_token_indices", [5], "trainable_token_indices = [5] is not supported"),
    ("layer_replication", [[0, 4]], "layer_replication = [[0, 4]] is not supported"),
    ("lora_bias", True, "lora_bias = True is not supported"),
    ("fan_in_fan_out", True, "fan_in_fan_out = True is not supported"),
    ("alora_invocation_tokens", [1], "alora_invocation_tokens = [1] is not supported"),
    ("eva_config", {"rho": 2.0}, "eva_config = {'rho': 2.0} is not supported"),
    ("use_qalora", True, "use_qalora = True is not supported"),
    ("ensure_weight_tying", True, "ensure_weight_tying = True is not supported"),
    ("init_lora_weights", "corda", "init_lora_weights is 'corda'; it can be"),
    ("bias", "lora_only", "bias is 'lora_only'; only \"none\""),
    ("target_modules", None, "target_modules is null, by which PEFT means a choice that depends on the architecture"),
    ("peft_type", "LOHA", "peft_type is 'LOHA'; only LORA is supported"),
    ("target_module", ["q"], "unknown field 'target_module'; did you mean 'target_modules'?"),
    ("alpha", 16, "unknown field 'alpha'; did you mean 'lora_alpha'?"),
    ("dropout", 0.1, "unknown field 'dropout'; did you mean 'lora_dropout'?"),
    ("rank", 4, "unknown field 'rank'; did you mean 'r'?"),
    ("lora_dim", 4, "unknown field 'lora_dim'; did you mean 'r'?"),
    ("use_rs_lora", True, "unknown field 'use_rs_lora'; did you mean 'use_rslora'?"),
    ("xyz", 4, "unknown field 'xyz'; the fields are adapter_dtype, alpha_pattern, bias,"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), UNSUPPORTED)
def test_what_peft_has_and_mlora_lacks_is_refused_under_the_files_name(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], name: value}))
    with pytest.raises(ValueError) as error:
        LoraConfig.from_json(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_targets_left_to_peft_are_refused_and_left_to_mlora_are_all_linear() -> None:
    with pytest.raises(ValueError, match="target_modules is null"):
        LoraConfig.from_dict({"peft_type": "LORA", "r": 4})
    assert LoraConfig.from_dict({"r": 4}) == LoraConfig(r=4, target_modules="all-linear")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"r": 4,', "not readable as JSON: "),
        (b"", "not readable as JSON: "),
        (b'{"r": \xff}', "not readable as JSON: "),
        (b'["q_proj"]', "expected a JSON object with the fields of a LoraConfig, got ['q_proj']"),
        (b'{"r": NaN}', "r is nan"),
    ],
)
def test_a_file_that_holds_no_configuration_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        LoraConfig.from_json(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        LoraConfig.from_json(tmp_path / "nowhere.json")
