"""The families' tables against Hugging Face's own classes, and what of a ``config.json`` is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from mlora.families import (
    FAMILIES,
    GEMMA2,
    GEMMA3,
    LLAMA,
    MISTRAL,
    OLMO2,
    PHI3,
    QWEN2,
    Architecture,
    Family,
    find_family,
)
from mlora.families.keys import DESCRIPTIVE
from mlora.families.rope import Rope
from mlora.names import hf_module_name
from tests.tiny import KINDS, LAYERS, make_model

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
NO_PAD = {"pad_token_id": None}  # Phi 3's own is beyond the small vocabulary.


def config_json(kind: str) -> dict[str, Any]:
    """What ``save_pretrained`` writes as ``config.json`` for a tiny model."""
    return json.loads(make_model(kind).config.to_json_string())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_hugging_faces_model(kind: str) -> None:
    model = make_model(kind)
    config = json.loads(model.config.to_json_string())
    family = find_family(config)
    architecture = family.architecture(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if architecture.tied:
        assert shapes.pop("lm_head.weight") == shapes["model.embed_tokens.weight"]
    assert family.tensors(architecture) == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_hugging_faces_bit_for_bit(kind: str) -> None:
    model = make_model(kind)
    config = json.loads(model.config.to_json_string())
    architecture = find_family(config).architecture(config)
    theirs, width = model.model.rotary_emb, architecture.sizes["head"]
    ropes = {"": architecture.rope}
    if architecture.local_rope is not None:
        ropes = {"full_attention_": architecture.rope, "sliding_attention_": architecture.local_rope}
    for name, rope in ropes.items():
        assert torch.equal(rope.inverse_frequencies(width), getattr(theirs, f"{name}inv_freq"))
        assert rope.magnitude == getattr(theirs, f"{name}attention_scaling")


# Not fields of the classes: transformers 4's rotary keys and pattern of windows, and what attention reads if the file has it.
OUTSIDE = {
    "rope_theta": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
    "rope_local_base_freq": None,
    "sliding_window_pattern": 6,
    "head_dim": None,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_defaults_are_those_of_hugging_faces_class(family: Family) -> None:
    from transformers import AutoConfig

    cls = type(AutoConfig.for_model(family.model_type))
    known = {name: field.default for name, field in cls.__dataclass_fields__.items()}
    for key, default in family.defaults.items():
        assert default == known.get(key, OUTSIDE.get(key)), key
        assert key in known or key in OUTSIDE, key
    own = {name for name in cls.__annotations__ if name in known}
    assert {"hidden_size", "rms_norm_eps", "attention_dropout"} <= own
    assert own - family.defaults.keys() - SHAPE.keys() <= DESCRIPTIVE


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_names_lead_there_and_back(family: Family) -> None:
    for module, parts in family.modules.items():
        for part in parts:
            name = module.replace("{layer}", "13")
            hf_name = family.hf_name(name, part)
            assert "13" in hf_name or "{layer}" not in module
            megatron_name, together = family.megatron_parts(hf_name)
            assert megatron_name == name and part in together
            assert [family.hf_name(name, other) for other in together] == [hf_name] * len(together)


def test_rows_of_fused_modules() -> None:
    """Phi 3's ``qkv_proj`` holds q, k and v one after the other, and ``gate_up_proj`` gate and up."""
    architecture, layer = PHI3.architecture(SHAPE | NO_PAD), "decoder.layers.2"
    qkv, fc1 = f"{layer}.self_attention.linear_qkv", f"{layer}.mlp.linear_fc1"
    assert PHI3.hf_name(qkv, "k") == PHI3.hf_name(qkv, "v") == "model.layers.2.self_attn.qkv_proj"
    assert PHI3.megatron_parts("model.layers.2.self_attn.qkv_proj") == (qkv, ("q", "k", "v"))
    assert PHI3.megatron_parts("model.layers.2.mlp.gate_up_proj") == (fc1, ("gate", "up"))
    assert [PHI3.rows(architecture, qkv, part) for part in "qkv"] == [(0, 32), (32, 16), (48, 16)]
    assert [PHI3.rows(architecture, fc1, part) for part in ("gate", "up")] == [(0, 48), (48, 48)]
    assert [LLAMA.rows(LLAMA.architecture(SHAPE), qkv, part) for part in "qkv"] == [(0, 32), (0, 16), (0, 16)]


def test_names_of_llama() -> None:
    assert LLAMA.hf_name("decoder.layers.3.self_attention.linear_qkv", "v") == "model.layers.3.self_attn.v_proj"
    assert LLAMA.hf_name("decoder.layers.3.mlp.linear_fc2") == "model.layers.3.mlp.down_proj"
    assert LLAMA.megatron_parts("model.layers.10.mlp.up_proj") == ("decoder.layers.10.mlp.linear_fc1", ("up",))
    for wrong in ("decoder.layers.3.self_attention.linear_q_proj", "decoder.layers.x.mlp.linear_fc2", "x.output_layer"):
        with pytest.raises(ValueError, match="no module of the llama family"):
            LLAMA.hf_name(wrong)
    with pytest.raises(ValueError, match=r"linear_qkv \(up\) is no module"):
        LLAMA.hf_name("decoder.layers.3.self_attention.linear_qkv", "up")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp is no module of the llama family"):
        LLAMA.megatron_parts("model.layers.3.mlp")


def test_names_without_a_family_are_llamas() -> None:
    assert hf_module_name("decoder.layers.3.mlp.linear_fc1", "gate") == "model.layers.3.mlp.gate_proj"
    assert hf_module_name("self_attention.linear_qkv", "k") == "self_attention.k_proj"
    assert hf_module_name("decoder.layers.1.self_attention.linear_q_down_proj", "whole") == (
        "decoder.layers.1.self_attention.linear_q_down_proj"
    )
    with pytest.raises(ValueError, match="linear_q_down_proj"):
        hf_module_name("decoder.layers.1.self_attention.linear_q_down_proj", "whole", QWEN2)


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 wrote it."""
    rope = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return old


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_transformers_4_is_the_same_architecture(kind: str) -> None:
    config = config_json(kind)
    family = find_family(config)
    assert family.architecture(old_style(config)) == family.architecture(config)


def longrope(**changes: Any) -> dict[str, Any]:
    given = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], **changes}
    return {"original_max_position_embeddings": 32, "rope_scaling": given}


def test_rope_of_either_version() -> None:
    def rope(**keys: Any) -> Rope:
        return LLAMA.architecture(SHAPE | keys).rope

    assert rope() == Rope(10000.0, "default", {})
    assert rope(rope_theta=5e5).theta == 5e5
    assert rope(rope_parameters={"rope_theta": 5e5}).theta == 5e5
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == Rope(10000.0, "linear", {"factor": 2})
    same = {"rope_type": "linear", "factor": 4.0}
    assert rope(rope_scaling=same, rope_parameters=same).kind == "linear"
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rope(rope_scaling=llama3).parameters["original_max_position_embeddings"] == 128


REFUSED: list[tuple[Family, dict[str, Any], str]] = [
    (
        LLAMA,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"rope_scaling = .*'dynamic'; supported are default, linear, llama3",
    ),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters = .*'yarn'"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling = .* needs a positive number 'factor'"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling = .*'factor'"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "rope_scaling = .* has 'mscale'"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = .*'low_freq_factor'"),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "low_freq_factor below high_freq_factor",
    ),
    (LLAMA, {"rope_scaling": [1]}, "rope_scaling = .* is no object"),
    (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters = .* has 'full_attention'"),
    (LLAMA, {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta = 10000.0 differs from 1000000.0"),
    (LLAMA, {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e5}}, "rope_scaling = .* differs"),
    (LLAMA, {"rope_theta": 0}, "rope_theta = 0 is not a positive number"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 rotates heads in part"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters = .* in part"),
    (LLAMA, {"rope_parameters": {"rope_theta": 0}}, "rope_parameters = .* needs a positive number 'rope_theta'"),
    (LLAMA, {"original_max_position_embeddings": 64}, "original_max_position_embeddings = 64 is not known"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    (LLAMA, {"attention_dropout": 0.1}, "attention_dropout = 0.1 .* training only"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
    (LLAMA, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .* code of the checkpoint's own"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures = .*LlamaForCausalLM"),
    (LLAMA, {"logit_scale": 0.5}, "logit_scale = 0.5 is not known for this family"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias = 'yes' is neither true nor false"),
    (LLAMA, {"hidden_size": 32.0}, "hidden_size = 32.0 is not a whole number"),
    (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads 8"),
    (
        LLAMA,
        {"num_attention_heads": 6, "num_key_value_heads": 6},
        "num_attention_heads = 6 does not divide hidden_size 32",
    ),
    (LLAMA, {"head_dim": 7}, "head_dim = 7 makes heads of 7 features"),
    (LLAMA, {"head_dim": -8}, "head_dim = -8"),
    (LLAMA, {"head_dim": "wide"}, "head_dim = 'wide' is not a whole number"),
    (LLAMA, {"architectures": 7}, "architectures = 7"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps = 0"),
    (LLAMA, {"pad_token_id": 101}, "pad_token_id = 101 is none of the 101 rows of the embedding"),
    (PHI3, {"pad_token_id": [0]}, r"pad_token_id = \[0\] is none of the 101 rows"),
    (LLAMA, {"sliding_window": 64}, "sliding_window = 64 is not known"),
    (LLAMA, longrope(), r"rope_scaling = .*'longrope'; supported are default, linear, llama3"),
    (PHI3, {"rope_scaling": {"type": ["default"]}}, r"has the type \['default'\]"),
    (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"'linear'; supported are default, longrope"),
    (PHI3, {"rope_scaling": {"type": "yarn", "short_factor": [1.0, 1.5]}}, r"'yarn'; supported are default, longrope"),
    (PHI3, longrope(short_factor=[1.0]), "rope_scaling = .* needs a short_factor of 2 positive numbers"),
    (PHI3, longrope(short_factor=[1.0, -1.0]), "rope_scaling = .* needs a short_factor of 2 positive numbers"),
    (PHI3, longrope(mscale=1.0), "rope_scaling = .* has 'mscale', which the type 'longrope' has not"),
    (PHI3, longrope(attention_factor=0.5), "rope_scaling = .* makes an attention factor of 0.5"),
    (PHI3, longrope(original_max_position_embeddings=64), "original_max_position_embeddings = 32 differs from that in"),
    (PHI3, {"partial_rotary_factor": 0.75}, "a share 0.75 of a head's 4 features"),
    (PHI3, {"partial_rotary_factor": 2.0}, "a share 2.0 of a head's 4 features"),
    (PHI3, {"resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported"),
    (PHI3, {"embd_pdrop": 0.1}, "embd_pdrop = 0.1 is not supported"),
    (PHI3, {"full_attn_mod": 2}, "full_attn_mod = 2 is not supported"),
    (PHI3, {"attention_bias": True}, "attention_bias = True is not known"),
    (PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3SmallForCausalLM"}}, "auto_map = .* of the checkp"),
    (
        GEMMA2,
        {"hidden_activation": "gelu"},
        "hidden_activation = 'gelu' is not supported; it can be silu, swish, gelu_py",
    ),
    (GEMMA2, {"hidden_act": "gelu"}, "hidden_act = 'gelu' differs from hidden_activation = 'gelu_pytorch_tanh'"),
    (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
    (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0 is not a positive number"),
    (GEMMA2, {"final_logit_softcapping": -1.0}, "final_logit_softcapping = -1.0 is not a positive number"),
    (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 is not a positive number"),
    (GEMMA2, {"sliding_window": None}, "sliding_window = None is not a whole number"),
    (GEMMA2, {"sliding_window_size": 1024}, "sliding_window_size = 1024 differs from sliding_window"),
    (GEMMA2, {"rope_local_base_freq": 1e4}, "rope_local_base_freq = 10000.0 is not known"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported: Hugging Face's class"),
    (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
    (GEMMA3, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters = .* does not describe full_attention and sli"),
    (GEMMA3, {"rope_parameters": {"full_attention": {}}, "rope_theta": 1e6}, "rope_theta = 1000000.0 stands beside"),
    (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters = .*'yarn'; supported"),
    (
        GEMMA3,
        {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
        "rope_parameters = .* in part",
    ),
    (GEMMA3, {"rope_scaling": 8}, "rope_scaling = 8 is no object"),
    (GEMMA3, {"rope_theta": -1.0}, "needs a positive number 'rope_theta'"),
    (OLMO2, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling = .*'yarn'"),
    (OLMO2, {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not known"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window = 0"),
    (MISTRAL, {"layer_types": ["full_attention"] * 4}, "layer_types = .* is not known"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "layer_types = .* give no window"),
    (QWEN2, {"layer_types": ["full_attention"] * 3}, "layer_types = .* to 4 layers"),
    (QWEN2, {"layer_types": ["chunked_attention"] * 4}, "layer_types = .* to 4 layers"),
    (QWEN2, {"layer_types": [{}] * 4}, "layer_types = .* to 4 layers"),
    (QWEN2, {"layer_types": 4}, "layer_types = .* to 4 layers"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers = None"),
    (QWEN2, {"attention_bias": True}, "attention_bias = True is not known"),
]


@pytest.mark.parametrize(
    ("family", "changes", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_what_cannot_be_represented_is_refused(family: Family, changes: dict[str, Any], message: str) -> None:
    family.architecture(SHAPE | NO_PAD)
    with pytest.raises(ValueError, match=rf"^here/config\.json: .*{message}"):
        family.architecture(SHAPE | NO_PAD | changes, "here/config.json")


@pytest.mark.parametrize("key", SHAPE)
def test_a_shape_has_no_default(key: str) -> None:
    rest = {name: value for name, value in SHAPE.items() if name != key}
    if key in LLAMA.defaults:
        LLAMA.architecture(rest)
    else:
        with pytest.raises(ValueError, match=f"config.json: {key} is missing"):
            LLAMA.architecture(rest)


def test_keys_without_effect_are_let_through() -> None:
    harmless = {
        "transformers_version": "4.40.0",
        "_name_or_path": "x",
        "bos_token_id": 1,
        "pretraining_tp": 2,
        "use_cache": True,
    }
    off = {"a_later_feature": False, "another": None, "third": {}, "quantization_config": None, "pruned_heads": {}}
    assert LLAMA.architecture(SHAPE | harmless | off) == LLAMA.architecture(SHAPE)


@pytest.mark.parametrize("model_type", [None, "gpt2"])
def test_an_unknown_model_type_is_refused(model_type: str | None) -> None:
    with pytest.raises(
        ValueError, match=rf"x/config\.json: model_type = {model_type!r} is not supported; it can be llama, "
    ):
        find_family({"model_type": model_type}, "x/config.json")


def test_pad_token() -> None:
    """As torch's embedding takes it, which counts from the end too."""
    values = {LLAMA: None, GEMMA2: 0, GEMMA3: 0, OLMO2: 1}
    assert {family: family.architecture(SHAPE).pad_token for family in values} == values
    for given, row in ((0, 0), (7, 7), (-1, 100), (-101, 0)):
        assert LLAMA.architecture(SHAPE | {"pad_token_id": given}).pad_token == row
        embedding = torch.nn.Embedding(101, 1, padding_idx=given)
        assert embedding.padding_idx == row


def test_windows() -> None:
    def windows(family: Family, **keys: Any) -> list[int | None]:
        return list(family.architecture(SHAPE | NO_PAD | keys).windows)

    none = [None] * 4
    assert windows(LLAMA) == none
    assert windows(MISTRAL) == [4096] * 4
    assert windows(MISTRAL, sliding_window=None) == windows(PHI3) == none
    assert windows(PHI3, sliding_window=2047) == [2047] * 4
    assert windows(QWEN2) == none
    assert windows(QWEN2, use_sliding_window=True) == none  # max_window_layers is 28, and there are 4
    assert windows(QWEN2, use_sliding_window=True, max_window_layers=2, sliding_window=32) == [None, None, 32, 32]
    assert windows(QWEN2, use_sliding_window=True, max_window_layers=0, sliding_window=None) == none
    kinds = ["full_attention"] * 3
    assert windows(QWEN2, use_sliding_window=True, layer_types=[*kinds, "sliding_attention"]) == [None] * 3 + [4096]
    assert windows(QWEN2, use_sliding_window=True, layer_types=[*kinds, kinds[0]], max_window_layers=0) == none
    assert windows(GEMMA2, sliding_window=8) == [8, None, 8, None]
    assert windows(GEMMA2, sliding_window=None, layer_types=[*kinds, kinds[0]]) == none
    assert windows(GEMMA3) == [4096] * 4
    assert windows(GEMMA3, sliding_window=8, sliding_window_pattern=3) == [8, 8, None, 8]


def test_longrope() -> None:
    def rope(**keys: Any) -> Rope:
        return PHI3.architecture(SHAPE | NO_PAD | keys).rope

    assert rope() == Rope(10000.0, "default", {})
    parameters = {"short_factor": (1.0, 1.5), "original_max_position_embeddings": 32}
    # 128 positions over 32; sqrt(1 + ln 4 / ln 32)
    assert rope(**longrope()) == Rope(10000.0, "longrope", parameters, 1.0, 1.4**0.5, 32)
    assert rope(**longrope(type="su")) == rope(**longrope(factor=4.0)) == rope(**longrope())
    assert rope(**longrope(attention_factor=1.25)).magnitude == 1.25
    assert rope(**longrope(factor=1.0)).magnitude == 1.0


def test_a_counter_of_its_own_numbers_a_second_list() -> None:
    """Experts, for example: tables name them with one more counter."""
    from mlora.families.family import HfModule

    module = "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2"
    experts = {"whole": HfModule("model.layers.{layer}.mlp.experts.{expert}.down_proj", ("hidden", "ffn"))}
    family = replace(LLAMA, modules={module: experts})
    architecture: Architecture = replace(LLAMA.architecture(SHAPE), counts={"layer": LAYERS, "expert": 3})
    assert len(family.tensors(architecture)) == LAYERS * 3
    name = "decoder.layers.2.mlp.experts.local_experts.1.linear_fc2"
    assert family.hf_name(name) == "model.layers.2.mlp.experts.1.down_proj"
    assert family.megatron_parts("model.layers.2.mlp.experts.1.down_proj") == (name, ("whole",))


def test_published_configurations_are_read() -> None:
    """The keys of well-known checkpoints' files, with what was typical of the transformers that wrote them."""
    llama2 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1,
              "rope_scaling": None, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
              "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "use_cache": True}  # fmt: skip
    llama32 = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
               "eos_token_id": [128001, 128008], "head_dim": 64, "rope_theta": 500000.0, "tie_word_embeddings": True,
               "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                "original_max_position_embeddings": 64, "rope_type": "llama3"}}  # fmt: skip
    qwen25 = {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "max_window_layers": 28, "rope_theta": 1000000.0,
              "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False, "tie_word_embeddings": True}  # fmt: skip
    smollm = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
              "vocab_size": 49152, "_name_or_path": "x", "unsloth_fixed": True}  # fmt: skip
    phi3 = {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
            "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rope_scaling": None, "rope_theta": 10000.0,
            "sliding_window": 2047, "hidden_act": "silu", "pad_token_id": 32000, "vocab_size": 32064}  # fmt: skip
    phi4_mini = {**phi3, "sliding_window": 262144, "partial_rotary_factor": 0.75, "max_position_embeddings": 131072,
                 "head_dim": 128, "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
                 "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48}}  # fmt: skip
    gemma2 = {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
              "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256, "query_pre_attn_scalar": 256,
              "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0,
              "sliding_window": 4096, "sliding_window_size": 4096, "rms_norm_eps": 1e-06}  # fmt: skip
    gemma3 = {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
              "cache_implementation": "hybrid", "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
              "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
              "sliding_window": 512, "sliding_window_pattern": 6}  # fmt: skip
    olmo2 = {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-06,
             "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False}  # fmt: skip
    assert not PHI3.architecture(SHAPE | phi3).tied
    rope = PHI3.architecture(SHAPE | phi4_mini).rope
    assert (rope.kind, rope.longest, rope.share) == ("longrope", 4096, 0.75)
    assert rope.magnitude == pytest.approx((17 / 12) ** 0.5)  # ln 32 / ln 4096 = 5 / 12
    assert GEMMA2.architecture(SHAPE | gemma2).tied
    full, local = (getattr(GEMMA3.architecture(SHAPE | gemma3), name) for name in ("rope", "local_rope"))
    assert (full, local) == (Rope(1e6, "default", {}), Rope(1e4, "default", {}))
    assert OLMO2.architecture(SHAPE | olmo2).rope.theta == 5e5
    assert not LLAMA.architecture(SHAPE | llama2).tied
    assert LLAMA.architecture(SHAPE | smollm).vocab_size == 49152
    assert LLAMA.architecture(SHAPE | llama32).rope.kind == "llama3"
    assert QWEN2.architecture(SHAPE | qwen25).tied
