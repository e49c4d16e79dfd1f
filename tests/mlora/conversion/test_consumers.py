"""Each rule of each consumer: a directory that breaks just this one, and one that breaks none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mlora.conversion.consumer_rules import RULES
from mlora.conversion.consumers import CONSUMERS, advice, check, require
from mlora.conversion.peft_directory import PeftDirectory
from mlora.pretrained import Pretrained
from tests.mlora.conversion.adapters import PREFIX, config_of, tensors_of
from tests.tiny import write_model

LAYERS, EXPERTS = 2, 3
LEAVES = {
    "self_attn.q_proj": (8, 6), "self_attn.k_proj": (4, 6), "self_attn.v_proj": (4, 6),
    "self_attn.o_proj": (6, 8), "mlp.gate_proj": (10, 6), "mlp.up_proj": (10, 6), "mlp.down_proj": (6, 10),
}  # fmt: skip
MODULES = {f"model.layers.{layer}.{leaf}": shape for layer in range(LAYERS) for leaf, shape in LEAVES.items()}
MOE = {
    f"model.layers.{layer}.mlp.experts.{expert}.{leaf}": shape
    for layer in range(LAYERS)
    for expert in range(EXPERTS)
    for leaf, shape in {"gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (6, 10)}.items()
}
MIXTRAL = {
    name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2"): s for name, s in MOE.items()
}
ENGINES = "vllm sglang trtllm llamacpp tgi"
ALL = f"peft {ENGINES}"
Q0, V1 = (f"{PREFIX}model.layers.{place}" for place in ("0.self_attn.q_proj", "1.self_attn.v_proj"))
EXPERT = f"{PREFIX}model.layers.0.mlp.experts"


class Directory:
    """A directory to be spoilt."""

    def __init__(self, modules: dict[str, tuple[int, int]], rank: int = 2) -> None:
        self.tensors = tensors_of(*((name, rank, *shape) for name, shape in modules.items()))
        leaves = sorted({name.rpartition(".")[2] for name in modules})
        self.config = config_of(r=rank, target_modules=leaves, base_model_name_or_path="some/model")
        self.files: list[str] = []

    def resize(self, module: str, rank: int) -> None:
        """Give a module another rank."""
        A, B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        self.tensors |= {A: torch.ones(rank, self.tensors[A].shape[1]), B: torch.ones(self.tensors[B].shape[0], rank)}

    def drop(self, *modules: str) -> None:
        """Remove modules."""
        self.tensors = {
            key: tensor
            for key, tensor in self.tensors.items()
            if not any(key.startswith(f"{name}.") for name in modules)
        }

    def rename(self, old: str, new: str) -> None:
        """Replace part of every key."""
        self.tensors = {key.replace(old, new): tensor for key, tensor in self.tensors.items()}

    def write(self, path: Path) -> Path:
        path.mkdir()
        save_file(self.tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(self.config))
        for name in self.files:
            if name.startswith("-"):
                (path / name[1:]).unlink()
            else:
                (path / name).touch()
        return path


def _lm_head(rows: int) -> Callable[[Directory], Any]:
    def change(d: Directory) -> None:
        d.tensors |= {
            f"{PREFIX}lm_head.lora_A.weight": torch.ones(2, 6),
            f"{PREFIX}lm_head.lora_B.weight": torch.ones(rows, 2),
        }
        d.config["target_modules"].append("lm_head")

    return change


def _embedding(width: int) -> Callable[[Directory], Any]:
    def change(d: Directory) -> None:
        name = f"{PREFIX}model.embed_tokens.lora_embedding_"
        d.tensors |= {f"{name}A": torch.ones(2, width), f"{name}B": torch.ones(6, 2)}
        d.config["target_modules"].append("embed_tokens")

    return change


def _packed(*names: str) -> Callable[[Directory], Any]:
    def change(d: Directory) -> None:
        for name in names:
            d.tensors |= {
                f"{EXPERT}{name}.lora_A.weight": torch.ones(6, 6),
                f"{EXPERT}{name}.lora_B.weight": torch.ones(20, 6),
            }
        d.config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    return change


# Rule, what breaks it, where that is, and the consumers that must say so; all others must not.
Case = tuple[str, Callable[[Directory], Any], str, str]
DENSE: list[Case] = [
    ("weights file", lambda d: d.files.append("-adapter_model.safetensors"), "adapter_model.safetensors", ALL),
    ("other weights", lambda d: d.files.append("model.safetensors"), "model.safetensors", "sglang tgi"),
    ("added tokens", lambda d: d.files.append("added_tokens.json"), "added_tokens.json", "sglang"),
    ("peft_type", lambda d: d.config.pop("peft_type"), "peft_type", "peft sglang tgi"),
    ("rank and alpha", lambda d: d.config.pop("r"), "r", "peft vllm sglang trtllm tgi"),
    ("rank and alpha", lambda d: d.config.pop("lora_alpha"), "lora_alpha", ALL),
    ("target_modules", lambda d: d.config.pop("target_modules"), "target_modules", "peft vllm sglang"),
    ("method", lambda d: d.config.update(peft_type="LOHA"), "peft_type", ALL),
    ("regular expression", lambda d: d.config.update(target_modules=r".*_proj"), "target_modules", "sglang"),
    ("rsLoRA", lambda d: d.config.update(use_rslora=True), "use_rslora", "sglang llamacpp"),
    ("patterns", lambda d: d.config.update(rank_pattern={"x": 2}), "rank_pattern", "sglang tgi"),
    ("patterns", lambda d: d.config.update(alpha_pattern={"q_proj": 1}), "alpha_pattern", "sglang trtllm llamacpp tgi"),
    ("initialisation", lambda d: d.config.update(init_lora_weights="pissa_niter_4"), "init_lora_weights", ALL),
    ("initialisation", lambda d: d.config.update(init_lora_weights="new"), "init_lora_weights", "vllm"),
    ("features", lambda d: d.config.update(alora_invocation_tokens=[1]), "alora_invocation_tokens", ENGINES),
    ("DoRA", lambda d: d.config.update(use_dora=True), "use_dora", "vllm sglang llamacpp tgi"),
    (
        "DoRA",
        lambda d: d.tensors.update({f"{Q0}.lora_magnitude_vector": torch.ones(8)}),
        f"{Q0}.lora_magnitude_vector",
        "vllm sglang llamacpp tgi",
    ),
    ("bias", lambda d: d.config.update(bias="all"), "bias", ENGINES),
    ("bias", lambda d: d.config.update(lora_bias=True), "lora_bias", ENGINES),
    ("bias", lambda d: d.tensors.update({f"{Q0}.base_layer.bias": torch.ones(8)}), f"{Q0}.base_layer.bias", ENGINES),
    (
        "whole parameters",
        lambda d: d.tensors.update({f"{PREFIX}lm_head.weight": torch.ones(9, 6)}),
        f"{PREFIX}lm_head.weight",
        "vllm llamacpp tgi",
    ),
    (
        "whole parameters",
        lambda d: d.tensors.update({f"{PREFIX}model.norm.weight": torch.ones(6)}),
        f"{PREFIX}model.norm.weight",
        "vllm sglang trtllm tgi",
    ),
    (
        "whole parameters",
        lambda d: d.tensors.update({f"{PREFIX}score.weight": torch.ones(6)}),
        f"{PREFIX}score.weight",
        "sglang trtllm llamacpp tgi",
    ),
    (
        "base weights",
        lambda d: d.tensors.update({f"{Q0}.base_layer.weight": torch.ones(8, 6)}),
        f"{Q0}.base_layer.weight",
        ENGINES,
    ),
    ("prefix", lambda d: d.tensors.update({"model.x.lora_A.weight": torch.ones(2, 6)}), "model.x.lora_A.weight", ALL),
    (
        "form of keys",
        lambda d: d.rename(".lora_A.weight", ".lora_A.default.weight"),
        f"{Q0}.lora_A.default.weight",
        ENGINES,
    ),
    (
        "form of keys",
        lambda d: d.rename("model.layers", "_orig_mod.model.layers"),
        f"{PREFIX}_orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
        ENGINES,
    ),
    ("pairs", lambda d: d.tensors.pop(f"{Q0}.lora_B.weight"), f"{Q0}.lora_A.weight", ALL),
    ("targets", lambda d: d.config["target_modules"].remove("q_proj"), Q0, "peft sglang"),
    ("targets", lambda d: d.config.update(layers_to_transform=[0]), V1, "peft"),
    ("modules", lambda d: d.rename("o_proj", "dense"), f"{PREFIX}model.layers.0.self_attn.dense", "trtllm"),
    ("stacked projections", lambda d: d.drop(V1), V1, "sglang"),
    ("stacked projections", lambda d: d.drop(Q0), Q0, "sglang"),
    (
        "stacked projections",
        lambda d: d.drop(f"{PREFIX}model.layers.0.mlp.gate_proj"),
        f"{PREFIX}model.layers.0.mlp.gate_proj",
        "sglang",
    ),
    ("layers", lambda d: d.drop(f"{PREFIX}model.layers.0.self_attn.o_proj"), "o_proj", "tgi"),
    ("rank", lambda d: d.resize(Q0, 3), Q0, "peft vllm sglang tgi"),
    ("stacked ranks", lambda d: d.resize(Q0, 3), f"{PREFIX}model.layers.0.self_attn.q_proj/k_proj/v_proj", "sglang"),
    ("ranks of layers", lambda d: d.resize(Q0, 3), "q_proj", "tgi"),
    ("greatest rank", lambda d: d.resize(Q0, 513), Q0, "vllm"),
    ("embeddings", _embedding(9), f"{PREFIX}model.embed_tokens.lora_embedding_A", "trtllm tgi"),
    ("vocabulary", _lm_head(258_049), f"{PREFIX}lm_head.lora_B.weight", "vllm"),
]
EXPERT_CASES: list[Case] = [
    ("experts", lambda d: None, EXPERT, "tgi"),
    ("experts", lambda d: None, f"{EXPERT}.*.up_proj", "trtllm"),
    ("DoRA", lambda d: d.config.update(use_dora=True), "use_dora", ENGINES),
    ("every expert", lambda d: d.drop(f"{EXPERT}.1.up_proj"), f"{EXPERT}.1.up_proj", "peft vllm llamacpp"),
    (
        "every expert",
        lambda d: d.drop(*(f"{EXPERT}.{n}.down_proj" for n in range(EXPERTS))),
        f"{EXPERT}.2.down_proj",
        "peft vllm llamacpp",
    ),
    ("ranks of experts", lambda d: d.resize(f"{EXPERT}.2.down_proj", 3), f"{EXPERT}.*.down_proj", "peft vllm"),
    ("scaling of experts", lambda d: d.config.update(use_rslora=True), "use_rslora", "peft vllm"),
    ("scaling of experts", lambda d: d.config.update(alpha_pattern={"up_proj": 1}), "alpha_pattern", "peft"),
    ("packed experts", _packed("", ".base_layer"), EXPERT, "sglang trtllm llamacpp tgi"),
    ("packed experts", _packed(".base_layer"), EXPERT, "vllm"),
    ("packed experts", _packed(""), f"{EXPERT}.base_layer", "vllm"),
    ("modules", lambda d: d.rename("down_proj", "other"), f"{EXPERT}.0.other", "trtllm"),
]


def _told(path: Path, rule: str, where: str, **facts: Any) -> set[str]:
    """The consumers that say that the rule is broken there."""
    directory = PeftDirectory.open(path, **facts)
    return {name for name in CONSUMERS if any((p.rule, p.where) == (rule, where) for p in check(directory, name))}


@pytest.mark.parametrize("number", range(len(DENSE)), ids=lambda number: f"{number}-{DENSE[number][0]}")
def test_dense(tmp_path: Path, number: int) -> None:
    rule, change, where, consumers = DENSE[number]
    directory = Directory(MODULES)
    change(directory)
    assert _told(directory.write(tmp_path / "a"), rule, where) == set(consumers.split())


@pytest.mark.parametrize("number", range(len(EXPERT_CASES)), ids=lambda number: f"{number}-{EXPERT_CASES[number][0]}")
def test_experts(tmp_path: Path, number: int) -> None:
    rule, change, where, consumers = EXPERT_CASES[number]
    directory = Directory(MOE)
    change(directory)
    assert _told(directory.write(tmp_path / "a"), rule, where) == set(consumers.split())


def test_every_rule_is_tested() -> None:
    tested = {(case[0], consumer) for case in (*DENSE, *EXPERT_CASES) for consumer in case[3].split()}
    told = {(rule.name, consumer) for rule in RULES for consumer in rule.why}
    assert told - tested == {("tied output layer", "llamacpp")}
    assert {consumer for rule in RULES for consumer in rule.why} == set(CONSUMERS)


@pytest.mark.parametrize(
    ("modules", "but"),
    [(MODULES, set()), (MOE, {"tgi", "trtllm"}), (MIXTRAL, {"tgi"}), (MODULES | MIXTRAL, {"tgi"})],
    ids=["dense", "experts", "mixtral", "both"],
)
def test_a_sound_directory_has_no_problems(tmp_path: Path, modules: dict[str, tuple[int, int]], but: set[str]) -> None:
    directory = PeftDirectory.open(Directory(modules).write(tmp_path / "a"), layer_count=LAYERS)
    assert {name: check(directory, name) for name in CONSUMERS if name not in but} == {
        name: [] for name in CONSUMERS if name not in but
    }


def test_what_the_base_tells(tmp_path: Path) -> None:
    """The vocabulary, the number of layers, and whether the output layer is the embedding."""
    base = Pretrained.open(write_model(tmp_path / "base", "llama-tied"))
    directory = Directory(MODULES)
    _lm_head(101)(directory)
    _embedding(100)(directory)
    path = directory.write(tmp_path / "a")
    assert _told(path, "tied output layer", f"{PREFIX}lm_head", base=base) == {"llamacpp"}
    assert _told(path, "tied output layer", f"{PREFIX}lm_head") == set()
    assert _told(path, "vocabulary", f"{PREFIX}model.embed_tokens.lora_embedding_A", base=base) == {"vllm"}
    assert _told(path, "vocabulary", f"{PREFIX}model.embed_tokens.lora_embedding_A") == set()
    assert _told(path, "layers", "q_proj", base=base) == {"tgi"}  # It has four.
    assert _told(path, "layers", "q_proj") == _told(path, "layers", "q_proj", layer_count=LAYERS) == set()


def test_scalings_of_experts_may_be_said_for_what_they_become(tmp_path: Path) -> None:
    directory = Directory(MOE)
    packed = r".*\.experts\.gate_up_proj"
    directory.config |= {"rank_pattern": {packed: 4}, "alpha_pattern": {packed: 8}}
    directory.config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert check(PeftDirectory.open(directory.write(tmp_path / "a")), "peft") == []


def test_the_error_names_rules_and_keys(tmp_path: Path) -> None:
    directory = Directory(MODULES)
    directory.config |= {"use_rslora": True, "alpha_pattern": {"q_proj": 1}, "bias": "all", "lora_bias": True}
    opened = PeftDirectory.open(directory.write(tmp_path / "a"))
    with pytest.raises(
        ValueError,
        match=r"^SGLang cannot use it: rsLoRA: use_rslora: it is ignored.*; patterns: alpha_pattern: .*; bias: bias: .*; and 1",
    ):
        require(opened, "sglang")
    with pytest.raises(ValueError, match=r"there is no consumer 'vlm'; there is peft, vllm"):
        check(opened, "vlm")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        PeftDirectory.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("rank", "vllm", "trtllm"),
    [
        (2, None, None),
        (16, None, None),
        (17, "--max-lora-rank 32", None),
        (65, "--max-lora-rank 128", "max_lora_rank 65"),
    ],
)
def test_what_a_consumer_must_be_told(tmp_path: Path, rank: int, vllm: str | None, trtllm: str | None) -> None:
    opened = PeftDirectory.open(Directory(MODULES, rank).write(tmp_path / "a"))
    for name, words in (("vllm", vllm), ("trtllm", trtllm)):
        found = advice(opened, name)
        assert (found is None) if words is None else (found is not None and words in found)
    assert f"at least {rank}" in str(advice(opened, "sglang"))
    assert advice(opened, "llamacpp") is advice(opened, "peft") is None


def test_llama_cpp_needs_to_know_the_base(tmp_path: Path) -> None:
    directory = Directory(MODULES)
    del directory.config["base_model_name_or_path"]
    assert "--base" in str(advice(PeftDirectory.open(directory.write(tmp_path / "a")), "llamacpp"))
