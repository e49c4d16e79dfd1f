"""Megatron's own `pretrain` with LoRA plugged in, whole: on real ranks, with mock data, from its parser to its last evaluation."""

import os
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.training", reason="wheels of megatron-core before 0.17 have no megatron.training")

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.models.gpt import GPTModelBuilder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlora.conversion import open_adapter
from mlora.megatron import add_lora_args, pre_wrap_hook, with_lora
from mlora.megatron.base import Source
from mlora.train import OptimizerSettings, Trainer
from mlora_tools import export_peft, pretrain_gpt_lora
from parallel.storage import Reader
from tests.ranks import run_ranks
from tests.tools.megatron_scripts import MODEL, STEPS, run_script, training_on_cpu

ROOT = Path(__file__).parents[2]
ITERATIONS, ROWS, MICRO_ROWS = 4, 8, 2  # as STEPS says
LORA = ["--lora-rank", "4", "--lora-alpha", "8", "--lora-dropout", "0.1"]
# Without the worker Megatron saves synchronously after all.
ASYNCHRONOUS = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]

main = pretrain_gpt_lora.main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model that the script trained without one of LoRA's options."""
    folder = tmp_path_factory.mktemp("base")
    run_script(main, "--save", str(folder), "--train-iters", "2")
    return str(folder)


@pytest.fixture(scope="module")
def straight(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Any], Path]:
    """Losses and gradient norms by iteration of one process that never stopped, and its checkpoints."""
    folder = tmp_path_factory.mktemp("straight")
    tensorboard = ["--tensorboard-dir", str(folder / "tensorboard"), "--eval-interval", "2"]
    (result,) = run_script(main, "--pretrained-checkpoint", base, "--save", str(folder), *LORA, *tensorboard)
    return result, folder


def _same_steps(found: dict[int, Any], expected: dict[int, Any], iterations: Sequence[int]) -> None:
    assert sorted(found) == list(iterations)
    for iteration in found:
        torch.testing.assert_close(found[iteration], expected[iteration], rtol=2e-6, atol=0)


def _same_adapters(found: Path, expected: Path) -> None:
    ours, theirs = (open_adapter(folder).modules for folder in (found, expected))
    assert [module.name for module in ours] == [module.name for module in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.A.load(), other.A.load(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.B.load(), other.B.load(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "layout", "options"),
    [
        (4, {"tensor": 2, "pipeline": 2}, RESHARDABLE),
        (2, {}, ["--ckpt-fully-parallel-load", *RESHARDABLE]),
    ],
    ids=["TP2xPP2", "DP2"],
)
def test_every_layout_gives_the_same_numbers(
    base: str, straight: Any, size: int, layout: dict[str, int], options: list[str], tmp_path: Path
) -> None:
    save = ["--save", str(tmp_path)]
    ranks = run_script(main, "--pretrained-checkpoint", base, *save, *LORA, *options, size=size, **layout)
    _same_steps(ranks[-1], straight[0], range(1, ITERATIONS + 1))
    _same_adapters(tmp_path, straight[1])
    with Reader(tmp_path / "iter_0000004") as reader:
        assert all("adapter.decoder" in key for key in reader.tensors())


@pytest.mark.parametrize(
    ("stopped", "resumed", "options"),
    [
        ({"size": 1}, {"size": 1}, ["--exit-on-missing-checkpoint"]),
        ({"size": 2, "tensor": 2}, {"size": 2, "pipeline": 2}, RESHARDABLE),
        (
            {"size": 2, "pipeline": 2, "virtual": 2},
            {"size": 2},
            [*RESHARDABLE, *ASYNCHRONOUS],
        ),
    ],
    ids=["TP1", "TP2-PP2", "PP2xVPP2-DP2"],
)
def test_a_run_that_stops_goes_on(
    base: str,
    straight: Any,
    stopped: Any,
    resumed: Any,
    options: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--pretrained-checkpoint", base, "--save", str(tmp_path), "--load", str(tmp_path), *LORA, *options]
    ranks = run_script(main, *arguments, "--exit-interval", "2", **stopped)
    assert ("scheduled an async checkpoint save at iteration       2" in capfd.readouterr().out) == (
        "--async-save" in options
    )
    _same_steps(ranks[-1], straight[0], [1, 2])
    ranks = run_script(main, *arguments, **resumed)
    _same_steps(ranks[-1], straight[0], [3, 4])
    _same_adapters(tmp_path, straight[1])


def test_a_damaged_checkpoint_is_named_and_passed_over(
    base: str, straight: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(straight[1], tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "iter_0000004" / "__0_0.distcp"
    os.truncate(shard, 1000)
    chosen = Namespace(load=str(tmp_path), pretrained_checkpoint=base, finetune=False, ckpt_step=4)
    with pytest.raises(ValueError, match=rf"{shard} is truncated"):
        Source.of(chosen)
    newest = Namespace(**{**vars(chosen), "ckpt_step": None})
    assert Source.of(newest).adapter == tmp_path / "iter_0000002"
    assert f"iter_0000004 is damaged and is passed over: {shard} is truncated: 1000 bytes" in caplog.text
    place = ["--pretrained-checkpoint", base, "--save", str(tmp_path), "--load", str(tmp_path)]
    ranks = run_script(main, *place, *LORA, size=2, pipeline=2)
    _same_steps(ranks[-1], straight[0], [3, 4])
    _same_adapters(tmp_path, straight[1])
    for each in tmp_path.glob("iter_*"):
        (each / "metadata.json").unlink()
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole.*iter_0000004/metadata.json is missing; .*0002"
    ):
        Source.of(newest)


def test_logging_and_evaluation_are_megatrons(straight: Any) -> None:
    events = EventAccumulator(str(straight[1] / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("lm loss")}
    assert logged == pytest.approx({iteration: loss for iteration, (loss, _) in straight[0].items()})
    assert {event.step for event in events.Scalars("lm loss validation")} >= {2, 4}


def test_the_adapter_is_exported_for_peft(straight: Any, tmp_path: Path) -> None:
    assert export_peft.main(["--adapter", str(straight[1]), "--output", str(tmp_path / "peft")]) == 0
    ours, theirs = open_adapter(tmp_path / "peft"), open_adapter(straight[1])
    for one, other in zip(ours.modules, theirs.modules, strict=True):
        assert one.name == other.name and torch.equal(one.B.load(), other.B.load())


def _with_our_trainer(rank: int, base: str) -> list[tuple[float, float]]:
    with training_on_cpu([*MODEL.split(), *STEPS.split(), *LORA, "--pretrained-checkpoint", base]):
        pretrain_gpt_lora.use_compiled_index_builder()
        args = parse_and_validate_args(extra_args_provider=add_lora_args)
        initialize_megatron(allow_no_cuda=True)
        config = gpt_config_from_args(args)
        config.pre_wrap_hooks.append(pre_wrap_hook)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = GPTModelBuilder(config).build_distributed_models(groups, wrap_with_ddp=False)
        chunks[0]._forward_pre_hooks.clear()  # Our trainer says itself which rows a micro batch holds.
        chunks[0].config.finalize_model_grads_func = finalize_model_grads
        trainer = Trainer(
            chunks, OptimizerSettings(lr=1e-2, decay_iters=ITERATIONS, decay_style="linear", clip_grad=1.0)
        )
        rows, _, _ = pretrain_gpt_lora.datasets([ITERATIONS * ROWS, ROWS, ROWS])
        results = []
        for iteration in range(ITERATIONS):
            first = range(0, ROWS, MICRO_ROWS)
            batches = [
                _batch([rows[iteration * ROWS + row + number] for number in range(MICRO_ROWS)], row) for row in first
            ]
            result = trainer.step(batches, iteration)
            results.append((result.loss, result.grad_norm))
        return results


def _batch(rows: Sequence[dict[str, Any]], first_row: int) -> dict[str, Any]:
    names = ("tokens", "labels", "loss_mask", "position_ids")
    stacked = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
    return {**stacked, "attention_mask": None, "first_row": first_row}


def test_its_losses_are_our_own_trainers(base: str, straight: Any) -> None:
    (ours,) = run_ranks(1, _with_our_trainer, base)
    for (loss, norm), (its_loss, its_norm) in zip(ours, straight[0].values(), strict=True):
        assert loss == pytest.approx(its_loss, rel=1e-6)
        assert norm == pytest.approx(its_norm, rel=1e-5)


def _provide(**chunk: Any) -> torch.nn.Module:
    """A model provider as older scripts have one."""
    groups = chunk.pop("pg_collection") or ProcessGroupCollection.use_mpu_process_groups()
    del chunk["config"]
    return GPTModelBuilder(gpt_config_from_args(get_args())).build_model(groups, **chunk)


def _main_of_an_older_script() -> None:
    pretrain_gpt_lora.use_compiled_index_builder()
    args = parse_and_validate_args(extra_args_provider=add_lora_args)
    cfg = pretrain_cfg_container_from_args(args)
    kind = ModelType.encoder_or_decoder
    pretrain(cfg, pretrain_gpt_lora.datasets, kind, pretrain_gpt_lora.forward_step, model_provider=with_lora(_provide))


def test_a_model_provider_is_wrapped_where_there_are_no_hooks(base: str, straight: Any) -> None:
    layout = {"size": 2, "pipeline": 2, "virtual": 2}
    ranks = run_script(_main_of_an_older_script, "--pretrained-checkpoint", base, *LORA, **layout)
    _same_steps(ranks[-1], straight[0], range(1, ITERATIONS + 1))


def _hunks_of_the_readme() -> list[tuple[str, str]]:
    """The README's diff: lines as they were and as they are then."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert sum(line.startswith("+") for line in diff.splitlines()) <= 5
    hunks = [hunk.splitlines() for hunk in diff.split("\n\n")]
    return [
        (
            "".join(f"{line[1:]}\n" for line in hunk if line[0] != "+"),
            "".join(f"{line[1:]}\n" for line in hunk if line[0] != "-"),
        )
        for hunk in hunks
    ]


def _main_before_the_diff() -> None:
    """The script's main as it was before the README's diff was applied to it."""
    source = Path(pretrain_gpt_lora.__file__).read_text(encoding="utf-8")
    for before, after in _hunks_of_the_readme():
        assert source.count(after) == 1, f"the script has no such lines:\n{after}"
        source = source.replace(after, before)
    code = source.partition('"""\n\n')[2]
    assert "lora" not in code
    names: dict[str, Any] = {"__name__": "script_before_the_diff"}
    exec(compile(code, "script_before_the_diff", "exec"), names)
    names["main"]()


def test_without_options_the_script_is_what_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    (ours,) = run_script(main, "--eval-interval", "2")
    assert "validation loss at iteration 4 |" in capfd.readouterr().out
    (plain,) = run_script(_main_before_the_diff, "--eval-interval", "2")
    assert ours == plain


@pytest.mark.parametrize(
    ("load", "pretrained", "finetune", "error"),
    [
        (None, None, False, "LoRA needs a base model: give its checkpoint as --pretrained-checkpoint"),
        ("empty", None, True, r"LoRA needs a base model.*empty holds none"),
        ("adapter", None, False, r"adapter holds an adapter without its base: give --pretrained-checkpoint too"),
        ("base", None, False, "base holds no adapter to go on with.*--finetune"),
        ("base", "base", False, "which of them is it"),
        (None, "empty", False, "empty holds no checkpoint"),
        (None, "adapter", False, "adapter holds an adapter, not a base model"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    base: str, straight: Any, load: str | None, pretrained: str | None, finetune: bool, error: str, tmp_path: Path
) -> None:
    for name, target in (("base", base), ("adapter", straight[1])):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "empty").mkdir()
    load, pretrained = (str(tmp_path / name) if name else None for name in (load, pretrained))
    args = Namespace(load=load, pretrained_checkpoint=pretrained, finetune=finetune, ckpt_step=None)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        Source.of(args)


def test_a_base_in_load_is_taken_with_finetune(base: str, straight: Any) -> None:
    (result,) = run_script(main, "--load", base, "--finetune", *LORA)
    _same_steps(result, straight[0], range(1, ITERATIONS + 1))
    # The model starts as the base: a new adapter adds nothing to its first loss.
    (plain,) = run_script(main, "--load", base, "--finetune", "--train-iters", "1")
    assert plain[1][0] == straight[0][1][0]


def test_a_base_in_megatrons_older_format_is_taken(straight: Any, tmp_path: Path) -> None:
    run_script(main, "--save", str(tmp_path), "--train-iters", "2", "--ckpt-format", "torch")
    older = ["--pretrained-checkpoint", str(tmp_path), "--auto-detect-ckpt-format", *LORA]
    (result,) = run_script(main, *older)
    _same_steps(result, straight[0], range(1, ITERATIONS + 1))
    with pytest.raises(AssertionError, match=r"is not this model's: output_layer\.weight is in one of them only"):
        run_script(main, *older, "--untie-embeddings-and-output-weights")


def test_finetune_takes_the_adapters_weights_alone(base: str, straight: Any) -> None:
    again = ["--pretrained-checkpoint", base, "--load", str(straight[1]), "--finetune", *LORA]
    (result,) = run_script(main, *again, "--train-iters", "2")
    assert sorted(result) == [1, 2]
    assert abs(result[1][0] - straight[0][1][0]) > 0.1


def test_a_stage_may_hold_no_adapter(base: str, tmp_path: Path) -> None:
    first_layer = ["--pretrained-checkpoint", base, "--lora-rank", "2", "--lora-layers", "0"]
    (alone,) = run_script(main, *first_layer)
    place = ["--save", str(tmp_path), "--load", str(tmp_path)]
    for exit_interval, iterations in (("2", [1, 2]), ("100", [3, 4])):
        ranks = run_script(main, *first_layer, *place, "--exit-interval", exit_interval, size=2, pipeline=2)
        _same_steps(ranks[-1], alone, iterations)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--num-layers", "2"], r"decoder\.layers\S+ has shape \(4,|it holds decoder"),
        (["--untie-embeddings-and-output-weights"], r"it lacks output_layer\.weight"),
        (["--lora-rank", "3", "--load", "ADAPTER"], "its adapter has rank 4 at .* the options say 3"),
        (["--ckpt-format", "torch", "--save", "SAVE"], "adapter checkpoints are torch_dist's"),
    ],
)
def test_what_does_not_fit_is_refused(base: str, straight: Any, options: list[str], error: str, tmp_path: Path) -> None:
    places = {"ADAPTER": str(straight[1]), "SAVE": str(tmp_path)}
    with pytest.raises(AssertionError, match=error):
        run_script(main, "--pretrained-checkpoint", base, *LORA, *(places.get(option, option) for option in options))


@pytest.mark.parametrize("option", ["--load", "--pretrained-checkpoint"])
def test_an_adapter_without_loras_options_is_refused(straight: Any, option: str) -> None:
    with pytest.raises(AssertionError, match=rf"{option} \S+ holds an adapter: give the --lora-\.\.\. options"):
        run_script(main, option, str(straight[1]), size=2, tensor=2)
