"""What each consumer of PEFT directories does with what it does not know, one rule a row.

Read in the sources of PEFT 0.21, vLLM 0.33, SGLang 0.5.23 and text-generation-inference 3, and in older ones of TensorRT-LLM and
llama.cpp's ``convert_lora_to_gguf.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mlora.conversion import faults
from mlora.conversion.faults import Find

TRTLLM_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "gate",
)  # fmt: skip
# Fields that switch on what only PEFT does.
FEATURES = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
ALL = ("peft", "vllm", "sglang", "trtllm", "llamacpp", "tgi")
ENGINES = ALL[1:]


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        name: for messages.
        find: the files, fields and keys that break it.
        why: of each consumer that has it, what it does then.
    """

    name: str
    find: Find
    why: Mapping[str, str]


def _alike(consumers: tuple[str, ...], why: str) -> dict[str, str]:
    return dict.fromkeys(consumers, why)


_DEFAULT = "without it PEFT's default of 8 is taken, which is hardly what was trained"
_GLOBAL = "every module is scaled by lora_alpha / r"
_IGNORED = "it is ignored"

FILES = (
    Rule(
        "weights file",
        faults.no_weights,
        _alike(ALL, "it is the only file of weights that is looked for; shards are not"),
    ),
    Rule(
        "other weights",
        faults.other_weights,
        _alike(("sglang", "tgi"), "every .safetensors file in the directory is loaded"),
    ),
    Rule("added tokens", faults.added_tokens, {"sglang": "adapters that bring tokens of their own are rejected"}),
)
CONFIG = (
    Rule("peft_type", faults.missing_field("peft_type"), _alike(("peft", "sglang", "tgi"), "it is required")),
    Rule(
        "rank and alpha",
        faults.missing_field("r"),
        _alike(("vllm", "sglang", "trtllm"), "it is required") | _alike(("peft", "tgi"), _DEFAULT),
    ),
    Rule(
        "rank and alpha",
        faults.missing_field("lora_alpha"),
        _alike(("vllm", "sglang", "trtllm", "llamacpp"), "it is required") | _alike(("peft", "tgi"), _DEFAULT),
    ),
    Rule(
        "target_modules", faults.missing_field("target_modules"), _alike(("peft", "vllm", "sglang"), "it is required")
    ),
    Rule("method", faults.other_method, _alike(ALL, "the adapter is no LoRA")),
    Rule("regular expression", faults.expression, {"sglang": "target_modules must be a list of names"}),
    Rule(
        "rsLoRA",
        faults.field("use_rslora"),
        {"sglang": f"{_IGNORED}: {_GLOBAL}", "llamacpp": "it is ignored: scaling is lora_alpha over the tensor's rank"},
    ),
    Rule(
        "patterns",
        faults.field("rank_pattern"),
        {"sglang": f"{_IGNORED}: {_GLOBAL}", "tgi": f"{_IGNORED}: {_GLOBAL}"},
    ),
    Rule(
        "patterns",
        faults.field("alpha_pattern"),
        {
            "sglang": f"{_IGNORED}: {_GLOBAL}",
            "trtllm": f"{_IGNORED}: lora_alpha holds for every module",
            "llamacpp": f"{_IGNORED}: lora_alpha holds for every module",
            "tgi": f"{_IGNORED}: {_GLOBAL}",
        },
    ),
    Rule(
        "initialisation",
        faults.initialisation,
        {"peft": "the base weights are changed again when the adapter is loaded"}
        | _alike(ENGINES, "the adapter belongs to a base that its initialisation has changed, not to the original one"),
    ),
    Rule("initialisation", faults.unknown_initialisation, {"vllm": "this value is rejected"}),
    Rule("features", faults.field(*FEATURES), {"vllm": "it is rejected"} | _alike(ENGINES[1:], _IGNORED)),
)
FEATURE_KEYS = (
    Rule(
        "DoRA",
        faults.dora,
        {"vllm": "DoRA is rejected", "sglang": "DoRA is rejected", "llamacpp": "DoRA is an error", "tgi": _IGNORED},
    ),
    Rule(
        "bias",
        faults.bias,
        {
            "vllm": "it is rejected",
            "sglang": _IGNORED,
            "trtllm": "the key is an error",
            "llamacpp": "it is an error",
            "tgi": _IGNORED,
        },
    ),
    Rule("whole parameters", faults.whole("classifier", "score"), {"vllm": "modules_to_save is rejected"}),
    Rule(
        "whole parameters",
        faults.whole("embed_tokens", "lm_head"),
        {"sglang": _IGNORED, "trtllm": "the key is an error"},
    ),
    Rule("whole parameters", faults.whole("layernorm", "norm"), {"llamacpp": "it is an error"}),
    Rule("whole parameters", faults.whole(), {"tgi": _IGNORED}),
    Rule(
        "base weights", faults.base_weights, _alike(ENGINES, "a base weight beside the adapter is ignored or refused")
    ),
)
KEYS = (
    Rule("prefix", faults.no_prefix, _alike(ALL, "keys begin with base_model.model.; others are ignored or refused")),
    Rule(
        "form of keys",
        faults.unusual_key,
        _alike(ENGINES, "keys end in lora_A.weight or lora_B.weight, without an adapter's name"),
    ),
    Rule("pairs", faults.half, _alike(ALL, "its other factor is missing")),
    Rule("targets", faults.untargeted, {"peft": "adapter_config.json does not target it, so it is ignored"}),
    Rule(
        "targets", faults.untargeted_leaf, {"sglang": "target_modules does not name it, so there is no buffer for it"}
    ),
    Rule("modules", faults.unknown_module(TRTLLM_MODULES), {"trtllm": "the module is an error"}),
    Rule(
        "stacked projections",
        faults.not_stacked,
        {"sglang": "without it loading fails, or the others are not applied; zeros do"},
    ),
    Rule("layers", faults.some_layers, {"tgi": "a kind of module is dropped when a layer lacks it"}),
)
RANKS = (
    Rule(
        "rank",
        faults.other_rank,
        {"peft": "its shape does not fit the rank of adapter_config.json"}
        | _alike(("vllm", "sglang", "tgi"), "it is scaled by the rank of adapter_config.json, which is not its own"),
    ),
    Rule("stacked ranks", faults.ranks_stacked, {"sglang": "projections that are stacked must have one rank"}),
    Rule(
        "ranks of layers",
        faults.ranks_of_layers,
        {"tgi": "the layers' matrices are stacked, so they must have one rank"},
    ),
    Rule(
        "greatest rank", faults.large_rank, {"vllm": f"--max-lora-rank can be {', '.join(map(str, faults.VLLM_RANKS))}"}
    ),
)
EMBEDDINGS = (
    Rule("embeddings", faults.embeddings, {"trtllm": "the key is an error", "tgi": _IGNORED}),
    Rule("vocabulary", faults.other_vocabulary, {"vllm": "the embedding's term must be as wide as the vocabulary"}),
    Rule(
        "vocabulary",
        faults.large_vocabulary,
        {"vllm": f"an output layer of more than {faults.VLLM_VOCABULARY} rows cannot be adapted"},
    ),
    Rule(
        "tied output layer", faults.tied_output, {"llamacpp": "a tied output layer has no tensor of its own to adapt"}
    ),
)
EXPERTS = (
    Rule("experts", faults.each_expert, {"tgi": "experts cannot be adapted"}),
    Rule("experts", faults.expert_projections("w1", "w2", "w3"), {"trtllm": "experts' projections are w1, w2 and w3"}),
    Rule("DoRA", faults.with_experts(faults.dora), {"trtllm": "magnitudes of experts are ignored"}),
    Rule(
        "every expert",
        faults.expert_holes,
        {"peft": "experts are packed into one matrix, so none may be missing"}
        | _alike(("vllm", "llamacpp"), "experts are stacked, so all of them and all their projections must be there"),
    ),
    Rule(
        "ranks of experts",
        faults.ranks_of_experts,
        _alike(("peft", "vllm"), "a projection has one rank over all experts"),
    ),
    Rule(
        "scaling of experts",
        faults.scaling_of_targets,
        {"peft": "packing experts under transformers 5 doubles rank and alpha, which makes the scaling wrong"},
    ),
    Rule(
        "scaling of experts",
        faults.with_experts(faults.field("use_rslora")),
        {"vllm": "most releases ignore it for experts"},
    ),
    Rule(
        "packed experts",
        faults.packed,
        _alike(("sglang", "trtllm", "llamacpp", "tgi"), "packed experts are not understood"),
    ),
    Rule("packed experts", faults.half_packed, {"vllm": "gate_up_proj and down_proj must both be adapted"}),
)
RULES = (*FILES, *CONFIG, *FEATURE_KEYS, *KEYS, *RANKS, *EMBEDDINGS, *EXPERTS)
