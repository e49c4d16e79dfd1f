"""A configuration of LoRA as PEFT or verl writes it: which of its fields are ours, which say nothing, and which are refused."""

import difflib
from collections.abc import Mapping
from typing import Any

# PEFT's fields that mlora has no use for -> the values under which they change nothing. Another value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "enable_lora": (None,),  # PEFT before 0.3
    "ensure_weight_tying": (False, None),
    "eva_config": (None,),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "merge_weights": (False, None),  # PEFT before 0.3
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# PEFT's fields that describe the file and not the mathematics.
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# verl's words for the rank, which is taken for "r", and for an adapter to load, which no configuration can do.
_RANK_OF_VERL, _PATH_OF_VERL = "lora_rank", "lora_adapter_path"
# What other libraries call the rank; no spelling of theirs is near enough to "r" to be found by likeness.
_RANK_NAMES = {"rank", "lora_r", "lora_dim"}


def own_fields(values: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Those of the values that are fields of ours; verl's ``lora_rank`` may stand for ``r``.

    Args:
        values: of PEFT's, verl's or our JSON.
        known: names of our fields.

    Raises:
        ValueError: a key that nobody knows (with the nearest that exists), or a feature that mlora lacks.
    """
    values = _in_pefts_words(values)
    if values.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type is {values['peft_type']!r}; only LORA is supported")
    for key, value in values.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise ValueError(f"{key} = {value!r} is not supported; it must be {_NEUTRAL[key][0]!r}")
        if key not in known | _DESCRIPTIVE | _NEUTRAL.keys():
            raise ValueError(f"unknown field {key!r}{_near(key, known)}")
    of_peft = "peft_type" in values  # whose default for target_modules is null; ours is "all-linear"
    if values.get("target_modules", None if of_peft else "all-linear") is None:
        raise ValueError(
            "target_modules is null, by which PEFT means a choice that depends on the architecture; name the modules, or "
            'write "all-linear"'
        )
    return {key: value for key, value in values.items() if key in known}


def _in_pefts_words(values: Mapping[str, Any]) -> dict[str, Any]:
    """verl's values under PEFT's names."""
    plain = dict(values)
    if path := plain.pop(_PATH_OF_VERL, None):
        raise ValueError(
            f"{_PATH_OF_VERL} = {path!r} is no field but an adapter to load: use mlora.verl.attach or mlora.load_adapter"
        )
    rank = plain.pop(_RANK_OF_VERL, None)
    if rank is not None and plain.setdefault("r", rank) != rank:
        raise ValueError(f"r is {plain['r']!r} and {_RANK_OF_VERL} is {rank!r}; they are the same: give one of them")
    return plain


def _near(key: str, known: set[str]) -> str:
    names = [*known, *_NEUTRAL, *_DESCRIPTIVE, _RANK_OF_VERL, _PATH_OF_VERL]
    nearest = ["r"] if key in _RANK_NAMES else difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; the fields are {', '.join(sorted(known))}"
