"""Names: of adapters' parts, and Hugging Face's of a model's linears, by its family or, for a model of no family, by Llama's."""

from mlora.families import LLAMA, Family
from mlora.families.family import WHOLE

DEFAULT_ADAPTER = "default"
SHARED = "shared"  # in the place of a projection's name: of a lora_A that several have in common
# Last parts of Megatron's names of the input embedding and the output layer.
EMBEDDING, OUTPUT_LAYER = "word_embeddings", "output_layer"


def hf_module_name(module: str, part: str, family: Family | None = None) -> str:
    """The full Hugging Face path of ``part`` of the Megatron linear ``module`` (global layer numbers).

    Without a family it is Llama's name, also for a linear that stands elsewhere than in a GPTModel's layers, such as
    ``self_attention.linear_qkv``; a linear that Llama has not keeps Megatron's name.

    Raises:
        ValueError: ``family`` has no such module.
    """
    if family is not None:
        return family.hf_name(module, part)
    try:
        return LLAMA.hf_name(module, part)
    except ValueError:
        parent, _, leaf = module.rpartition(".")
        hf_leaf = _leaves().get((leaf, part), leaf if part == WHOLE else f"{leaf}.{part}")
        return f"{parent}.{hf_leaf}" if parent else hf_leaf


def _leaves() -> dict[tuple[str, str], str]:
    """(last part of Llama's Megatron module, part) -> last part of the Hugging Face module."""
    return {
        (module.rpartition(".")[2], part): hf_module.name.rpartition(".")[2]
        for module, parts in LLAMA.modules.items()
        for part, hf_module in parts.items()
    }
