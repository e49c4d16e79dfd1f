"""PEFT directories: what PEFT writes is read with PEFT's meaning, and what PEFT would skip in silence is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mlora.conversion import AdapterState, open_adapter
from mlora.conversion.peft_config import PeftConfig
from mlora.conversion.state import refuse
from tests.mlora.conversion.adapters import DOWN, PREFIX, SMALL, Q, tensors_of, write_adapter, write_base, write_peft

# No module matches two keys: PEFT sorts them when it saves, so that another one may come first afterwards.
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 3},
    "alpha_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2.5},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "llama", attention_bias=True)


def _lora_layers(model: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    found = model.base_model.model.named_modules()
    return {name: module for name, module in found if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, **PATTERNS},
        {"target_modules": r".*\.(q|gate)_proj", "use_dora": True},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.o_proj"], **PATTERNS},
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "rank_pattern": {"embed_tokens": 2}},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
    ids=str,
)
def test_what_peft_writes_means_what_it_means_to_peft(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    model = write_peft(tmp_path / "a", base, **config)
    state = open_adapter(tmp_path / "a")
    layers = _lora_layers(model)
    assert sorted(state.by_name) == sorted(layers)
    assert state.ties_embeddings is False and state.uses_dora == config.get("use_dora", False)
    for name, layer in layers.items():
        module = state.by_name[name]
        assert (module.rank, module.scaling) == (layer.r["default"], layer.scaling["default"])
        assert module.weight_shape == tuple(layer.get_base_layer().weight.shape)
        factors = module.load()
        kept = layer.lora_embedding_A if module.embedding else layer.lora_A
        assert torch.equal(factors.A, kept["default"] if module.embedding else kept["default"].weight)
        if factors.magnitude is not None:
            assert torch.equal(factors.magnitude, layer.lora_magnitude_vector["default"].weight)
    in_file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.key for tensor in state.tensors} == in_file.keys()
    for tensor in state.tensors:
        assert torch.equal(tensor.load(), in_file[tensor.key])
    assert state.config == json.loads((tmp_path / "a" / "adapter_config.json").read_text())


def test_whole_parameters_have_the_bases_names(base: Path, tmp_path: Path) -> None:
    model = write_peft(tmp_path / "a", base, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")
    state = open_adapter(tmp_path / "a")
    assert list(state.full) == ["lm_head.weight", *(f"model.layers.{i}.self_attn.q_proj.bias" for i in range(2))]
    assert torch.equal(
        state.full["lm_head.weight"].load(), model.base_model.model.lm_head.modules_to_save["default"].weight
    )


ALPHAS = st.integers(1, 64) | st.floats(0.1, 64)
NAMES = st.sampled_from(
    ["q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", "^model.layers.1.*", "layers.1", ".*proj", "up"]
)


@settings(max_examples=200, deadline=None)
@given(
    r=st.integers(1, 64), alpha=ALPHAS, rslora=st.booleans(), ranks=st.dictionaries(NAMES, st.integers(1, 64), max_size=3),
    alphas=st.dictionaries(NAMES, ALPHAS, max_size=3), layers=st.none() | st.integers(0, 2) | st.lists(st.integers(0, 2)),
    exclude=st.none() | st.lists(st.sampled_from(["q_proj", "mlp", "layers.0.self_attn.q_proj"]), max_size=2),
    targets=st.lists(st.sampled_from(["q_proj", "up_proj", "model.layers.0.mlp.up_proj"]), min_size=1, max_size=3),
    saved=st.none() | st.lists(st.sampled_from(["mlp", "q_proj", "lm_head"]), max_size=2),
)  # fmt: skip
def test_rank_scaling_and_targets_are_pefts(
    r: int, alpha: float, rslora: bool, ranks: Any, alphas: Any, layers: Any, exclude: Any, targets: Any, saved: Any
) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    values = {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas,
        "layers_to_transform": layers, "exclude_modules": exclude, "target_modules": targets, "modules_to_save": saved,
    }  # fmt: skip
    ours = PeftConfig.from_dict(values, "x", refuse)
    theirs = LoraConfig(**{key: value for key, value in values.items() if key != "peft_type"})
    for module in (
        f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")
    ):
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        scale = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert ours.rank(module) == rank
        assert ours.scaling(module) == (scale / rank**0.5 if rslora else scale / rank)
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pickled", [False, True])
def test_every_precision_in_either_file(tmp_path: Path, dtype: torch.dtype, pickled: bool) -> None:
    tensors = {key: value.to(dtype) for key, value in tensors_of(*SMALL).items()}
    state = open_adapter(write_adapter(tmp_path / "a", tensors, pickled=pickled))
    assert [module.name for module in state.modules] == [Q, DOWN]
    for module in state.modules:
        factors = module.load()
        assert torch.equal(factors.A, tensors[f"{PREFIX}{module.name}.lora_A.weight"])
        assert torch.equal(factors.B, tensors[f"{PREFIX}{module.name}.lora_B.weight"])


def test_the_old_pickle_format_and_views_into_one_storage(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", pickled=True)
    whole = torch.randn(2, 11)
    tensors = tensors_of(*SMALL) | {f"{PREFIX}{Q}.lora_A.weight": whole[:, 3:8]}
    torch.save(tensors, path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    A = open_adapter(path).by_name[Q].load().A
    assert torch.equal(A, whole[:, 3:8]) and A.is_contiguous() and A.untyped_storage().nbytes() == A.nbytes


def _renamed(rename: Any) -> dict[str, torch.Tensor]:
    return {rename(key): value for key, value in tensors_of(*SMALL).items()}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("lora_A.", "lora_A.my-task.").replace("lora_B.", "lora_B.my-task."),
        lambda key: "module." + key,
        lambda key: "_orig_mod." + key,
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: key.replace(PREFIX, PREFIX + "module."),
        lambda key: key.replace("layers.0.", "layers.0._orig_mod.").replace(
            "layers.1.", "layers.1._fsdp_wrapped_module."
        ),
        lambda key: key.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    ],
)
def test_what_wrappers_and_live_models_leave_in_keys_is_taken_out(tmp_path: Path, rename: Any) -> None:
    tensors = _renamed(rename)
    state = open_adapter(write_adapter(tmp_path / "a", tensors))
    assert [module.name for module in state.modules] == [Q, DOWN]
    assert {tensor.key for tensor in state.tensors} == tensors.keys()


def test_keys_of_a_live_model_of_every_kind(tmp_path: Path) -> None:
    tensors = _renamed(lambda key: key.replace(".weight", ".default.weight")) | {
        f"{PREFIX}{Q}.lora_magnitude_vector.default.weight": torch.ones(6),
        f"{PREFIX}{DOWN}.lora_magnitude_vector.default": torch.ones(5),
        f"{PREFIX}model.embed_tokens.lora_embedding_A.default": torch.ones(2, 9),
        f"{PREFIX}model.embed_tokens.lora_embedding_B.default": torch.ones(6, 2),
        f"{PREFIX}model.embed_tokens.lora_magnitude_vector.weight": torch.ones(6),
        f"{PREFIX}lm_head.modules_to_save.default.weight": torch.ones(9, 6),
    }
    path = write_adapter(
        tmp_path / "a",
        tensors,
        use_dora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
    )
    state = open_adapter(path)
    assert all(module.magnitude is not None for module in state.modules)
    assert state.by_name["model.embed_tokens"].weight_shape == (9, 6)
    assert list(state.full) == ["lm_head.weight"]


A_KEY, B_KEY = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


def _without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors_of(*SMALL).items() if name != key}


def _with(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors_of(*SMALL) | changes


@pytest.mark.parametrize(
    ("tensors", "key", "rule"),
    [
        (_renamed(lambda key: key.removeprefix(PREFIX)), Q, "does not begin with base_model.model.: PEFT would ignore it"),
        (_renamed(lambda key: "base." + key), Q, "does not begin with base_model.model."),
        (_without(A_KEY), Q, "has B but lacks lora_A"),
        (_without(B_KEY), Q, "has A but lacks lora_B"),
        (_with(**{A_KEY: torch.ones(3, 5), B_KEY: torch.ones(6, 3)}), A_KEY, "of rank 3; adapter_config.json says rank 2"),
        (_with(**{B_KEY: torch.ones(6, 3)}), B_KEY, "of rank 3; adapter_config.json says rank 2"),
        (_with(**{A_KEY: torch.ones(2, 5, 1)}), A_KEY, "a LoRA matrix has two dimensions"),
        (_with(**{A_KEY: torch.ones(2, 5, dtype=torch.int32)}), A_KEY, "is stored as torch.int32"),
        (tensors_of(*SMALL, ("model.layers.0.self_attn.k_proj", 2, 6, 5)), "k_proj.lora_A", "does not target"),
        (_with(**{f"{PREFIX}{Q}.lora_B.bias": torch.ones(6)}), f"{Q}.lora_B.bias", "a bias on a LoRA factor (lora_bias)"),
        (_with(**{f"{PREFIX}{Q}.lora_diag": torch.ones(2)}), f"{Q}.lora_diag", "KaSA"),
        (
            _with(**{f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 6)}),
            "trainable_tokens_delta", "single trained rows",
        ),
        (_with(**{f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(6)}), Q, "does not say use_dora, but the file has a"),
        (_with(**{f"{PREFIX}model.norm.weight": torch.ones(6)}), "model.norm.weight", "unknown key"),
        (_with(**{f"{PREFIX}{Q}.bias": torch.ones(6)}), f"{Q}.bias", "unknown key"),
        (_with(**{f"{PREFIX}{Q}.base_layer.weight": torch.ones(6, 4)}), f"{Q}.base_layer.weight", "has shape [6, 4]"),
        (_with(**{A_KEY.replace(".weight", ".default.weight"): torch.ones(2, 5)}), A_KEY, "are the same tensor of one module"),
        (
            _renamed(lambda key: key.replace("_A.", "_A.one.").replace("_B.", "_B.two.")), "one, two",
            "holds tensors of several adapters",
        ),
        (
            _with(**{f"{PREFIX}{Q}.lora_embedding_A": torch.ones(2, 5), f"{PREFIX}{Q}.lora_embedding_B": torch.ones(6, 2)}), Q,
            "is an embedding and a linear at once",
        ),
        (_with(**{f"{PREFIX}model.experts.base_layer.lora_A.weight": torch.ones(2, 5)}), "experts", "lacks lora_B"),
        ({}, "", "holds no adapter tensors"),
    ],
)  # fmt: skip
def test_what_peft_would_ignore_or_mlora_cannot_carry_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], key: str, rule: str
) -> None:
    path = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(ValueError) as error:
        open_adapter(path)
    assert str(path / "adapter_model.safetensors") in str(error.value)
    assert key in str(error.value) and rule in str(error.value)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "says use_dora, but the file has no lora_magnitude_vector"),
        ({"r": 3}, "rank 2; adapter_config.json says rank 3"),
        ({"r": 0}, "r is 0"),
        ({"r": "2"}, "r is '2'"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern['q_proj'] is nan"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj'] is 1.5"),
        ({"rank_pattern": [2]}, "it must map patterns to numbers"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is no regular expression"),
        ({"target_modules": "*"}, "target_modules: '*' is no regular expression"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": []}, "target_modules is []"),
        ({"target_modules": {"a": 1}}, "must be a list of names"),
        ({"modules_to_save": "lm_head"}, "must be a list of names"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' in modules_to_save, but the file has no tensor of it"),
        ({"layers_to_transform": ["0"]}, "layers are whole numbers"),
        ({"layers_to_transform": [1]}, "does not target model.layers.0.self_attn.q_proj"),
        ({"exclude_modules": ["q_proj"]}, "does not target"),
        ({"target_modules": ["q_proj"], "ensure_weight_tying": True}, f"does not target {DOWN}"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = true"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "adapters on packed 3-D parameters"),
        ({"trainable_token_indices": [1, 2]}, "single trained rows of the embedding"),
        ({"lora_bias": True}, "a bias on lora_B"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"alora_invocation_tokens": [1]}, "only behind certain tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "PEFT changes the base weights when it loads this adapter"),
        ({"init_lora_weights": "lora_ga"}, "PEFT changes the base weights when it loads this adapter"),
        ({"use_drola": True}, "unknown field 'use_drola' = true; did you mean 'use_dora'?"),
    ],
)
def test_a_configuration_that_means_something_else_is_named(tmp_path: Path, config: dict[str, Any], rule: str) -> None:
    path = write_adapter(tmp_path / "a", **config)
    with pytest.raises(ValueError) as error:
        open_adapter(path)
    assert "adapter_config.json" in str(error.value) and rule in str(error.value)


@pytest.mark.parametrize(
    "config",
    [{"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"enable_lora": None}, {"future": False}],
)
def test_fields_that_change_nothing_about_the_tensors_are_read_over(tmp_path: Path, config: dict[str, Any]) -> None:
    assert len(open_adapter(write_adapter(tmp_path / "a", **config)).modules) == 2


def test_values_that_are_not_finite_are_refused_when_they_are_read(tmp_path: Path) -> None:
    tensors = tensors_of(*SMALL)
    tensors[B_KEY][3, 1] = float("nan")
    tensors[f"{PREFIX}{DOWN}.lora_A.weight"][0, 0] = -float("inf")
    state = open_adapter(write_adapter(tmp_path / "a", tensors))
    for name, key in ((Q, B_KEY), (DOWN, f"{PREFIX}{DOWN}.lora_A.weight")):
        with pytest.raises(ValueError, match=f"adapter_model.safetensors: {key} has values that are not finite"):
            state.by_name[name].load()


class _Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_adapter(tmp_path / "a", pickled=True)
    for save in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
        save({"x": _Payload()}, path / "adapter_model.bin")
        words = (
            r"more than tensors \(pickled code is never run\): [Uu]nsupported (global: )?(GLOBAL [\w.]+|operand \d+)$"
        )
        with pytest.raises(ValueError, match=words):
            open_adapter(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "rule"), [([torch.ones(2)], "holds a list"), ({"a": "text"}, "'a' is not a tensor")]
)
def test_a_pickle_of_something_else_is_named(tmp_path: Path, content: Any, rule: str) -> None:
    path = write_adapter(tmp_path / "a", pickled=True)
    torch.save(content, path / "adapter_model.bin")
    with pytest.raises(ValueError, match=rule):
        open_adapter(path)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_cut_short_is_named(tmp_path: Path, pickled: bool) -> None:
    path = write_adapter(tmp_path / "a", pickled=pickled)
    file = path / ("adapter_model.bin" if pickled else "adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match=str(file)):
        open_adapter(path)


def test_every_problem_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    tensors = _without(A_KEY) | {"stray": torch.ones(1)}
    problems: list[str] = []
    state: AdapterState = open_adapter(write_adapter(tmp_path / "a", tensors, kasa_config={"x": 1}), problems.append)
    assert [module.name for module in state.modules] == [DOWN]
    assert ["kasa" in problems[0], "stray" in problems[1], "lacks lora_A" in problems[2]] == [True] * 3


def test_what_is_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_adapter(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is no directory"):
        open_adapter(tmp_path / "file")
    write_adapter(tmp_path / "task")
    with pytest.raises(FileNotFoundError, match=r"is no adapter.*its folder task looks like an adapter"):
        open_adapter(tmp_path)
    (tmp_path / "task" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json: without it the scaling"):
        open_adapter(tmp_path / "task")
    (tmp_path / "task" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_adapter(tmp_path / "task")
    (tmp_path / "task" / "adapter_model.safetensors").unlink()
    (tmp_path / "task" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]})
    )
    with pytest.raises(FileNotFoundError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(tmp_path / "task")
