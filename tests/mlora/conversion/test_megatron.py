"""Adapters of Megatron-Bridge and mcore-bridge: the same logits as their own forward on the ranks that saved them."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mlora
from mlora import LoraConfig
from mlora.checkpoint import load_checkpoint
from mlora.conversion import AdapterState, open_adapter
from mlora.conversion.difference import compare
from mlora.conversion.megatron import read_megatron
from mlora.conversion.megatron_import import plan_megatron_import
from mlora.conversion.native_writer import write_import
from mlora.conversion.peft_writer import write_peft
from mlora.conversion.profiles import peft_adapter
from mlora.logits import whole_logits
from mlora.model import build_model
from mlora.pretrained import Pretrained
from parallel.sizes import ParallelSizes
from parallel.stream import write_stream
from tests.mlora.conversion.megatron_writers import ALPHA, CASES, RANK, TENSOR, Case, Writer, write_sides
from tests.ranks import run_ranks
from tests.tiny import GROUPS, HIDDEN, LAYERS, VOCAB, hf_logits, tokens, write_model

SIZES = ParallelSizes(tensor=TENSOR, pipeline=2)
IDS = tokens(1, 16)
QKV = "decoder.layers.self_attention.linear_qkv"


def _write(rank: int, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Logits by case, computed by the layout's own forward."""
    chunks, found = build_model(Pretrained.open(base), SIZES, dtype=torch.float64), {}
    for name, case in CASES.items():
        writer, handles = Writer.attach(case, chunks)
        found[name] = whole_logits(chunks, IDS, VOCAB)
        for handle in handles:
            handle.remove()
        writer.save(folder / name / "iter_0000007")
    return found


def _read(rank: int, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Logits by case, of the native checkpoints."""
    pretrained, found = Pretrained.open(base), {}
    for name in CASES:
        config = LoraConfig.from_json(folder / name / "adapter_config.json")
        chunks = build_model(pretrained, ParallelSizes(tensor=2), dtype=torch.float64)
        mlora.apply(chunks, replace(config, adapter_dtype=torch.float64), family=pretrained.family)
        load_checkpoint(folder / name, chunks)
        found[name] = whole_logits(chunks, IDS, VOCAB)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a checkpoint of each case, and their logits."""
    folder = tmp_path_factory.mktemp("written")
    return folder, run_ranks(4, _write, base, folder, sizes=SIZES)[-1]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, base: Path, written: Any) -> Path:
    """A folder with each case as a native checkpoint and as a PEFT directory."""
    folder, pretrained = tmp_path_factory.mktemp("imported"), Pretrained.open(base)
    for name in CASES:
        state = read_megatron(written[0] / name, pretrained)
        write_import(plan_megatron_import(state, pretrained), folder / "native" / name)
        profile = "portable" if state.is_plain else "peft"
        write_peft(peft_adapter(state, profile, base=pretrained), folder / "peft" / name)
    return folder


@pytest.fixture(scope="module")
def native_logits(base: Path, imported: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = run_ranks(2, _read, base, imported / "native")[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_native_checkpoint_has_their_logits(name: str, written: Any, native_logits: Any, base: Path) -> None:
    theirs = written[1][name]
    assert (theirs - hf_logits(base, IDS)).abs().max() > 0.3
    assert (native_logits[name] - theirs).abs().max() < 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_the_peft_directory_has_their_logits(name: str, written: Any, imported: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = written[1][name]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        ours = PeftModel.from_pretrained(model, str(imported / "peft" / name)).eval()(IDS).logits
    # Hugging Face computes norms and rotary angles in float32.
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_both_hold_the_same_adapter(name: str, imported: Path) -> None:
    found = compare(open_adapter(imported / "native" / name), open_adapter(imported / "peft" / name))
    assert found and max(difference.relative for difference in found) == 0


@pytest.mark.parametrize(("name", "shared"), [("bridge", True), ("swift-rslora", True), ("canonical", False)])
def test_what_was_trained_with_one_matrix_goes_on_so(name: str, shared: bool, imported: Path) -> None:
    config = LoraConfig.from_json(imported / "native" / name / "adapter_config.json")
    assert config.shared_A is shared
    assert (config.r, config.lora_alpha, config.use_rslora) == (RANK, ALPHA, name == "swift-rslora")


def test_the_rows_of_another_number_of_ranks_are_noticed(written: Any, base: Path, tmp_path: Path) -> None:
    """The pieces tell the ranks; a configuration that tells others is from another checkpoint."""
    for name, settings, key in (
        ("canonical", "run_config.yaml", "adapter_(gate|up)"),
        ("swift", "args.json", "mlp.linear_fc1.lora_B"),
    ):
        folder = shutil.copytree(written[0] / name, tmp_path / name)
        (file,) = folder.rglob(settings)
        file.write_text(file.read_text().replace(f"size: {TENSOR}", "size: 4").replace(f'size": {TENSOR}', 'size": 4'))
        with pytest.raises(ValueError, match=f"{key}.*: the order of its rows is unknown: .* says that there were 4"):
            read_megatron(folder, Pretrained.open(base))


def _matrices(layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """Megatron-Bridge's tensors of linear_qkv, saved on one rank."""
    return {
        f"{QKV}.adapter.linear_in.weight": torch.randn(layers, RANK, HIDDEN),
        f"{QKV}.adapter.linear_out.weight": torch.randn(layers, 2 * HIDDEN, RANK),
    }


def _checkpoint(folder: Path, tensors: dict[str, torch.Tensor], case: Case = CASES["bridge"], **peft: Any) -> Path:
    folder.mkdir(parents=True)
    write_stream(tensors.items(), folder)
    write_sides(folder, replace(case, settings=tuple(peft.items())))
    return folder


def _add(key: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({key: torch.ones(LAYERS, RANK, HIDDEN)})


PROBLEMS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (_add("decoder.layers.mlp.experts.linear_fc1.adapter.linear_in.weight"), "experts.*: adapters of experts"),
    (_add("decoder.layers.mlp.shared_experts.linear_fc2.adapter.linear_in.weight"), "shared_.*: adapters of experts"),
    (_add("decoder.layers.mlp.router.adapter.linear_in.weight"), "router.*: adapters of routers"),
    (_add(f"{QKV}.adapter.weight_magnitude"), "magnitude: the magnitudes of DoRA are not supported"),
    (_add("vision_model.decoder.layers.mlp.linear_fc1.adapter.linear_in.weight"), ": adapters of vision towers"),
    (_add("mtp_head.adapter.linear_in.weight"), "mtp_head.*: it is no matrix of an adapter of Megatron-Bridge on a linear"),
    (_add("output_layer.adapter.linear_in.weight"), r"output_layer.*: its shape is .*, and should be \[rows, columns\]"),
    (_add("output_layer.modules_to_save.default.weight"), r"output_layer.*: whole parameters \(modules_to_save\) are not"),
    (_add("embedding.word_embeddings.weight"), "embedding.*: it is no matrix"),
    (_add("decoder.layers.self_attention.in_proj.adapter.linear_in.weight"), "in_proj.*: it is the A of .*, whose B"),
    (lambda tensors: tensors.pop(f"{QKV}.adapter.linear_in.weight"), "linear_out.weight: it is the B of .*, whose A"),
    (lambda tensors: tensors.update(_matrices(layers=3)), r"linear_in.weight: it is of 3 layers, and the base has 4"),
    (
        lambda tensors: tensors.update({f"{QKV}.adapter.linear_in.weight": torch.ones(RANK, HIDDEN)}),
        r"its shape is \[4, 32\], and should be \[layers, rows, columns\]",
    ),
    (
        lambda tensors: tensors.update({f"{QKV}.adapter.linear_in.weight": torch.ones(LAYERS, RANK, 8)}),
        r"linear_in.weight\[0\]: its shape is \[4, 8\]; .* it would be \[4, 32\]",
    ),
    (
        lambda tensors: tensors.update({f"{QKV}.adapter.linear_out.weight": torch.ones(LAYERS, HIDDEN, RANK)}),
        r"linear_out.weight\[0\]: its shape is \[32, 4\]; .* it would be \[64, 4\]",
    ),
    (
        lambda tensors: tensors.update({
            f"decoder.layers.9.mlp.linear_fc2.adapter.linear_{end}.weight": torch.ones(4, 4) for end in ("in", "out")
        }),
        "layers.9.mlp.linear_fc2.*: .* has no decoder.layers.9.mlp.linear_fc2 that can be adapted",
    ),
    (
        lambda tensors: tensors.update({
            f"decoder.layers.0.mlp.linear_fc2.adapter.adapter_q.linear_{end}.weight": torch.ones(4, 4)
            for end in ("in", "out")
        }),
        "adapter_q.*: decoder.layers.0.mlp.linear_fc2 has no q, but whole",
    ),
    (
        lambda tensors: tensors.update({f"{QKV.replace('layers', 'layers.1')}.adapter.linear_in.weight": torch.ones(RANK, HIDDEN)}),
        "layers.1.*: .* is the same matrix",
    ),
    (
        lambda tensors: tensors[f"{QKV}.adapter.linear_out.weight"][2, 5].fill_(float("nan")),
        r"linear_out.weight\[2\] has values that are not finite",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), PROBLEMS)
def test_a_tensor_that_cannot_be_used_is_named(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path, base: Path
) -> None:
    tensors, pretrained = _matrices(), Pretrained.open(base)
    change(tensors)
    folder = _checkpoint(tmp_path / "iter_0000001", tensors)
    with pytest.raises(ValueError, match=rf"{folder}: .*{message}"):
        write_import(plan_megatron_import(read_megatron(folder, pretrained), pretrained), tmp_path / "out")
    assert not (tmp_path / "out").exists()


OUTPUT, WORDS = "output_layer", "embedding.word_embeddings"
SAVED = "modules_to_save.default.weight"
# The vocabulary is 101, and padding on two ranks comes to 256.
ENDS: list[tuple[dict[str, tuple[int, ...]], str]] = [
    ({f"{OUTPUT}.{SAVED}": (257, HIDDEN)}, r"its shape is \[257, 32\]; .* it would be \[101, 32\]"),
    ({f"{WORDS}.{SAVED}": (100, HIDDEN)}, r"its shape is \[100, 32\]; .* it would be \[101, 32\]"),
    ({f"decoder.final_layernorm.{SAVED}": (HIDDEN + 1,)}, r"its shape is \[33\]; .* it would be \[32\]"),
    ({f"{OUTPUT}.lora_A.default.weight": (RANK, HIDDEN), f"{OUTPUT}.lora_B.default.weight": (300, RANK)},
     r"lora_B.*: its shape is \[300, 4\]; .* it would be \[101, 4\]"),
    ({f"{WORDS}.{SAVED}": (128, HIDDEN), f"{WORDS}.{SAVED.replace('default', 'other')}": (128, HIDDEN)},
     "there are several adapters: .* is of the same module"),
    ({f"decoder.layers.0.input_layernorm.{SAVED}": (HIDDEN,)}, r"whole parameters \(modules_to_save\) are not supported"),
    ({f"{WORDS}.lora_embedding_A.default": (RANK, 128)}, "adapters of embeddings are not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("added", "message"), ENDS)
def test_an_end_of_the_model_that_does_not_fit_is_named(
    added: dict[str, tuple[int, ...]], message: str, tmp_path: Path, base: Path
) -> None:
    linear = "decoder.layers.0.mlp.linear_fc2"
    tensors = {
        f"{linear}.lora_A.default.weight": torch.ones(RANK, 48),
        f"{linear}.lora_B.default.weight": torch.ones(32, RANK),
    }
    tensors |= {key: torch.ones(shape) for key, shape in added.items()}
    folder = _checkpoint(tmp_path / "run" / "iter_0000001", tensors, CASES["swift"])
    with pytest.raises(ValueError, match=rf"{folder}: .*{message}"):
        read_megatron(folder, Pretrained.open(base))


def test_a_tied_output_layer_has_no_weight_of_its_own(tmp_path: Path) -> None:
    tied = Pretrained.open(write_model(tmp_path / "tied", "llama-tied"))
    linear = "decoder.layers.0.mlp.linear_fc2"
    tensors = {
        f"{linear}.lora_A.default.weight": torch.ones(RANK, 48),
        f"{linear}.lora_B.default.weight": torch.ones(32, RANK),
    }
    held = tensors | {f"{OUTPUT}.{SAVED}": torch.ones(128, HIDDEN)}
    folder = _checkpoint(tmp_path / "run" / "iter_0000001", held, CASES["swift"])
    with pytest.raises(ValueError, match=r"has no lm_head\.weight of its own"):
        plan_megatron_import(read_megatron(folder, tied), tied)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"dim": 8}, r"its shape is \[4, 32\]; .*with the rank of .*run_config.yaml it would be \[8, 32\]"),
    ({"alpha": "6"}, r"run_config.yaml: peft.alpha is '6'; it must be of type float"),
    ({"alpha": float("nan")}, "peft.alpha is nan; it is out of range"),
    ({"alpha": None}, "peft.alpha is missing"),
    ({"_target_": "megatron.bridge.peft.dora.DoRA"}, "peft._target_ is 'DoRA'; it can be LoRA or CanonicalLoRA"),
    ({"dropout": 0.1, "dropout_position": "post"}, "peft.dropout_position is 'post'; only dropout in front of A"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_a_configuration_that_cannot_be_is_named(
    settings: dict[str, Any], message: str, tmp_path: Path, base: Path
) -> None:
    folder = _checkpoint(tmp_path / "iter_0000001", _matrices(), **settings)
    with pytest.raises(ValueError, match=message):
        read_megatron(folder, Pretrained.open(base))


def _swift(folder: Path, **args: Any) -> Path:
    names = {"adapter.linear_in": "lora_A.default", "adapter.linear_out": "lora_B.default"}
    tensors = {}
    for key, tensor in _matrices().items():
        for old, new in names.items():
            key = key.replace(old, new)
        tensors[key] = tensor
    return _checkpoint(folder, tensors, CASES["swift"], **args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lora_bias": "all"}, "args.json: lora_bias is 'all'; it is not supported, only 'none' is"),
        ({"lora_rank": 2}, r"with the rank of .*args.json it would be \[2, 32\]"),
        ({"lora_alpha": True}, "args.json: lora_alpha is True; it must be of type float"),
    ],
)
def test_arguments_that_cannot_be_are_named(args: dict[str, Any], message: str, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_megatron(_swift(tmp_path / "iter_0000001", **args), Pretrained.open(base))


def test_pefts_own_configuration_serves_too(tmp_path: Path, base: Path) -> None:
    folder, pretrained = _swift(tmp_path / "one" / "iter_0000001"), Pretrained.open(base)
    (tmp_path / "one" / "args.json").unlink()
    config = {"r": RANK, "lora_alpha": 3, "use_rslora": True, "bias": "none", "lora_dropout": 0.25, "rank_pattern": {}}
    file = tmp_path / "one" / "adapter_config.json"
    file.write_text(json.dumps(config))
    state = read_megatron(folder, pretrained)
    assert {module.scaling for module in state.modules} == {3 / RANK**0.5}
    assert state.config["lora_dropout"] == plan_megatron_import(state, pretrained).config.lora_dropout == 0.25
    file.write_text(json.dumps(config | {"alpha_pattern": {"linear_qkv": 1}}))
    with pytest.raises(ValueError, match=r"adapter_config.json: alpha_pattern is .*; it is not supported"):
        read_megatron(folder, pretrained)


def test_several_adapters_are_refused(tmp_path: Path, base: Path) -> None:
    tensors = {
        f"{QKV}.lora_{factor}.{name}.weight": torch.ones(LAYERS, *shape)
        for name in ("default", "ref_adapter")
        for factor, shape in (("A", (RANK, HIDDEN)), ("B", (2 * HIDDEN, RANK)))
    }
    with pytest.raises(ValueError, match=r"ref_adapter.weight: there are several adapters, default and ref_adapter"):
        read_megatron(_checkpoint(tmp_path / "iter_0000001", tensors, CASES["swift"]), Pretrained.open(base))


def test_a_lost_configuration_needs_an_alpha(tmp_path: Path, base: Path) -> None:
    folder, pretrained = _checkpoint(tmp_path / "run" / "iter_0000001", _matrices()), Pretrained.open(base)
    with pytest.raises(ValueError, match=r"alpha is given, and .*run_config.yaml says 6"):
        read_megatron(folder, pretrained, alpha=6)
    (folder / "run_config.yaml").unlink()
    with pytest.raises(ValueError, match=r"there is no run_config.yaml in .* so the scaling is unknown"):
        read_megatron(folder, pretrained)
    state = read_megatron(folder, pretrained, alpha=2)
    assert {module.scaling for module in state.modules} == {2 / RANK}


@pytest.mark.parametrize("content", ["[1, 2]", "peft: [1", "peft: 3", "!!python/object/apply:os.system ['exit 1']"])
def test_a_damaged_configuration_is_named(content: str, tmp_path: Path, base: Path) -> None:
    folder = _checkpoint(tmp_path / "iter_0000001", _matrices())
    (folder / "run_config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"run_config.yaml: (not valid YAML|expected|peft is 3; it must hold)"):
        read_megatron(folder, Pretrained.open(base))


def test_the_latest_iteration_is_taken(tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    pretrained = Pretrained.open(base)
    tracked = tmp_path / "latest_checkpointed_iteration.txt"
    for number in (2, 10):
        _checkpoint(tmp_path / f"iter_{number:07d}", _matrices(), alpha=number)

    def alpha() -> Any:
        return read_megatron(tmp_path, pretrained).config["lora_alpha"]

    with caplog.at_level(logging.INFO):
        assert alpha() == 10
    assert f"{tmp_path}: reading iter_0000010" in caplog.text
    tracked.write_text("2\n")
    assert alpha() == 2
    tracked.write_text("3")
    with pytest.raises(FileNotFoundError, match=r"iter_0000003 has no .metadata, and latest_check.* names it"):
        alpha()
    tracked.write_text("../iter_0000002")
    with pytest.raises(ValueError, match=r"says '../iter_0000002', which is no iteration"):
        alpha()


def test_what_is_no_such_checkpoint_is_told(tmp_path: Path, base: Path, imported: Path) -> None:
    pretrained = Pretrained.open(base)

    def refused(path: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            read_megatron(path, pretrained)

    refused(tmp_path / "none", FileNotFoundError, "none does not exist")
    refused(imported / "native" / "bridge", ValueError, "is a native checkpoint of mlora's: it needs no import")
    refused(imported / "peft" / "bridge", FileNotFoundError, r"its adapter_model.safetensors is a PEFT adapter")
    folder = _checkpoint(tmp_path / "iter_0000001", _matrices())
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(folder, ValueError, 'metadata.json: sharded_backend is "zarr"; only torch_dist is read')
    (folder / "metadata.json").unlink()
    refused(folder, ValueError, "has no metadata.json, so it was not written as torch_dist")
    refused(_checkpoint(tmp_path / "empty", {}), ValueError, "holds no matrix of an adapter .* no tensors at all")
    other = _checkpoint(tmp_path / "full", {"embedding.word_embeddings.weight": torch.ones(2, 2)})
    refused(other, ValueError, "holds no matrix of an adapter .*; it holds embedding.word_embeddings.weight")
    with pytest.raises(ValueError, match=r"linear_in.weight: it is no matrix of an adapter of mcore-bridge on"):
        read_megatron(_checkpoint(tmp_path / "bridge", _matrices()), pretrained, "mcore-bridge")


def test_the_optimizers_tensors_are_passed_over(tmp_path: Path, base: Path) -> None:
    tensors = _matrices()
    for prefix in ("optimizer.state.exp_avg.", "chained_0.optimizer.state.fp32_param."):
        tensors |= {prefix + key: tensor for key, tensor in _matrices().items()}
    state = read_megatron(_checkpoint(tmp_path / "iter_0000001", tensors), Pretrained.open(base))
    assert len(state.modules) == 3 * LAYERS


def _fused(rows: torch.Tensor) -> torch.Tensor:
    """q, k and v one after the other, from rows in the order of Megatron's linear_qkv."""
    groups = [group.split([len(group) // 2, len(group) // 4, len(group) // 4]) for group in rows.chunk(GROUPS)]
    return torch.cat([torch.cat([group[part] for group in groups]) for part in range(3)])


def test_a_fused_module_takes_the_rows_of_its_parts(tmp_path: Path) -> None:
    """Phi 3 has qkv_proj, with one A, as Megatron does; CanonicalLoRA's three do not fit into it."""
    pretrained = Pretrained.open(write_model(tmp_path / "phi3", "phi3"))
    tensors = _matrices()
    state: AdapterState = read_megatron(_checkpoint(tmp_path / "iter_0000001", tensors), pretrained)
    assert [module.name for module in state.modules] == [f"model.layers.{n}.self_attn.qkv_proj" for n in range(LAYERS)]
    for number, module in enumerate(state.modules):
        A, B, _ = vars(module.load()).values()
        assert torch.equal(A, tensors[f"{QKV}.adapter.linear_in.weight"][number])
        assert torch.equal(B, _fused(tensors[f"{QKV}.adapter.linear_out.weight"][number]))
    write_import(plan_megatron_import(state, pretrained), tmp_path / "native")
    assert not LoraConfig.from_json(tmp_path / "native" / "adapter_config.json").shared_A
    canonical = {key.replace("adapter.", "adapter.adapter_q."): tensor for key, tensor in tensors.items()}
    canonical[f"{QKV}.adapter.adapter_q.linear_out.weight"] = torch.ones(LAYERS, HIDDEN, RANK)
    with pytest.raises(ValueError, match=r"qkv_proj is q, k, v in one module, with one A for all"):
        read_megatron(_checkpoint(tmp_path / "canonical", canonical), pretrained)
