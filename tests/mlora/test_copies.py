"""Modules that train whole, and the low-rank terms of the model's ends: checkpoints, PEFT in both directions, switching."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

import mlora
from mlora import LoraConfig
from mlora.checkpoint import Training, load_checkpoint, save_checkpoint
from mlora.conversion import open_adapter
from mlora.conversion.importing import plan_import
from mlora.conversion.merge import merge
from mlora.conversion.native_writer import write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.copies import copied_modules, matches_saved
from mlora.export import export_peft
from mlora.imported import load_import
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.sft.feed import Feed
from mlora.train import OptimizerSettings, Trainer
from parallel.reader import Reader
from parallel.sizes import ParallelSizes
from tests.peft_oracle import exported_logits
from tests.ranks import run_ranks
from tests.tiny import VOCAB, hf_logits, tokens, write_model
from tests.training import LENGTH, SETTINGS, Case, adapt, plan, rows

STOP, END = 2, 4
SHAPE = {"r": 3, "lora_alpha": 6}
CASES = {
    "saved": Case(lora=LoraConfig(**SHAPE, modules_to_save=["embed_tokens", "lm_head", "model.norm"])),
    "adapted": Case(lora=LoraConfig(**SHAPE, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "both": Case(lora=LoraConfig(**SHAPE, target_modules=["v_proj", "lm_head"], modules_to_save=["embed_tokens"])),
    "tied": Case(kind="llama-tied", lora=LoraConfig(**SHAPE, target_modules=["q_proj", "embed_tokens"])),
    # The output layer keeps the base's weight.
    "tied whole": Case(
        kind="llama-tied", lora=LoraConfig(**SHAPE, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    ),
}
WHOLE = {
    "saved": {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"},
    "adapted": set(),
    "both": {"model.embed_tokens.weight"},
    "tied": set(),
    "tied whole": {"model.embed_tokens.weight"},
}
# (world, how it is divided); padding lies on the second tensor-parallel rank, which at TP 2 holds nothing else.
WORLDS = {
    "TP1": (1, ParallelSizes()),
    "TP2+SP": (2, ParallelSizes(tensor=2, sequence_parallel=True)),
    "TP2xPP2": (4, ParallelSizes(tensor=2, pipeline=2)),
    "DP2": (2, ParallelSizes()),
}
Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in ("llama", "llama-tied")}


def _train(
    rank: int, models: Models, sizes: ParallelSizes, folder: Path, resumed: Path | None
) -> dict[str, tuple[list[float], torch.Tensor]]:
    """Each case: to the end with a checkpoint on the way, or from such a checkpoint on; losses, and logits at the end."""
    found = {}
    for name, case in CASES.items():
        chunks = adapt(models[case.kind], case, sizes)
        trainer, data = Trainer(chunks, OptimizerSettings(**SETTINGS)), rows(False)
        training = Training(trainer.optimizer, trainer.scheduler, {})
        feed = Feed(
            data,
            micro_batch_size=2,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            device=torch.device("cpu"),
            packed=False,
        )
        if resumed is not None:
            load_checkpoint(resumed / name / f"iter_{STOP:07d}", chunks, training=training)
        losses = []
        for iteration in range(STOP if resumed else 0, END):
            losses.append(trainer.step(feed.batch(plan(data).rows(iteration)), iteration).loss)
            if iteration + 1 in (STOP, END):
                base = {"path": str(models[case.kind])}
                save_checkpoint(folder / name, chunks, iteration=iteration + 1, training=training, base=base)
        found[name] = losses[-(END - STOP) :], whole_logits(chunks, tokens(length=LENGTH), VOCAB)
    return found


@pytest.fixture(scope="module")
def trained(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path | None], Any]:
    """(world, where its start lies) -> (folder, what rank 0 found); each is made once."""

    @functools.cache
    def run(world: str, resumed: Path | None = None) -> Any:
        (size, sizes), folder = WORLDS[world], tmp_path_factory.mktemp("run")
        return folder, run_ranks(size, _train, models, sizes, folder, resumed, sizes=sizes)[0]

    return run


def content(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    with Reader(checkpoint) as reader:
        return {key: reader.tensor(key) for key in reader.tensors(prefix)}


@pytest.mark.parametrize(
    ("first", "then"), [("TP1", "TP2+SP"), ("TP2+SP", "TP2xPP2"), ("TP2xPP2", "TP1"), ("TP1", "DP2")]
)
def test_training_goes_on_at_any_layout(trained: Any, first: str, then: str) -> None:
    whole, ours = trained(first)
    folder, theirs = trained(then, whole)
    for name in CASES:
        (losses, logits), (other_losses, other_logits) = ours[name], theirs[name]
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert (other_logits - logits).abs().max() < 1e-4 * logits.abs().max()
        start, end, again = (
            content(place / name / f"iter_{step:07d}") for place, step in ((whole, STOP), (whole, END), (folder, END))
        )
        assert end.keys() == again.keys()  # optimizer state among them
        for key, value in end.items():
            assert value.shape == again[key].shape
            assert (value - again[key]).norm() <= 1e-3 * (value - start[key]).norm(), key
        assert all(VOCAB in value.shape for key, value in end.items() if "embedding" in key and "lora_B" not in key)


@pytest.mark.parametrize("world", ["TP1", "TP2+SP", "TP2xPP2"])
@pytest.mark.parametrize("name", CASES)
def test_peft_gives_our_logits(trained: Any, models: Models, tmp_path: Path, world: str, name: str) -> None:
    folder, found = trained(world)
    checkpoint, model = folder / name / f"iter_{END:07d}", models[CASES[name].kind]
    state = open_adapter(checkpoint)
    assert set(state.full) == WHOLE[name]
    write_peft(peft_adapter(state, "peft"), tmp_path / "peft")
    logits = exported_logits(model, tmp_path / "peft")
    ours = found[name][1]
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
    assert (ours - hf_logits(model, tokens(length=LENGTH))).abs().max() > 0.05
    _check_import(tmp_path, checkpoint, model)
    merge(model, [(state, 1.0)], tmp_path / "merged")
    merged = hf_logits(tmp_path / "merged", tokens(length=LENGTH))
    assert (ours - merged).abs().max() < 1e-5 * logits.abs().max()


def _check_import(folder: Path, checkpoint: Path, model: Path) -> None:
    """The exported directory is imported, and exported again, bit for bit."""
    write_import(plan_import(open_adapter(folder / "peft"), Pretrained.open(model)), folder / "native")
    ours, theirs = content(checkpoint, "adapter."), content(folder / "native", "adapter.")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    write_peft(peft_adapter(open_adapter(folder / "native"), "peft"), folder / "again")
    once, again = (load_file(folder / place / "adapter_model.safetensors") for place in ("peft", "again"))
    assert once.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in once.items())


def _load(rank: int, model: Path, adapter: Path, sizes: ParallelSizes) -> torch.Tensor:
    base = Pretrained.open(model)
    found = plan_import(open_adapter(adapter), base)
    chunks = mlora.apply(build_model(base, sizes), found.config, family=base.family)
    load_import(found, chunks)
    return whole_logits(chunks, tokens(length=LENGTH), VOCAB)


@pytest.mark.parametrize("world", ["TP2+SP", "TP2xPP2"])
def test_what_peft_saved_trains_on(models: Models, tmp_path: Path, world: str) -> None:
    """PEFT writes the base weight of targeted embeddings along."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32, attn_implementation="eager")
    config = PeftConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        modules_to_save=["input_layernorm"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(base, config).eval()
    for key, parameter in theirs.named_parameters():
        if "modules_to_save" in key:
            parameter.data.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "peft")
    assert any("base_layer.weight" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    with torch.no_grad():
        logits = theirs(tokens(length=LENGTH)).logits
    size, sizes = WORLDS[world]
    ours = run_ranks(size, _load, models["llama"], tmp_path / "peft", sizes, sizes=sizes)[0]
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    changed = load_file(weights)
    changed["base_model.model.lm_head.base_layer.weight"][0] += 1
    save_file(changed, weights)
    with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight is not the base's own"):
        plan_import(open_adapter(tmp_path / "peft"), Pretrained.open(models["llama"]))


def _switch(rank: int, model: Path, sizes: ParallelSizes) -> dict[str, torch.Tensor]:
    base = Pretrained.open(model)
    chunks = build_model(base, sizes)
    found = {}

    def note(name: str) -> None:
        found[name] = whole_logits(chunks, tokens(length=LENGTH), VOCAB)

    keys = [set(chunk.state_dict()) for chunk in chunks]
    note("base")
    mlora.apply(chunks, CASES["saved"].lora, family=base.family)
    assert keys == [set(chunk.state_dict()) for chunk in chunks]
    note("fresh")
    mlora.apply(chunks, LoraConfig(**SHAPE, modules_to_save=["lm_head"]), "second", family=base.family)
    mlora.apply(chunks, CASES["adapted"].lora, "third", family=base.family)
    with torch.no_grad():
        for number, (_, bank) in enumerate(copied_modules(chunks)):
            for copy in bank.adapters.values():
                copy.mul_(1.5 + number)
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if ".third." in name and "embedding" in name:
                    parameter.add_(0.1)
    note("first")
    with mlora.disable_adapter(chunks):
        note("off")
    mlora.set_adapter(chunks, "second")
    note("second")
    assert sorted(
        {name for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad and "copies" in name}
    ) in (
        ["output_layer.copies.adapters.second"],
        [],
    )
    mlora.set_adapter(chunks, "third")
    note("third")
    mlora.merge_adapter(chunks, "third")
    note("merged")
    mlora.unmerge_adapter(chunks)
    with mlora.disable_adapter(chunks):
        note("unmerged")
    with pytest.raises(ValueError, match=r"adapter 'second' trains lm_head whole: put it on with set_adapter"):
        mlora.merge_adapter(chunks, "second")
    mlora.set_adapter(chunks, "default")
    note("again")
    return found


@pytest.mark.parametrize("world", ["TP1", "TP2+SP", "TP2xPP2"])
def test_each_adapter_has_its_own(models: Models, world: str) -> None:
    size, sizes = WORLDS[world]
    found = run_ranks(size, _switch, models["llama"], sizes, sizes=sizes)[0]
    for same, other in (("base", "fresh"), ("base", "off"), ("base", "unmerged"), ("first", "again")):
        # The CPU's products round by where in memory their operands lie.
        assert (found[same] - found[other]).abs().max() < 1e-5 * found[same].abs().max(), (same, other)
    assert (found["third"] - found["merged"]).abs().max() < 1e-5 * found["third"].abs().max()
    different = [found[name] for name in ("base", "first", "second", "third")]
    for number, logits in enumerate(different):
        assert all((logits - other).abs().max() > 0.01 for other in different[:number])


# What is refused -> (kind, configuration, words of the error).
REFUSED = {
    "a linear": ("llama", {"modules_to_save": ["q_proj"]}, r"q_proj.*only the embedding, the output layer and norms"),
    "a block": ("llama", {"modules_to_save": ["mlp"]}, r"modules_to_save: 'mlp' matches no module on any stage"),
    "tied": ("llama-tied", {"modules_to_save": ["lm_head"]}, "lm_head.*it is tied to the embedding, of which"),
    "a tied output layer": ("llama-tied", {"target_modules": ["lm_head"]}, "lm_head is tied to the embedding"),
    "named twice": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        "output_layer: it is in target_modules and in modules_to_save",
    ),
    "DoRA on an embedding": (
        "llama",
        {"target_modules": ["embed_tokens"], "use_dora": True},
        "embedding.word_embeddings: DoRA is not supported on an embedding",
    ),
    "PiSSA on an embedding": (
        "llama",
        {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"},
        "embedding.word_embeddings: an embedding cannot start with 'pissa'",
    ),
    "norms over heads": ("olmo2", {"modules_to_save": ["k_norm"]}, r"k_norm.*norms that every rank holds whole"),
}


def _refuse(rank: int, models: Models, sizes: ParallelSizes) -> dict[str, str]:
    found = {}
    for name, (kind, config, _) in REFUSED.items():
        base = Pretrained.open(models[kind])
        chunks = build_model(base, sizes)
        with pytest.raises(ValueError) as error:
            mlora.apply(chunks, LoraConfig(**SHAPE, **config), family=base.family)
        assert not any(hasattr(module, "lora") or hasattr(module, "copies") for c in chunks for module in c.modules())
        found[name] = str(error.value)
    base = Pretrained.open(models["llama"])
    for number in (0, 1):
        chunks = mlora.apply(
            build_model(base, sizes), (CASES["saved"], CASES["adapted"])[number].lora, family=base.family
        )
        with pytest.raises(ValueError, match="lora_plus_ratio gives B another learning rate"):
            Trainer(chunks, OptimizerSettings(lr=1e-3, lora_plus_ratio=2.0))
    tied = Pretrained.open(models["llama-tied"])
    for name in ("tied", "tied whole"):
        chunks = mlora.apply(build_model(tied, sizes), CASES[name].lora, family=tied.family)
        for merged in (mlora.merge_adapter, mlora.iter_merged_tensors):
            with pytest.raises(ValueError, match="word_embeddings is tied to the output layer, which keeps the base's"):
                merged(chunks)
    return found


def test_what_is_refused(models: Models, tmp_path: Path) -> None:
    kinds = models | {"olmo2": write_model(tmp_path / "olmo2", "olmo2")}
    sizes = ParallelSizes(pipeline=2)
    ranks = run_ranks(2, _refuse, kinds, sizes, sizes=sizes)
    for name, (_, _, words) in REFUSED.items():
        for found in ranks:
            assert pytest.raises(ValueError, match=words).matches(ValueError(found[name])), (name, found[name])


def test_portable_profiles_refuse_it(trained: Any, tmp_path: Path) -> None:
    folder, _ = trained("TP1")
    for name in ("saved", "both"):
        checkpoint = folder / name / f"iter_{END:07d}"
        for profile in ("portable", "sglang"):
            with pytest.raises(ValueError, match=rf"is a whole parameter.*the {profile} profile cannot express it"):
                peft_adapter(open_adapter(checkpoint), profile)
        with pytest.raises(ValueError, match=r"is a whole parameter.*the peft profile can"):
            export_peft(checkpoint, tmp_path / "peft")
    with pytest.raises(ValueError, match="the low-rank term of an embedding"):
        peft_adapter(open_adapter(folder / "adapted" / f"iter_{END:07d}"))


def test_names_match_as_in_peft() -> None:
    assert matches_saved("model.norm", "norm")
    assert matches_saved("model.layers.1.post_attention_layernorm", "norm")
    assert not matches_saved("model.norm.weight", "norm")
    assert not matches_saved("lm_head", "head.lm")
