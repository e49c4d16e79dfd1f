"""What a family of Hugging Face models is: its configuration's keys, and the names of its modules on both sides.

Nothing here needs a model, a process group or Megatron: the converters read the same tables as the loader.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlora.families.keys import ConfigKeys
from mlora.families.rope import Rope

WHOLE = "whole"


@dataclass(frozen=True)
class HfModule:
    """A module of Hugging Face's model, or the rows of one that belong to one part.

    Parts that name the same module lie one after the other in the rows of its weight, in the order of their table.

    Attributes:
        name: its path; ``{layer}`` (and other counters) stand for numbers.
        shape: of its weight, in names of :attr:`Architecture.sizes`; its bias, if it has one, has the first of them.
    """

    name: str
    shape: tuple[str, ...]


# Megatron module, with the same counters -> part -> the Hugging Face module that holds this part.
ModuleTable = Mapping[str, Mapping[str, HfModule]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model of a family: what its ``config.json`` says, in Megatron's words.

    Attributes:
        transformer: fields of Megatron's ``TransformerConfig`` that decide the mathematics.
        sizes: by the names that :class:`HfModule` uses.
        counts: how many modules a counter in a name numbers: ``{"layer": 32}``.
        biased: last parts of the Megatron modules whose Hugging Face modules have a bias.
        vocab_size: rows of the embedding.
        tied: the output layer uses the embedding's weight.
        pad_token: row of the embedding that gets no gradient where the others train; None for none.
        max_position_embeddings: longest sequence that the checkpoint was made for.
        rope: the rotary embedding.
        windows: of each layer, how many tokens a token sees, itself included; None for all that are before it.
        local_rope: the rotary embedding of layers with a window, if it is another.
        embedding_scale: factor of the embedding's output.
        attention_cap, logit_cap: c of attention scores and logits x that become c tanh(x / c); None to leave them.
    """

    transformer: Mapping[str, Any]
    sizes: Mapping[str, int]
    counts: Mapping[str, int]
    biased: frozenset[str]
    vocab_size: int
    tied: bool
    max_position_embeddings: int
    rope: Rope
    windows: tuple[int | None, ...]
    local_rope: Rope | None = None
    embedding_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    pad_token: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family of models.

    Attributes:
        model_type, architectures: as its ``config.json`` has them.
        defaults: what Hugging Face's class takes for a key that ``config.json`` has not.
        modules: Megatron's modules and Hugging Face's.
        read: makes an :class:`Architecture` of the keys.
        ignored: regular expressions for tensors of old checkpoints that are computed anew, not loaded.
    """

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    modules: ModuleTable
    read: Callable[[ConfigKeys], Architecture]
    ignored: tuple[str, ...] = field(default=(r".*\.rotary_emb\.inv_freq",))

    def architecture(self, config: Mapping[str, Any], source: str = "config.json") -> Architecture:
        """The model that a ``config.json`` describes.

        Raises:
            ValueError: a key is missing, or has a value that cannot be represented exactly; file, key and value are named.
        """
        keys = ConfigKeys(config, self.defaults, source)
        named = config.get("architectures") or []
        if not isinstance(named, list) or any(name not in self.architectures for name in named):
            raise keys.error("architectures", f"is not supported; it can be {' or '.join(self.architectures)}")
        architecture = self.read(keys)
        keys.check_all_seen()
        return architecture

    def hf_name(self, module: str, part: str = WHOLE) -> str:
        """The Hugging Face module that holds ``part`` of a Megatron module, both by their full paths.

        Raises:
            ValueError: the family has no such module.
        """
        parts, numbers = self._parts(module, part)
        return parts[part].name.format(**numbers)

    def rows(self, architecture: Architecture, module: str, part: str = WHOLE) -> tuple[int, int]:
        """(first, count) of the rows of ``part`` in the weight of its Hugging Face module, all of them if it is alone there.

        Raises:
            ValueError: the family has no such module.
        """
        parts, _ = self._parts(module, part)
        counts = {name: architecture.sizes[held.shape[0]] for name, held in parts.items()}
        together = [name for name, held in parts.items() if held.name == parts[part].name]
        return sum(counts[name] for name in together[: together.index(part)]), counts[part]

    def megatron_parts(self, hf_module: str) -> tuple[str, tuple[str, ...]]:
        """(Megatron module, its parts in order of their rows) of a Hugging Face module, by full paths: :meth:`hf_name`'s inverse.

        Raises:
            ValueError: the family has no such module.
        """
        for pattern, module, parts in self._by_hf_module:
            if found := pattern.fullmatch(hf_module):
                return module.format(**found.groupdict()), parts
        raise ValueError(f"{hf_module} is no module of the {self.model_type} family")

    def tensors(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor that a checkpoint of this model holds."""
        expected: dict[str, tuple[int, ...]] = {}
        for module, parts in self.modules.items():
            if architecture.tied and module == "output_layer":
                continue
            for generic, shape in _shapes(parts, architecture.sizes).items():
                for name in _numbered(generic, architecture.counts):
                    expected[f"{name}.weight"] = shape
                    if module.rpartition(".")[2] in architecture.biased:
                        expected[f"{name}.bias"] = shape[:1]
        return expected

    def _parts(self, module: str, part: str) -> tuple[Mapping[str, HfModule], Mapping[str, str]]:
        """(the table's entry, the numbers in the name) of a Megatron module."""
        for pattern, parts in self._by_module:
            if (found := pattern.fullmatch(module)) and part in parts:
                return parts, found.groupdict()
        raise ValueError(f"{module} ({part}) is no module of the {self.model_type} family")

    @cached_property
    def _by_module(self) -> list[tuple[re.Pattern[str], Mapping[str, HfModule]]]:
        return [(_pattern(module), parts) for module, parts in self.modules.items()]

    @cached_property
    def _by_hf_module(self) -> list[tuple[re.Pattern[str], str, tuple[str, ...]]]:
        return [
            (_pattern(name), module, tuple(part for part, held in parts.items() if held.name == name))
            for module, parts in self.modules.items()
            for name in dict.fromkeys(held.name for held in parts.values())
        ]


def _shapes(parts: Mapping[str, HfModule], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and weight's shape of each Hugging Face module among the parts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for held in parts.values():
        rows, *rest = (sizes[size] for size in held.shape)
        shapes[held.name] = (shapes.get(held.name, (0,))[0] + rows, *rest)
    return shapes


def _pattern(name: str) -> re.Pattern[str]:
    """``layers.{layer}.mlp`` as a regular expression in which each counter is a group."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(name)))


def _numbered(name: str, counts: Mapping[str, int]) -> Iterator[str]:
    """``name`` with each of its counters run through."""
    counter = re.search(r"\{(\w+)\}", name)
    if counter is None:
        yield name
        return
    for number in range(counts[counter.group(1)]):
        yield from _numbered(name.replace(counter.group(0), str(number)), counts)
