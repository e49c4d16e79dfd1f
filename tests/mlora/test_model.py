"""Loaded models against Hugging Face's own, in float32: logits and per-token losses of every family at every layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

import mlora
from mlora.attach import banks
from mlora.loading import load_chunk
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora.spec import transformer_engine_obstacle
from mlora.train import OptimizerSettings, Trainer
from parallel.sizes import ParallelSizes
from parallel.stages import named_modules
from tests.ranks import run_ranks
from tests.tiny import KINDS, VOCAB, hf_logits, make_model, tokens, write_model

ONE = ParallelSizes()
LAYOUTS = [
    ONE,
    ParallelSizes(tensor=2),
    ParallelSizes(tensor=2, sequence_parallel=True),
    ParallelSizes(pipeline=2),
    ParallelSizes(pipeline=2, virtual_pipeline=2),
    ParallelSizes(tensor=2, pipeline=2, sequence_parallel=True),
]
Floats = npt.NDArray[np.float32]


def forward(chunks: list[torch.nn.Module], ids: torch.Tensor, labels: torch.Tensor | None) -> list[torch.Tensor]:
    """The model's output for each row of ids [b, s], a micro batch each; on the last stage only."""

    def step(data: Iterator[int], model: Any) -> tuple[torch.Tensor, Any]:
        row = next(data)
        given = None if labels is None else labels[row : row + 1]
        return model(ids[row : row + 1], None, None, labels=given), lambda output, **_: output

    rows = range(len(ids))
    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(ids),
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


def outputs_of(
    rank: int, paths: dict[str, Path], sizes: ParallelSizes, ids: torch.Tensor, labels: torch.Tensor
) -> dict[str, tuple[Floats, Floats] | None]:
    """Kind -> (this rank's columns of the logits [b, s, padded/t], losses [b, s]); None before the last stage."""
    results: dict[str, tuple[Floats, Floats] | None] = {}
    for kind, path in paths.items():
        chunks = build_model(Pretrained.open(path), sizes, seq_length=ids.shape[1])
        with torch.no_grad():
            logits, losses = forward(chunks, ids, None), forward(chunks, ids, labels)
        results[kind] = (torch.cat(logits).numpy(), torch.cat(losses).numpy()) if logits else None
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, torch.Tensor]:
    return {kind: hf_logits(path, tokens()) for kind, path in models.items()}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_logits_and_losses_are_hugging_faces(
    models: dict[str, Path], references: dict[str, torch.Tensor], sizes: ParallelSizes
) -> None:
    ids, labels = tokens(), tokens(seed=2)
    world = sizes.tensor * sizes.pipeline
    last_stage = run_ranks(world, outputs_of, models, sizes, ids, labels, sizes=sizes)[-sizes.tensor :]
    for kind, expected in references.items():
        logits = torch.cat([torch.from_numpy(rank[kind][0]) for rank in last_stage], dim=-1)
        assert logits.shape[-1] % (128 * sizes.tensor) == 0
        assert (logits[..., :VOCAB] - expected).abs().max() < 1e-5 * expected.abs().max(), kind
        assert logits.argmax(-1).max() < VOCAB, kind
        losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), labels, reduction="none")
        for rank in last_stage:
            assert (torch.from_numpy(rank[kind][1]) - losses).abs().max() < 1e-5, kind


def test_fewer_query_groups_than_ranks(tmp_path: Path) -> None:
    ids, labels, sizes = tokens(), tokens(seed=2), ParallelSizes(tensor=4, sequence_parallel=True)
    paths = {
        f"{kind} {groups}": write_model(tmp_path / f"{kind} {groups}", kind, num_key_value_heads=groups)
        for kind in ("qwen2", "phi3", "gemma3", "olmo2")
        for groups in (1, 2)
    }
    ranks = run_ranks(4, outputs_of, paths, sizes, ids, labels, sizes=sizes)
    for name, path in paths.items():
        expected = hf_logits(path, ids)
        logits = torch.cat([torch.from_numpy(rank[name][0]) for rank in ranks], dim=-1)[..., :VOCAB]
        assert (logits - expected).abs().max() < 1e-5 * expected.abs().max(), name


def gathered(rank: int, path: Path, sizes: ParallelSizes, ids: torch.Tensor) -> Floats:
    """The logits of the whole vocabulary, gathered by the output layer."""
    (chunk,) = build_model(Pretrained.open(path), sizes)
    with torch.no_grad():
        return chunk(ids, None, None, runtime_gather_output=True).numpy()  # type: ignore[no-any-return]


def test_padding_is_masked_in_gathered_logits_too(models: dict[str, Path], references: dict[str, torch.Tensor]) -> None:
    sizes, expected = ParallelSizes(tensor=2), references["llama"]
    for logits in run_ranks(2, gathered, models["llama"], sizes, tokens(), sizes=sizes):
        assert (torch.from_numpy(logits)[..., :VOCAB] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (logits[..., VOCAB:] == torch.finfo(torch.float32).min).all()


def held_by(rank: int, path: Path, sizes: ParallelSizes, overrides: dict[str, Any]) -> dict[str, Any]:
    """What one rank's chunks hold, and how much was read for them."""
    pretrained = Pretrained.open(path)
    chunks = build_model(pretrained, sizes, **overrides)
    padding = 0
    with pretrained.weights() as weights:
        for chunk in chunks:
            load_chunk(chunk, pretrained.family, pretrained.architecture, weights)
            for name, module in named_modules(chunk):
                if name in ("embedding.word_embeddings", "output_layer") and module.weight is not None:
                    padding += int((module.weight == 0).all(dim=1).sum()) * module.weight.shape[1]  # type: ignore[union-attr]
        elements = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        return {
            "layers": [sorted({int(layer.layer_number) for layer in chunk.decoder.layers}) for chunk in chunks],
            "bytes of parameters": 4 * (elements - padding),
            "bytes read": weights.bytes_read,
            "bytes of files": weights.bytes,
        }


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3-bias", "phi3", "gemma3", "olmo2"])
def test_a_rank_reads_what_it_holds_and_nothing_else(models: dict[str, Path], kind: str) -> None:
    sizes = ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2)
    ranks = run_ranks(4, held_by, models[kind], sizes, {}, sizes=sizes)
    no_bias = kind != "qwen3-bias"  # There Megatron has biases that the checkpoint has not; they are not read.
    for held in ranks:
        assert 0 < held["bytes read"] < 0.5 * held["bytes of files"]
        assert held["bytes read"] == held["bytes of parameters"] or not no_bias
    whole = run_ranks(1, held_by, models[kind], ONE, {}, sizes=ONE)[0]
    assert whole["bytes read"] == whole["bytes of files"]


def test_stages_of_uneven_length(models: dict[str, Path]) -> None:
    sizes = ParallelSizes(pipeline=2)
    ranks = run_ranks(2, held_by, models["llama"], sizes, {"num_layers_in_first_pipeline_stage": 1}, sizes=sizes)
    assert [rank["layers"] for rank in ranks] == [[[1]], [[2, 3, 4]]]


def values_of(rank: int, path: Path, dtype: torch.dtype) -> dict[str, Any]:
    chunk = build_model(Pretrained.open(path), ONE, dtype=dtype)[0]
    config: Any = chunk.config
    names = ("output_layer.weight", "decoder.final_layernorm.weight", "decoder.layers.2.mlp.linear_fc2.weight")
    parameters = dict(chunk.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {dtype}
    return {
        "config": (config.params_dtype, config.pipeline_dtype, config.bf16, config.calculate_per_token_loss),
        "values": {name: parameters[name].detach().float().numpy() for name in names},
    }


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_are_rounded_once_to_the_dtype_asked_for(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    path = write_model(tmp_path / "model", dtype=stored)
    state = make_model("llama", dtype=stored).state_dict()
    (held,) = run_ranks(1, values_of, path, dtype, sizes=ONE)
    assert held["config"] == (dtype, dtype, dtype == torch.bfloat16, True)
    hf_names = ("lm_head.weight", "model.norm.weight", "model.layers.2.mlp.down_proj.weight")
    for ours, hf_name in zip(held["values"].values(), hf_names, strict=True):
        theirs = state[hf_name].to(dtype).float()
        assert torch.equal(torch.from_numpy(ours)[: len(theirs)], theirs), hf_name
        assert not ours[len(theirs) :].any()


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


def train_tied(rank: int, path: Path, sizes: ParallelSizes, overrides: dict[str, Any]) -> tuple[float, float]:
    """(loss, gradient norm) of one step of the trainer on a model with a tied embedding, which is frozen."""
    pretrained = Pretrained.open(path)
    chunks = build_model(pretrained, sizes, **overrides)
    mlora.apply(chunks, mlora.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), family=pretrained.family)
    trainer = Trainer(chunks, OptimizerSettings(lr=1e-3))
    ids, labels = tokens(4), tokens(4, seed=2)
    batches = [
        {
            "tokens": ids[row : row + 1],
            "labels": labels[row : row + 1],
            "position_ids": torch.arange(ids.shape[1])[None],
            "loss_mask": torch.ones(1, ids.shape[1]),
            "attention_mask": None,
            "first_row": row,
        }
        for row in range(4)
    ]
    result = trainer.step(batches, 0)  # type: ignore[arg-type]
    return result.loss, result.grad_norm


@pytest.mark.parametrize("kind", ["qwen2-tied", "gemma3"])
def test_what_is_built_trains_as_it_is(models: dict[str, Path], kind: str) -> None:
    """The trainer needs nothing that the model's config lacks, at any layout, with tied embeddings on two stages."""
    (reference,) = run_ranks(1, train_tied, models[kind], ONE, {}, sizes=ONE)
    assert reference[1] > 0.1
    for sizes, overrides in (
        (ONE, SELECTIVE),
        (ParallelSizes(pipeline=2), FULL),
        (ParallelSizes(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True), FULL),
    ):
        for result in run_ranks(sizes.tensor * sizes.pipeline, train_tied, models[kind], sizes, overrides, sizes=sizes):
            assert result == pytest.approx(reference, rel=1e-5)


def error_of(rank: int, path: Path, sizes: ParallelSizes, arguments: dict[str, Any]) -> str:
    try:
        build_model(Pretrained.open(path), sizes, **arguments)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize(
    ("kind", "changes", "sizes", "arguments", "message"),
    [
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, ParallelSizes(tensor=4), {},
         "2 attention heads do not divide by tensor parallel size 4"),
        ("llama", {"intermediate_size": 50}, ParallelSizes(tensor=4), {},
         "50 features of the MLP do not divide by tensor parallel size 4"),
        ("llama", {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}, ParallelSizes(tensor=4), {},
         "6 query groups neither divide by tensor parallel size 4 nor divide it"),
        ("llama", {"num_hidden_layers": 3}, ParallelSizes(pipeline=2), {}, "3 layers do not divide by 2 pipeline stages"),
        ("llama", {}, ParallelSizes(pipeline=2, virtual_pipeline=4), {},
         "4 layers do not divide by 2 pipeline stages x 4 virtual stages"),
        ("llama", {"num_hidden_layers": 3, "intermediate_size": 49}, ParallelSizes(tensor=2, pipeline=2), {},
         "49 features of the MLP do not divide by tensor parallel size 2; 3 layers do not divide by 2 pipeline stages"),
        ("llama", {}, ParallelSizes(tensor=2, sequence_parallel=True), {"seq_length": 63},
         "sequences of 63 tokens do not divide by tensor parallel size 2"),
        ("llama", {}, ONE, {"transformer_impl": "transformer_engine"},
         'transformer_impl "transformer_engine": Transformer Engine is not installed; "local" can'),
        ("llama", {}, ONE, {"recompute_granularty": "full"}, "recompute_granularty is no field of Megatron's TransformerConfig"),
        ("llama", {}, ONE, {"hidden_size": 64}, "hidden_size = 64 cannot be given: the checkpoint and the sizes decide it"),
        ("llama", {}, ONE, {"attention_dropout": 0.1}, "attention_dropout = 0.1 cannot be given"),
        ("llama", {}, ONE, {"dtype": torch.int8}, "dtype is torch.int8; it can be torch.float64, "),
        ("phi3-longrope", {}, ONE, {},
         "original_max_position_embeddings = 64: sequences of 128 tokens would need the rotary angles of long sequences"),
        ("phi3-longrope", {}, ONE, {"seq_length": 65}, "give a seq_length of at most 64"),
        ("llama", {}, ONE, {"masked_softmax_fusion": True}, "masked_softmax_fusion = True cannot be given"),
    ],
)  # fmt: skip
def test_what_cannot_be_built(
    tmp_path: Path, kind: str, changes: dict[str, Any], sizes: ParallelSizes, arguments: dict[str, Any], message: str
) -> None:
    path = write_model(tmp_path / "model", kind, **changes)
    world = sizes.tensor * sizes.pipeline
    for error in run_ranks(world, error_of, path, sizes, arguments, sizes=sizes):
        assert message in error


def run_longest(rank: int, path: Path) -> tuple[Floats, str]:
    chunk = build_model(Pretrained.open(path), ONE, seq_length=64)[0]
    with torch.no_grad():
        logits = chunk(tokens(length=64), None, None)
        try:
            chunk(tokens(length=65), None, None)
        except ValueError as error:
            return logits.numpy(), str(error)
    return logits.numpy(), "none"


def test_angles_are_held_to_when_the_model_runs(models: dict[str, Path]) -> None:
    """Hugging Face too takes others for a sequence of one token more."""
    path = models["phi3-longrope"]
    ((logits, error),) = run_ranks(1, run_longest, path, sizes=ONE)
    expected, longer = hf_logits(path, tokens(length=64)), hf_logits(path, torch.cat([tokens(length=64)] * 2, 1))
    assert (torch.from_numpy(logits)[..., :VOCAB] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (longer[:, :64] - expected).abs().max() > 0.01
    assert "sequences of 65 tokens would need the rotary angles of long sequences" in error


def names_of(rank: int, path: Path) -> set[str]:
    pretrained = Pretrained.open(path)
    chunks = build_model(pretrained, ONE)
    mlora.apply(chunks, mlora.LoraConfig(r=2), family=pretrained.family)
    adapters = [bank.adapter("default") for bank in banks(chunks)]
    return {name for adapter in adapters if adapter is not None for name in adapter.hf_names.values()}


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "gemma2", "olmo2"])
def test_adapters_carry_hugging_faces_names(models: dict[str, Path], kind: str) -> None:
    model = make_model(kind)
    linears = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert run_ranks(1, names_of, models[kind], sizes=ONE) == [linears]


def unmasked(rank: int, path: Path, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean loss of a model whose padding is let into the softmax."""
    chunk: Any = build_model(Pretrained.open(path), ONE)[0]
    chunk.output_layer._forward_hooks.clear()
    with torch.no_grad():
        return float(chunk(ids, None, None, labels=labels).mean())


def test_padding_would_be_seen_in_the_loss(models: dict[str, Path], references: dict[str, torch.Tensor]) -> None:
    ids, labels = tokens(), tokens(seed=2)
    expected = torch.nn.functional.cross_entropy(references["llama"].transpose(1, 2), labels)
    (loss,) = run_ranks(1, unmasked, models["llama"], ids, labels, sizes=ONE)
    assert abs(loss - float(expected)) > 0.01


def logits_in_bfloat16(rank: int, path: Path, ids: torch.Tensor) -> Floats:
    chunk = build_model(Pretrained.open(path), ONE, dtype=torch.bfloat16, seq_length=ids.shape[1])[0]
    with torch.no_grad():
        return chunk(ids, None, None).float().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama3.1", "qwen2", "qwen3", "phi3-longrope", "gemma2", "gemma3", "olmo2"])
def test_bfloat16_rounds_no_more_than_hugging_face(
    models: dict[str, Path], references: dict[str, torch.Tensor], kind: str
) -> None:
    ids, exact = tokens(), references[kind]
    (logits,) = run_ranks(1, logits_in_bfloat16, models[kind], ids, sizes=ONE)
    theirs = (hf_logits(models[kind], ids, dtype=torch.bfloat16).float() - exact).square().mean().sqrt()
    ours = (torch.from_numpy(logits)[..., :VOCAB] - exact).square().mean().sqrt()
    assert ours < 1.2 * theirs, (ours, theirs)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("llama", None), ("gemma2", "Transformer Engine's attention cannot cap the scores"), ("mistral-window", None)],
)
def test_what_transformer_engine_cannot_hold_is_known_before(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, why: str | None
) -> None:
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert transformer_engine_obstacle(Pretrained.open(models[kind]).architecture) == why
