"""Which modules are targeted, against the installed PEFT: its matching function, and modules that it wraps in real models."""

import re
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from mlora.config import LoraConfig
from mlora.targets import Projection, is_target, layer_index, matches_pattern_key, select
from parallel.sizes import ParallelSizes
from parallel.stages import union_over_stages
from tests.ranks import run_ranks

FIXED = settings(max_examples=300, deadline=None, derandomize=True)
LAYERS = 4
HF = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
HF += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
MEGATRON = ["self_attention.linear_qkv"] * 3 + ["self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc1"]
MEGATRON += ["mlp.linear_fc2"]
PARTS = ["q", "k", "v", "whole", "gate", "up", "whole"]


def projections(layers: Sequence[int] = range(LAYERS)) -> list[Projection]:
    """Those of a Llama's layers under their Megatron and Hugging Face names."""
    return [
        Projection(f"decoder.layers.{layer}.{megatron}", part, f"model.layers.{layer}.{hf}")
        for layer in layers
        for hf, megatron, part in zip(HF, MEGATRON, PARTS, strict=True)
    ]


def same_name(path: str) -> Projection:
    """A module with one name only, as PEFT sees it."""
    return Projection(path, "whole", path)


# Paths and entries from few parts, so that they meet often. "layers" also stands below experts and at the root.
part = st.sampled_from(["model", "layers", "h", "experts", "0", "1", "2", "q", "xq", "q_proj", "gate"])
path = st.lists(part, min_size=1, max_size=7).map(".".join)
regex = st.sampled_from(
    [r".*q", r".*\.q", r"model\..*", r".*layers\.[01]\..*", r"q", r".*(q|gate)", r".*\.\d+\.q_proj"]
)
names = st.lists(st.one_of(st.lists(part, min_size=1, max_size=3).map(".".join), path), min_size=1, max_size=4)
layers = st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3))
pattern = st.one_of(
    st.none(), st.sampled_from(["layers", "h", "experts", "(layers|h)", "model.layers", "layers|h", "[lh].*"])
)


@given(
    path,
    st.one_of(names, regex),
    st.one_of(st.none(), names, regex),
    layers,
    st.one_of(pattern, st.lists(part, max_size=2)),
)
@example("model.layers.1.experts.0.q", ["q"], None, [0], "experts")
@example("layers.1.x.layers.2.q", ["q"], None, [1], "layers")
@example("model.layers.1.q", ["model.layers.1.q"], None, [0], None)
@example("model.layers.1.q", ["q"], None, [], "layers")
@example("model.layers.1.xq", ["q"], None, None, None)
@example("model.layers.1.q", ["q"], ["xq", "layers.1"], None, None)
@example("model.layers.1.experts.0.q", ["q"], None, [1], None)
@FIXED
def test_one_path_is_matched_as_by_peft(
    key: str, targets: Any, excluded: Any, wanted: Any, layers_pattern: Any
) -> None:
    if isinstance(targets, str) or wanted is None:
        wanted = layers_pattern = None  # PEFT refuses the combination, and so do we
    if wanted == []:
        layers_pattern = None
    values = {"target_modules": targets, "exclude_modules": excluded}
    values |= {"layers_to_transform": wanted, "layers_pattern": layers_pattern}
    theirs = check_target_module_exists(peft.LoraConfig(**values), key)
    assert is_target(same_name(key), LoraConfig(**values)) == (bool(theirs) and not isinstance(theirs, _ExcludedModule))


@given(st.integers(0, LAYERS * len(HF) - 1), st.data())
@FIXED
def test_a_projection_is_matched_by_either_of_its_names(at: int, data: st.DataObject) -> None:
    projection = projections()[at]
    entry = st.sampled_from([*{*HF, *MEGATRON}, "q_proj", "linear_qkv", "linear_fc1", "mlp", projection.module])
    expression = st.sampled_from(
        [r".*linear_(qkv|fc1)", r".*layers\.[02]\..*", r"model\..*", r"decoder\..*proj", r".*_proj"]
    )
    targets = data.draw(st.one_of(st.lists(entry, min_size=1), expression))
    excluded = data.draw(st.one_of(st.none(), st.lists(entry), expression))
    wanted = None if isinstance(targets, str) else data.draw(layers)
    values = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": wanted}
    found = [check_target_module_exists(peft.LoraConfig(**values), name) for name in projection.names]
    expected = any(found) and not any(isinstance(one, _ExcludedModule) for one in found)
    assert is_target(projection, LoraConfig(**values)) == expected


KEYS = ["q", "q_proj", "^q", "^model.layers", "layers.*", r"[01]\.q", ".*q", "q|gate", "model.*q", "x?q", "0", ".*"]


@given(path, st.lists(st.sampled_from(KEYS), max_size=4))
@FIXED
def test_keys_of_patterns_match_as_by_peft(key: str, keys: list[str]) -> None:
    ours = next((one for one in keys if matches_pattern_key(key, one)), key)
    assert ours == get_pattern_key(keys, key)


@pytest.mark.parametrize(
    ("path", "layers_pattern", "index"),
    [
        ("model.layers.11.mlp.experts.3.up_proj", None, 11),
        ("model.layers.11.mlp.experts.3.up_proj", "experts", 3),
        ("decoder.layers.0.self_attention.linear_qkv", "layers", 0),
        ("model.embed", None, None),
        ("model.layers.2", None, None),
        ("transformer.h.5.attn.c_attn", ["layers", "h"], 5),
        ("transformer.h.5.attn.c_attn", "layers", None),
        ("model.layers.7.q", "(layers|h)", 7),
    ],
)
def test_layer_numbers(path: str, layers_pattern: Any, index: int | None) -> None:
    assert layer_index(path, layers_pattern) == index


def nested(paths: Sequence[str]) -> torch.nn.Module:
    """A model with a small linear at each path."""
    model = torch.nn.Module()
    for path in paths:
        module, *leaf = model, *path.split(".")
        for name in leaf[:-1]:
            if name not in dict(module.named_children()):
                module.add_module(name, torch.nn.Module())
            module = getattr(module, name)
        module.add_module(leaf[-1], torch.nn.Linear(2, 2))
    return model


PATHS = [f"model.layers.{layer}.{leaf}" for layer in range(3) for leaf in (*HF, "mlp.experts.1.up_proj")]
leaves = st.sampled_from(
    ["q_proj", "v_proj", "up_proj", "mlp.up_proj", "self_attn.o_proj", "experts.1.up_proj", *PATHS[:3]]
)
pattern_keys = st.sampled_from(
    ["q_proj", "up_proj", "^model.layers.0.self_attn.q_proj", r"layers\.[12]\..*", "mlp.up_proj", "^q_proj", ".*_proj"]
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations of which most match something in PATHS and some hold entries that do not."""
    targets = draw(
        st.one_of(st.lists(leaves, min_size=1, max_size=3), st.sampled_from([r".*(q|up)_proj", r".*\.1\..*_proj"]))
    )
    return {
        "r": 6,
        "lora_alpha": 12,
        "use_rslora": draw(st.booleans()),
        "target_modules": targets,
        "exclude_modules": draw(st.one_of(st.none(), st.lists(leaves, max_size=1), st.just(r".*layers\.2\..*"))),
        "layers_to_transform": None if isinstance(targets, str) else draw(st.sampled_from([None, None, 1, [0, 2]])),
        "rank_pattern": draw(st.dictionaries(pattern_keys, st.integers(1, 5), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(pattern_keys, st.integers(1, 5), max_size=3)),
    }


def wrapped(model: torch.nn.Module) -> dict[str, tuple[int, float]]:
    """Module -> (rank, scaling) of what PEFT has adapted."""
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def something_is_idle(values: dict[str, Any], targets: Sequence[str]) -> bool:
    """Whether, by PEFT's functions, an entry matches no module or a key decides nothing for any of the targets."""
    for field in ("target_modules", "exclude_modules"):
        entries = values[field] or []
        for entry in [entries] if isinstance(entries, str) else [[entry] for entry in entries]:
            alone = peft.LoraConfig(target_modules=entry)
            if not any(check_target_module_exists(alone, name) for name in PATHS):
                return True
    for field in ("rank_pattern", "alpha_pattern"):
        deciding = {get_pattern_key(values[field], name) for name in targets}
        if not set(values[field]) <= deciding:
            return True
    return not targets


@given(configs())
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_the_modules_ranks_and_scalings_of_a_real_model_are_pefts(values: dict[str, Any]) -> None:
    try:
        theirs = wrapped(peft.inject_adapter_in_model(peft.LoraConfig(**values), nested(PATHS)))
    except ValueError:
        theirs = {}  # nothing matched
    config = LoraConfig(**values)
    try:
        targets = select([same_name(path) for path in PATHS], config)
    except ValueError:
        assert something_is_idle(values, list(theirs))
    else:
        ours = {
            target.projection.module: (target.rank, config.scaling(target.rank, target.alpha)) for target in targets
        }
        assert ours == theirs
        assert not something_is_idle(values, list(theirs))


def test_all_linear_is_pefts_on_a_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), LlamaForCausalLM(tiny))
    targets = select(projections(range(2)), LoraConfig(target_modules="all-linear"))
    assert {target.projection.hf_name for target in targets} == set(wrapped(model))


def test_the_first_key_that_matches_holds_on_either_name() -> None:
    config = LoraConfig(
        r=2,
        rank_pattern={"linear_qkv": 3, r"layers\.1\..*": 4},
        lora_alpha=5,
        alpha_pattern={"^decoder.layers.1.mlp.linear_fc1": 6, "up_proj": 7},
    )
    found = {
        target.projection.hf_name[13:]: (target.rank, target.alpha) for target in select(projections([0, 1]), config)
    }
    assert found["0.self_attn.q_proj"] == found["1.self_attn.v_proj"] == (3, 5)
    assert found["0.self_attn.o_proj"] == (2, 5)
    assert found["1.self_attn.o_proj"] == (4, 5)
    assert found["0.mlp.up_proj"] == (2, 7)
    assert found["1.mlp.up_proj"] == found["1.mlp.gate_proj"] == (4, 6)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_prj"]}, "target_modules: 'q_prj' matches no module on any stage; did you mean 'q_proj'"),
    ({"target_modules": ["q_proj", "qkv"]}, "target_modules: 'qkv' matches no module on any stage"),
    ({"target_modules": ["linear_qk"]}, "did you mean 'linear_qkv'"),
    ({"target_modules": ["lm_head"]}, "target_modules: 'lm_head' matches no module on any stage"),
    ({"target_modules": ["zzz"]}, "matches no module on any stage. Modules that can be adapted: decoder.layers.*.mlp.linear"),
    ({"target_modules": ["layers.9.self_attn.q_proj"]}, "did you mean 'q_proj'"),
    ({"target_modules": "q_proj"}, "a string is a regular expression for the whole path; for the name write ['q_proj']"),
    ({"target_modules": [".*q_proj"]}, "an entry of a list is a name; a regular expression is given as a string"),
    ({"exclude_modules": ["k_porj"]}, "exclude_modules: 'k_porj' matches no module on any stage; did you mean 'k_proj'"),
    ({"exclude_modules": "all-linear"}, "exclude_modules: 'all-linear' matches no module"),
    ({"exclude_modules": r".*visual.*"}, "exclude_modules: '.*visual.*' matches no module"),
    ({"rank_pattern": {"qproj": 4}}, "rank_pattern: 'qproj' matches no target on any stage; did you mean 'q_proj'"),
    ({"alpha_pattern": {"^q_proj": 4}}, "alpha_pattern: '^q_proj' matches no target"),
    ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj' matches no target"),
    ({"rank_pattern": {".*": 4, "k_proj": 2}}, "rank_pattern: 'k_proj' decides nothing, for keys before it match all of its"),
    ({"layers_to_transform": [0, 4]}, "layers_to_transform: there is no layer 4; the model has layers 0 to 3"),
    ({"layers_to_transform": 0, "layers_pattern": "h"}, "layers_pattern 'h': no module's path holds the number of a layer"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["linear_qkv"]}, "nothing is left to adapt: target_modules ('q_proj',)"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), ERRORS)
def test_whatever_matches_nothing_is_an_error_with_near_misses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        select(projections(), LoraConfig(**values))


def test_the_output_layer_may_be_excluded() -> None:
    assert len(select(projections(), LoraConfig(exclude_modules=["lm_head"]))) == LAYERS * len(HF)


def on_two_stages(rank: int, values: dict[str, Any], held: Sequence[Sequence[int]]) -> Any:
    try:
        targets = select(projections(held[rank]), LoraConfig(**values), union_over_stages)
    except ValueError as error:
        return str(error)
    return [target.projection.hf_name for target in targets]


def all_on_two_stages(rank: int, cases: list[tuple[dict[str, Any], list[list[int]]]]) -> list[Any]:
    return [on_two_stages(rank, values, held) for values, held in cases]


def test_a_name_is_unknown_only_if_no_stage_knows_it() -> None:
    halves, one_empty = [[0, 1], [2, 3]], [[], [0]]
    cases: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({"target_modules": ["layers.3.self_attn.q_proj"]}, halves),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"], "rank_pattern": {r"layers\.0\..*": 3}}, halves),
        ({"target_modules": ["q_proj"]}, one_empty),
        ({"target_modules": ["qq_proj"]}, one_empty),
        ({"layers_to_transform": [4]}, halves),
        ({"rank_pattern": {r"layers\.4\..*": 3}}, halves),
    ]
    first, second = run_ranks(2, all_on_two_stages, cases, sizes=ParallelSizes(pipeline=2))
    assert [first[0], second[0]] == [[], ["model.layers.3.self_attn.q_proj"]]
    assert [first[1], second[1]] == [["model.layers.0.self_attn.q_proj"], []]
    assert [first[2], second[2]] == [[], ["model.layers.0.self_attn.q_proj"]]
    assert first[3:] == second[3:]
    assert first[3].startswith("target_modules: 'qq_proj' matches no module on any stage; did you mean 'q_proj'")
    assert "there is no layer 4; the model has layers 0 to 3" in first[4]
    assert first[5].startswith(r"rank_pattern: 'layers\\.4\\..*' matches no target on any stage")
