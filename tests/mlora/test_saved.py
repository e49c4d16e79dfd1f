"""Named adapters of a live model: loaded from disk, used as a reference and deleted, against PEFT and against never having been."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

import mlora
from mlora import LoraConfig
from mlora.attach import banks, factors
from mlora.checkpoint import save_checkpoint
from mlora.log_probs import log_probs, on_every_stage
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.train import OptimizerSettings, Trainer
from parallel.sizes import ParallelSizes
from tests import gpt
from tests.mlora.conversion.adapters import tensors_of, write_adapter
from tests.mlora.conversion.adapters import write_peft as write_with_peft
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tokens, write_model

ONE, SP2 = ParallelSizes(), ParallelSizes(tensor=2, sequence_parallel=True)
PP2, VPP2 = ParallelSizes(pipeline=2), ParallelSizes(pipeline=2, virtual_pipeline=2)
LAYOUTS = [(1, ONE), (2, SP2), (2, VPP2), (4, ParallelSizes(tensor=2, pipeline=2))]
# Adapter -> the fields of PEFT's configuration; each on a model of its own kind.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "llama",
        {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], "rank_pattern": {"v_proj": 3}},
    ),
    "dora": ("qwen2", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "o_proj"]}),
}
LENGTH = 24


def micro_batches() -> list[dict[str, Any]]:
    """Two micro batches of two sequences, every next token a label."""
    ids = tokens(rows=4, length=LENGTH + 1)
    return [
        {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "position_ids": torch.arange(LENGTH).expand(2, -1),
            "loss_mask": torch.ones(2, LENGTH),
            "attention_mask": None,
            "first_row": 2 * number,
        }
        for number, part in enumerate(ids.split(2))
    ]


@torch.no_grad()
def labelled(logits: torch.Tensor) -> torch.Tensor:
    """The labels' log-probabilities [b, s] from Hugging Face's logits."""
    labels = torch.cat([batch["labels"] for batch in micro_batches()])
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Folder of bases and PEFT directories; adapter -> PEFT's log-probabilities with it and without."""
    folder = tmp_path_factory.mktemp("made")
    expected = {}
    for name, (kind, config) in ADAPTERS.items():
        base = write_model(folder / kind, kind)
        model = write_with_peft(folder / name, base, seed=3, **config)
        ids = torch.cat([batch["tokens"] for batch in micro_batches()])
        with torch.no_grad():
            on = labelled(model(ids).logits)
            with model.disable_adapter():
                expected[name] = {"on": on, "off": labelled(model(ids).logits)}
    return folder, expected


def every_way(rank: int, folder: Path, name: str, sizes: ParallelSizes) -> dict[str, torch.Tensor]:
    """Log-probabilities with a loaded adapter in every way to have it on or off."""
    base = Pretrained.open(folder / ADAPTERS[name][0])
    chunks = build_model(base, sizes)

    def now() -> torch.Tensor:
        batches = micro_batches()
        return torch.cat(on_every_stage(log_probs(chunks, batches), batches))

    found = {"off never": now()}
    ids = torch.cat([batch["tokens"] for batch in micro_batches()])
    assert torch.allclose(labelled(whole_logits(chunks, ids, VOCAB, micro_batch_size=2)), found["off never"], atol=1e-5)
    assert torch.allclose(labelled(whole_logits(chunks, ids, VOCAB)), found["off never"], atol=1e-5)
    mlora.load_adapter(chunks, folder / name, base=base)
    found["on"] = now()
    with mlora.disable_adapter(chunks):
        found["off"] = now()
    mlora.merge_adapter(chunks)
    found["on merged"] = now()
    with mlora.disable_adapter(chunks):
        found["off merged"] = now()
    mlora.unmerge_adapter(chunks)
    saved = save_checkpoint(folder / f"native-{name}-{sizes}", chunks)
    mlora.load_adapter(chunks, saved, "again", base=base)
    found["on default"] = now()
    with mlora.use_adapter(chunks, "again"):
        found["on again"] = now()
        with mlora.disable_adapter(chunks):
            found["off again"] = now()
    mlora.set_adapter(chunks, "again")
    mlora.delete_adapter(chunks, "default")
    found["on alone"] = now()
    assert mlora.adapter_names(chunks) == ["again"]
    mlora.delete_adapter(chunks, "again")
    found["off deleted"] = now()
    assert mlora.adapter_names(chunks) == []
    return found


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("size", "sizes"), LAYOUTS, ids=str)
def test_log_probabilities_are_pefts(
    made: tuple[Path, dict[str, dict[str, torch.Tensor]]], name: str, size: int, sizes: ParallelSizes
) -> None:
    folder, expected = made
    assert (expected[name]["on"] - expected[name]["off"]).abs().max() > 0.1
    for ways in run_ranks(size, every_way, folder, name, sizes, sizes=sizes):
        for way, found in ways.items():
            theirs = expected[name][way.partition(" ")[0]]
            error = (found - theirs).abs().max() / theirs.abs().max()
            # A merged weight is rounded to float32 once more, and these deltas are as large as the weights.
            assert error < (1e-5 if way == "on merged" else 2e-6), (way, error)
            if way.startswith("off"):
                assert torch.equal(found, ways["off never"]), way
            elif way != "on merged":
                assert torch.equal(found, ways["on"]), way


def train_beside(rank: int, folder: Path, sizes: ParallelSizes, disturbed: bool) -> tuple[list[Any], gpt.Pieces]:
    """Three steps; between them, if ``disturbed``, everything that can be done with other adapters."""
    base = Pretrained.open(folder / "llama")
    chunks = mlora.apply(build_model(base, sizes), LoraConfig(r=4, lora_dropout=0.2, init_lora_weights=False))
    trainer = Trainer(chunks, OptimizerSettings(lr=1e-2, weight_decay=0.1))
    before = addresses(trainer)
    versions = [(parameter, parameter._version) for chunk in chunks for parameter in base_parameters(chunk)]
    steps: list[Any] = []
    for iteration in range(3):
        if disturbed:
            mlora.load_adapter(trainer.wrapped, folder / "lora", "reference", base=base)
            with mlora.use_adapter(trainer.wrapped, "reference"):
                log_probs(chunks, micro_batches())
            mlora.set_adapter(chunks, "reference", inference_mode=True)
            assert not any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters())
            log_probs(chunks, micro_batches())
            mlora.set_adapter(chunks, "default")
            with pytest.raises(ValueError, match="adapter 'default' is being trained"):
                mlora.delete_adapter(chunks, "default")
            if iteration != 1:
                mlora.delete_adapter(chunks, "reference")
            else:
                with mlora.disable_adapter(chunks):
                    mlora.delete_adapter(chunks, "reference")
        result = trainer.step(micro_batches(), iteration)
        steps.append((result.loss, result.grad_norm))
    assert addresses(trainer) == before
    assert all(parameter._version == version for parameter, version in versions)
    return steps, gpt.pieces(chunks)


def base_parameters(chunk: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in chunk.named_parameters() if ".lora." not in name]


def addresses(trainer: Trainer) -> list[int]:
    """Where the base, the adapter and its gradients lie."""
    held = [tensor for chunk in trainer.chunks for tensor in base_parameters(chunk)]
    held += [factor.parameter for factor in factors(trainer.chunks)]
    held += [factor.parameter.main_grad for factor in factors(trainer.chunks)]  # type: ignore[attr-defined]
    held += [buffer.grad_data for chunk in trainer.wrapped for buffer in chunk.buffers]
    return [tensor.data_ptr() for tensor in held]


@pytest.mark.parametrize(("size", "sizes"), [(2, SP2), (2, PP2)], ids=str)
def test_training_goes_on_as_if_no_other_adapter_had_been(
    made: tuple[Path, Any], size: int, sizes: ParallelSizes
) -> None:
    alone, beside = (run_ranks(size, train_beside, made[0], sizes, way, sizes=sizes) for way in (False, True))
    for (steps, weights), (same_steps, same_weights) in zip(alone, beside, strict=True):
        assert steps == same_steps
        assert all(torch.equal(weights[name][2], same_weights[name][2]) for name in weights)


def refusals(rank: int, folder: Path, bad: Path) -> list[str]:
    """What is said of adapters that cannot be loaded; the model is as it was."""
    base = Pretrained.open(folder / "llama")
    bare = build_model(base, SP2)
    with pytest.raises(ValueError, match="not finite"):
        mlora.load_adapter(bare, bad, base=base)
    assert mlora.adapter_names(bare) == [] and all(p.requires_grad for chunk in bare for p in chunk.parameters())
    chunks = mlora.apply(bare, LoraConfig(r=2))
    before = [parameter for bank in banks(chunks) for parameter in bank.parameters()]
    messages = []
    for path, name, model in (
        (bad, "other", base),
        (folder / "fused", "other", base),
        (folder / "lora", "default", base),
        (folder / "lora", "other", None),
        (folder / "nothing", "other", base),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            mlora.load_adapter(chunks, path, name, base=model)
        messages.append(str(error.value))
        assert mlora.adapter_names(chunks) == ["default"]
    with pytest.raises(ValueError, match="no adapter 'other'"), mlora.use_adapter(chunks, "other"):
        pass
    with pytest.raises(ValueError, match="no adapter 'other'"):
        mlora.delete_adapter(chunks, "other")
    mlora.merge_adapter(chunks)
    with pytest.raises(ValueError, match="adapter 'default' is merged"):
        mlora.delete_adapter(chunks, "default")
    after = [parameter for bank in banks(chunks) for parameter in bank.parameters()]
    assert [id(parameter) for parameter in before] == [id(parameter) for parameter in after]
    return messages


def test_what_cannot_be_loaded_leaves_the_model_as_it_was(made: tuple[Path, Any], tmp_path: Path) -> None:
    write_adapter(
        tmp_path / "bad",
        {
            name: tensor * float("nan")
            for name, tensor in tensors_of(("model.layers.0.self_attn.q_proj", 2, 32, 32)).items()
        },
        target_modules=["model.layers.0.self_attn.q_proj"],
    )
    for messages in run_ranks(2, refusals, made[0], tmp_path / "bad", sizes=SP2):
        nan, other_base, taken, nameless, missing = messages
        assert "not finite" in nan and "lora_A" in nan
        assert "qkv_proj" in other_base and "no such module" in other_base
        assert "there is an adapter 'default' already" in taken
        assert "give base" in nameless
        assert "nothing" in missing
