"""Reading a ``config.json`` so that no key which changes the mathematics goes unseen.

Each key belongs to one of these:

| key | what happens |
|---|---|
| taken by the family | checked and used |
| descriptive: :data:`DESCRIPTIVE`, or its name starts with ``_`` | ignored |
| neither, and its value is null, false, zero or empty | ignored: nothing is switched on |
| neither | an error that names it |

So a key that a later transformers adds is an error as soon as it does something, and never a silently different model.
"""

from collections.abc import Callable, Mapping
from typing import Any

# Tokens, generation, files, training recipes and outputs: the logits of given tokens do not depend on them.
DESCRIPTIVE = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "name_or_path", "task_specific_params",
    "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "id2label", "label2id", "num_labels", "finetuning_task", "problem_type", "language", "license", "tags",
    "use_cache", "cache_implementation", "use_return_dict", "return_dict", "output_attentions", "output_hidden_states",
    "return_dict_in_generate", "output_scores", "torchscript", "use_bfloat16", "initializer_range", "initializer_factor",
    "pretraining_tp", "gradient_checkpointing", "chunk_size_feed_forward", "max_length", "min_length", "max_new_tokens",
    "model_max_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "diversity_penalty", "encoder_no_repeat_ngram_size", "length_penalty",
    "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "exponential_decay_length_penalty", "remove_invalid_values", "is_decoder", "attn_implementation",
    "transformers.js_config", "unsloth_version", "unsloth_fixed", "base_model_tp_plan", "is_llama_config", "max_sequence_length",
    "keys_to_ignore_at_inference",
})  # fmt: skip


class ConfigKeys:
    """The values of a ``config.json``, and which of them were taken.

    Args:
        values: of the file.
        defaults: what the model class of Hugging Face takes for a key that the file has not.
        source: the file's path, for messages.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._defaults = defaults
        self._taken: set[str] = set()
        self.source = source

    def error(self, key: str, why: str) -> ValueError:
        """An error that names the file, the key and its value."""
        return ValueError(f"{self.source}: {key} = {self._values.get(key, self._defaults.get(key))!r} {why}")

    def take(self, key: str) -> Any:
        """The value of ``key``, or the model class's default.

        Raises:
            ValueError: the file lacks it, and a model of this family cannot be without it.
        """
        self._taken.add(key)
        if key not in self._values and key not in self._defaults:
            raise ValueError(f"{self.source}: {key} is missing")
        return self._values.get(key, self._defaults.get(key))

    def integer(self, key: str, *, otherwise: int | None = None) -> int:
        """A positive whole number; ``otherwise`` for null."""
        value = self.take(key)
        if value is None and otherwise is not None:
            return otherwise
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "is not a whole number of at least 1")
        return value

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, "is not a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or null."""
        return None if self.take(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.error(key, "is neither true nor false")
        return value

    def require(self, key: str, allowed: Callable[[Any], bool], why: str) -> None:
        """Refuse a value that is not ``allowed``, if the file or the model class has one."""
        self._taken.add(key)
        if (key in self._values or key in self._defaults) and not allowed(self.take(key)):
            raise self.error(key, why)

    def check_all_seen(self) -> None:
        """Raises ValueError for a key that may change the mathematics and that nothing has taken."""
        for key, value in self._values.items():
            if value and not (key in self._taken or key in DESCRIPTIVE or key.startswith("_")):
                raise self.error(
                    key,
                    "is not known for this family and may change its results; if it does not, remove it from the file",
                )
