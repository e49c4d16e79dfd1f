"""Where a PEFT directory has something that one or the other of its readers stumbles over.

Each function yields the names of the files, the fields of ``adapter_config.json`` or the keys.
"""

import re
from collections.abc import Callable, Collection, Iterator

from mlora.conversion.peft import PREFIX, WEIGHTS_FILE
from mlora.conversion.peft_config import MUTATING
from mlora.conversion.peft_directory import PeftDirectory
from mlora.conversion.sglang import STACKED, stacked_with

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
VLLM_VOCABULARY = 258_048  # greatest of a model whose output layer has a term
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of init_lora_weights, besides true and false
_EXPERT_PROJECTIONS = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
_USUAL = re.compile(
    r"base_model\.model\.(?!module\.)(?:(?!_orig_mod\.)[^.]+\.)+?(lora_[AB]\.weight|lora_embedding_[AB])"
)

Find = Callable[[PeftDirectory], Iterator[str]]


def is_on(directory: PeftDirectory, field: str) -> bool:
    return directory.config.get(field) not in (None, False, "", 0, [], {})


def missing_field(field: str) -> Find:
    def find(directory: PeftDirectory) -> Iterator[str]:
        if directory.config.get(field) is None:
            yield field

    return find


def field(*fields: str) -> Find:
    """Fields that are on."""

    def find(directory: PeftDirectory) -> Iterator[str]:
        yield from (field for field in fields if is_on(directory, field))

    return find


def no_weights(directory: PeftDirectory) -> Iterator[str]:
    if WEIGHTS_FILE not in directory.files:
        yield WEIGHTS_FILE


def other_weights(directory: PeftDirectory) -> Iterator[str]:
    yield from sorted(name for name in directory.files if name.endswith(".safetensors") and name != WEIGHTS_FILE)


def added_tokens(directory: PeftDirectory) -> Iterator[str]:
    if "added_tokens.json" in directory.files:
        yield "added_tokens.json"


def other_method(directory: PeftDirectory) -> Iterator[str]:
    if directory.config.get("peft_type") not in (None, "LORA"):
        yield "peft_type"


def expression(directory: PeftDirectory) -> Iterator[str]:
    targets = directory.config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        yield "target_modules"


def initialisation(directory: PeftDirectory) -> Iterator[str]:
    init = directory.config.get("init_lora_weights")
    if isinstance(init, str) and MUTATING.match(init.lower()):
        yield "init_lora_weights"


def unknown_initialisation(directory: PeftDirectory) -> Iterator[str]:
    init = directory.config.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in VLLM_INITS:
        yield "init_lora_weights"


def bias(directory: PeftDirectory) -> Iterator[str]:
    if directory.config.get("bias", "none") != "none":
        yield "bias"
    yield from field("lora_bias")(directory)
    yield from sorted(key for key in directory.shapes if key.endswith(".bias"))


def dora(directory: PeftDirectory) -> Iterator[str]:
    yield from field("use_dora")(directory)
    yield from sorted(key for key in directory.shapes if ".lora_magnitude_vector" in key)


def whole(*read: str) -> Find:
    """Whole parameters of modules that are none of ``read``."""

    def find(directory: PeftDirectory) -> Iterator[str]:
        for key in directory.whole_parameters():
            module, _, leaf = key.rpartition(".")
            if leaf != "bias" and not module.endswith(read):
                yield key

    return find


def no_prefix(directory: PeftDirectory) -> Iterator[str]:
    yield from sorted(key for key in directory.shapes if not key.startswith(PREFIX))


def unusual_key(directory: PeftDirectory) -> Iterator[str]:
    for key in sorted(directory.shapes):
        if ".lora_" in key and ".lora_magnitude_vector" not in key and not _USUAL.fullmatch(key):
            yield key


def half(directory: PeftDirectory) -> Iterator[str]:
    for module, slots in directory.modules.items():
        for slot in slots:
            other = slot.replace("_A", "_B") if "_A" in slot else slot.replace("_B", "_A")
            if other not in slots:
                yield f"{PREFIX}{module}.{slot}"


def untargeted(directory: PeftDirectory) -> Iterator[str]:
    yield from (PREFIX + module for module in directory.modules if not directory.is_targeted(module))


def untargeted_leaf(directory: PeftDirectory) -> Iterator[str]:
    targets = directory.config.get("target_modules") or ()
    if isinstance(targets, str):
        return
    leaves = {str(target).rpartition(".")[2] for target in targets}
    yield from (PREFIX + module for module in directory.modules if module.rpartition(".")[2] not in leaves)


def other_rank(directory: PeftDirectory) -> Iterator[str]:
    """Terms whose rank is not the configuration's."""
    for module, rank in directory.ranks.items():
        if directory.parsed is not None and directory.parsed.rank(module) != rank:
            yield f"{PREFIX}{module}"


def base_weights(directory: PeftDirectory) -> Iterator[str]:
    yield from sorted(key for key in directory.shapes if key.endswith(".base_layer.weight"))


def not_stacked(directory: PeftDirectory) -> Iterator[str]:
    yield from sorted(f"{PREFIX}{module}" for module in stacked_with(directory.modules) - directory.modules.keys())


def ranks_stacked(directory: PeftDirectory) -> Iterator[str]:
    groups: dict[tuple[str, tuple[str, ...]], set[int]] = {}
    for module, rank in directory.ranks.items():
        parent, _, leaf = module.rpartition(".")
        for stacked in STACKED:
            if leaf in stacked:
                groups.setdefault((parent, stacked), set()).add(rank)
    for (parent, stacked), ranks in groups.items():
        if len(ranks) > 1:
            yield f"{PREFIX}{parent}.{'/'.join(stacked)}"


def ranks_of_layers(directory: PeftDirectory) -> Iterator[str]:
    found: dict[str, set[int]] = {}
    for module, rank in directory.ranks.items():
        found.setdefault(module.rpartition(".")[2], set()).add(rank)
    yield from sorted(leaf for leaf, ranks in found.items() if len(ranks) > 1)


def some_layers(directory: PeftDirectory) -> Iterator[str]:
    leaves = {module.rpartition(".")[2] for module in directory.modules}
    layers = {leaf: directory.layers_of(leaf) for leaf in leaves}
    count = directory.layer_count or 1 + max((layer for found in layers.values() for layer in found), default=-1)
    yield from sorted(leaf for leaf, found in layers.items() if found and len(found) < count)


def large_rank(directory: PeftDirectory) -> Iterator[str]:
    yield from (PREFIX + module for module, rank in directory.ranks.items() if rank > VLLM_RANKS[-1])


def embeddings(directory: PeftDirectory) -> Iterator[str]:
    yield from sorted(key for key in directory.shapes if ".lora_embedding_" in key)


def other_vocabulary(directory: PeftDirectory) -> Iterator[str]:
    for module, slots in directory.modules.items():
        width = slots.get("lora_embedding_A", (0, directory.vocabulary))[1]
        if directory.vocabulary is not None and width != directory.vocabulary:
            yield f"{PREFIX}{module}.lora_embedding_A"


def large_vocabulary(directory: PeftDirectory) -> Iterator[str]:
    for module, slots in directory.modules.items():
        if module.rpartition(".")[2] == "lm_head" and slots.get("lora_B.weight", (0,))[0] > VLLM_VOCABULARY:
            yield f"{PREFIX}{module}.lora_B.weight"


def tied_output(directory: PeftDirectory) -> Iterator[str]:
    if directory.tied:
        yield from (PREFIX + module for module in directory.modules if module.rpartition(".")[2] == "lm_head")


def unknown_module(known: Collection[str]) -> Find:
    def find(directory: PeftDirectory) -> Iterator[str]:
        yield from (PREFIX + module for module in directory.modules if module.rpartition(".")[2] not in known)

    return find


def packed(directory: PeftDirectory) -> Iterator[str]:
    yield from (PREFIX + module for module in directory.modules if directory.is_packed(module))


def half_packed(directory: PeftDirectory) -> Iterator[str]:
    for module in filter(directory.is_packed, directory.modules):
        experts = module.removesuffix(".base_layer")
        for other in (experts, f"{experts}.base_layer"):
            if other not in directory.modules:
                yield PREFIX + other


def expert_holes(directory: PeftDirectory) -> Iterator[str]:
    """Experts, or projections of them, that have no terms although others have."""
    for path, projections in directory.experts.items():
        count = 1 + max(max(numbers) for numbers in projections.values())
        wanted = next((kind for kind in _EXPERT_PROJECTIONS if kind >= projections.keys()), projections.keys())
        for leaf in sorted(wanted):
            missing = [number for number in range(count) if number not in projections.get(leaf, {})]
            yield from (f"{PREFIX}{path}.{number}.{leaf}" for number in missing)


def ranks_of_experts(directory: PeftDirectory) -> Iterator[str]:
    for path, projections in directory.experts.items():
        for leaf, modules in projections.items():
            if len({directory.ranks.get(module) for module in modules.values()}) > 1:
                yield f"{PREFIX}{path}.*.{leaf}"


def scaling_of_targets(directory: PeftDirectory) -> Iterator[str]:
    """What makes scalings of experts that are given as modules; given as parameters, they are said as they will be."""
    if directory.experts and not is_on(directory, "target_parameters"):
        yield from field("use_rslora", "rank_pattern", "alpha_pattern")(directory)


def with_experts(find: Find) -> Find:
    return lambda directory: find(directory) if directory.experts else iter(())


def each_expert(directory: PeftDirectory) -> Iterator[str]:
    yield from (f"{PREFIX}{path}" for path in directory.experts)


def expert_projections(*known: str) -> Find:
    """Projections of experts by other names."""

    def find(directory: PeftDirectory) -> Iterator[str]:
        for path, projections in directory.experts.items():
            yield from (f"{PREFIX}{path}.*.{leaf}" for leaf in projections if leaf not in known)

    return find
