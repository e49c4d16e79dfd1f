"""Programs that read PEFT directories, and whether one would do with a directory what PEFT does.

Whatever such a program would reject, or would ignore without a word, is a problem. The rules are in
:mod:`mlora.conversion.consumer_rules`; none of the programs runs here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mlora.conversion.consumer_rules import RULES
from mlora.conversion.faults import VLLM_RANKS
from mlora.conversion.peft_directory import PeftDirectory

CONSUMERS: Mapping[str, str] = {
    "peft": "Hugging Face PEFT",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "llamacpp": "llama.cpp's converter",
    "tgi": "text-generation-inference",
}
_VLLM_DEFAULT = 16  # of --max-lora-rank
_TRTLLM_DEFAULT = 64  # of max_lora_rank


@dataclass(frozen=True)
class Problem:
    """Why a consumer would not do what PEFT does.

    Attributes:
        rule: which rule is broken.
        where: the file, the field of ``adapter_config.json`` or the key that breaks it.
        why: what the consumer does with it.
    """

    rule: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.why}"


def check(directory: PeftDirectory, consumer: str) -> list[Problem]:
    """Everything that a consumer would reject or ignore; empty if it does what PEFT does.

    Raises:
        ValueError: there is no such consumer.
    """
    if consumer not in CONSUMERS:
        raise ValueError(f"there is no consumer {consumer!r}; there is {', '.join(CONSUMERS)}")
    return [
        Problem(rule.name, where, rule.why[consumer])
        for rule in RULES
        if consumer in rule.why
        for where in rule.find(directory)
    ]


def require(directory: PeftDirectory, consumer: str) -> None:
    """Raises ValueError, with the rules and where they are broken, if a consumer would not do what PEFT does."""
    found = check(directory, consumer)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{CONSUMERS[consumer]} cannot use it: {'; '.join(map(str, found[:3]))}{more}")


def advice(directory: PeftDirectory, consumer: str) -> str | None:
    """What a consumer must be told to take the directory, if anything."""
    rank = max(directory.ranks.values(), default=0)
    if consumer == "vllm" and rank > _VLLM_DEFAULT:
        return f"start it with --max-lora-rank {min(size for size in VLLM_RANKS if size >= rank)}"
    if consumer == "sglang":
        return f"its --max-lora-rank, if given, must be at least {rank}"
    if consumer == "trtllm" and rank > _TRTLLM_DEFAULT:
        return f"build with max_lora_rank {rank}; the default is {_TRTLLM_DEFAULT}"
    if consumer == "llamacpp" and not directory.config.get("base_model_name_or_path"):
        return "give it the base model with --base"
    return None
