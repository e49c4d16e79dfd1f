"""The fields that say which modules, ranks and alphas: PEFT's own rules and ours read them as they were meant."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlora.conversion.peft_config import PeftConfig
from mlora.conversion.selection import in_layer, most_common, selection, targets
from mlora.conversion.state import refuse

LAYERS = 12
LEAVES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EVERY = [f"model.layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in LEAVES] + [
    "lm_head",
    "model.embed_tokens",
]

pairs = st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([1, 8, 0.5]))


@st.composite
def alike(draw: st.DrawFn) -> dict[str, tuple[int, float]]:
    """Some kinds in some layers, each kind with a rank and alpha, but for a few modules."""
    kinds = draw(st.dictionaries(st.sampled_from(LEAVES), pairs, min_size=1))
    layers = draw(st.sets(st.integers(0, LAYERS - 1), min_size=1) | st.just(set(range(LAYERS))))
    found = {f"model.layers.{layer}.{leaf}": pair for layer in layers for leaf, pair in kinds.items()}
    if draw(st.booleans()):
        found["lm_head"] = draw(pairs)
    return found | {name: draw(pairs) for name in draw(st.sets(st.sampled_from(sorted(found)), max_size=3))}


unlike = st.dictionaries(st.sampled_from(EVERY), pairs, min_size=1)


@settings(max_examples=100, deadline=None)
@given(modules=alike() | unlike, knows_layers=st.booleans())
def test_peft_and_we_read_what_was_meant(modules: dict[str, tuple[int, float]], knows_layers: bool) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    fields = selection(modules, LAYERS if knows_layers else None)
    theirs: Any = LoraConfig(**fields)
    ours = PeftConfig.from_dict({"peft_type": "LORA", **fields}, "test", refuse)
    for name in EVERY:
        assert bool(check_target_module_exists(theirs, name)) == ours.targets(name) == (name in modules), name
    for name, (rank, alpha) in modules.items():
        assert (ours.rank(name), ours.alpha(name)) == (rank, alpha)
        assert theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), name), theirs.r) == rank
        key = get_pattern_key(theirs.alpha_pattern.keys(), name)
        assert theirs.alpha_pattern.get(key, theirs.lora_alpha) == alpha


def test_the_shortest_words() -> None:
    same = {name: (8, 16.0) for name in EVERY[:-2]}
    leaves = sorted(leaf.partition(".")[2] for leaf in LEAVES)
    plain = {"r": 8, "lora_alpha": 16.0, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": leaves}
    assert selection(same, LAYERS) == plain
    assert selection(same, None) == plain | {"layers_to_transform": list(range(LAYERS))}
    ups = same | {name: (2, 16.0) for name in same if name.endswith("up_proj")}
    assert selection(ups, LAYERS) == plain | {"rank_pattern": {"up_proj": 2}}
    one = same | {"model.layers.3.mlp.up_proj": (8, 1.0)}
    assert selection(one, LAYERS) == plain | {"alpha_pattern": {r"model\.layers\.3\.mlp\.up_proj": 1.0}}
    assert targets({"model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"}, LAYERS) == {
        "target_modules": ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"]
    }


def test_experts_are_counted_as_no_layers() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(2) for expert in range(5)]
    assert targets(names, 2) == {"target_modules": ["up_proj"]}
    assert in_layer("model.layers.1.mlp.experts.3.up_proj", 7) == "model.layers.7.mlp.experts.3.up_proj"


@pytest.mark.parametrize(("values", "wanted"), [([3, 1, 3], 3), ([2, 1], 1), ([0.5], 0.5)])
def test_most_common(values: list[float], wanted: float) -> None:
    assert most_common(values) == wanted
