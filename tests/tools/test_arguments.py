"""The trainer's options and the arithmetic that follows from them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlora.config import LoraConfig
from mlora.train import OptimizerSettings
from mlora_tools.arguments import Arguments
from mlora_tools.options import UsageError
from parallel.sizes import ParallelSizes


def parse(*words: Any) -> Arguments:
    return Arguments.parse(["--model", "m", "--data", "d.jsonl", "--output", "o", *map(str, words)])


def test_the_quickstarts_command_line() -> None:
    """What tools/quickstart.py gives, word for word of its options."""
    from mlora_tools.quickstart import SETTINGS

    arguments = parse(
        "--eval-data", "e", "--lr-warmup-iters", 5, "--exit-interval", 30, "--sequence-parallel", *SETTINGS
    )
    assert arguments.batches.global_batch_size == 32
    assert arguments.reports.exit_interval == 30
    assert arguments.layout.sequence_parallel


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--micro-batch-size", 0], "--micro-batch-size 0 must be at least 1"),
        (["--global-batch-size", -4], "--global-batch-size -4 must be at least 1"),
        (["--seq-length", 0], "--seq-length 0 must be at least 1"),
        (["--train-iters", 0], "--train-iters 0 must be at least 1"),
        (["--train-iters", 5, "--train-epochs", 1], "--train-iters and --train-epochs say the same thing"),
        (["--train-epochs", 0], "--train-epochs 0.0 must be above 0"),
        (["--seed", -1], "--seed -1 must be at least 0"),
        (["--lr", "nan"], "--lr nan must be above 0"),
        (["--lr", 0], "--lr 0.0 must be above 0"),
        (["--lr", "inf"], "--lr inf must be above 0"),
        (["--lr", 0.1, "--min-lr", 0.2], "--min-lr 0.2 is above --lr 0.1"),
        (["--min-lr", 1e-6, "--lr-decay-style", "constant"], "--min-lr 1e-06 goes with another --lr-decay-style"),
        (["--eval-interval", 5], "--eval-interval goes with --eval-data"),
        (["--eval-iters", 5], "--eval-iters goes with --eval-data"),
        (["--weight-decay", -0.1], "--weight-decay -0.1 must be at least 0"),
        (["--clip-grad", "nan"], "--clip-grad nan must be at least 0"),
        (["--adam-beta2", 1], "--adam-beta2 1.0 must be below 1"),
        (
            ["--lr-warmup-iters", 3, "--lr-warmup-fraction", 0.1],
            "--lr-warmup-iters and --lr-warmup-fraction say the same",
        ),
        (["--lr-warmup-fraction", 1], "--lr-warmup-fraction 1.0 must be at least 0 and below 1"),
        (["--fp8-recipe", "tensorwise"], "--fp8-recipe and --fp8-param-gather go with --fp8-format"),
        (["--transformer-impl", "transformer_engine", "--fp8-format", "hybrid"], "--fp8-format needs --bf16"),
        (["--fp8-format", "hybrid", "--bf16"], "--fp8-format needs --transformer-impl transformer_engine"),
        (["--recompute-method", "block"], "--recompute-method goes with --recompute-granularity full"),
        (
            ["--recompute-granularity", "full", "--recompute-modules", "mlp"],
            "--recompute-modules goes with --recompute-granularity selective",
        ),
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "layernorm"],
            "--recompute-modules layernorm: it can be core_attn and mlp",
        ),
        (
            ["--num-layers-per-virtual-pipeline-stage", 1, "--num-virtual-stages-per-pipeline-rank", 2],
            "say the same thing",
        ),
        (["--num-virtual-stages-per-pipeline-rank", 0], "must be at least 1"),
        (["--distributed-timeout-minutes", 0], "--distributed-timeout-minutes 0.0 must be above 0"),
        (["--save-interval", 0], "--save-interval 0 must be at least 1"),
        (["--keep-last", 0], "--keep-last 0 must be at least 1"),
        (["--lora-config", "c.json", "--lora-rank", 4], "--lora-config is given, so --lora-rank must be in c.json"),
    ],
)
def test_options_out_of_range_or_against_each_other(words: list[Any], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(*words)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("words", "world", "expected"),
    [
        (["--tensor-model-parallel-size", 2], 3, "world size 3 does not fit tensor 2 x pipeline 1"),
        (["--global-batch-size", 12, "--micro-batch-size", 2], 4, "--global-batch-size 12 is not a multiple"),
        (
            ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--seq-length", 63],
            2,
            "--seq-length 63 is not a multiple of --tensor-model-parallel-size 2",
        ),
        (
            [
                "--pipeline-model-parallel-size",
                2,
                "--num-virtual-stages-per-pipeline-rank",
                2,
                "--global-batch-size",
                3,
            ],
            2,
            "makes 3 micro batches a rank; the interleaved schedule needs a multiple of",
        ),
    ],
)
def test_what_does_not_divide(words: list[Any], world: int, expected: str) -> None:
    arguments = parse(*words)
    with pytest.raises(ValueError) as error:
        arguments.check_division(arguments.layout.sizes(4), world)
    assert expected in str(error.value)


def test_what_divides() -> None:
    for words, world in (
        (["--global-batch-size", 16, "--micro-batch-size", 2, "--tensor-model-parallel-size", 2], 8),
        (["--seq-length", 63, "--tensor-model-parallel-size", 2], 2),
        (
            [
                "--pipeline-model-parallel-size",
                2,
                "--num-virtual-stages-per-pipeline-rank",
                2,
                "--global-batch-size",
                4,
            ],
            2,
        ),
        (["--pipeline-model-parallel-size", 2, "--global-batch-size", 3], 2),
    ):
        arguments = parse(*words)
        arguments.check_division(arguments.layout.sizes(4), world)


def test_both_ways_to_say_virtual_stages() -> None:
    pipeline = ["--pipeline-model-parallel-size", 2]
    expected = ParallelSizes(pipeline=2, virtual_pipeline=4)
    assert parse(*pipeline, "--num-layers-per-virtual-pipeline-stage", 1).layout.sizes(8) == expected
    assert parse(*pipeline, "--num-virtual-stages-per-pipeline-rank", 4).layout.sizes(8) == expected
    # One chunk a stage is the plain schedule.
    assert parse(*pipeline, "--num-layers-per-virtual-pipeline-stage", 4).layout.sizes(8) == ParallelSizes(pipeline=2)
    with pytest.raises(
        UsageError, match="3 x --pipeline-model-parallel-size 2 = 6 does not divide the model's 8 layers"
    ):
        parse(*pipeline, "--num-layers-per-virtual-pipeline-stage", 3).layout.sizes(8)


def test_epochs_count_whole_passes_over_the_rows() -> None:
    assert parse("--global-batch-size", 8).batches.iterations(17) == 3
    assert parse("--global-batch-size", 8, "--train-epochs", 2).batches.iterations(17) == 5
    assert parse("--global-batch-size", 8, "--train-epochs", 0.5).batches.iterations(17) == 2
    assert parse("--global-batch-size", 8, "--train-iters", 9).batches.iterations(17) == 9


def test_the_schedule_is_resolved() -> None:
    def resolved(*words: Any) -> OptimizerSettings:
        return OptimizerSettings(**parse(*words).schedule.optimizer(100))

    assert (resolved().warmup_iters, resolved().decay_iters) == (0, 100)
    assert resolved("--lr-warmup-fraction", 0.1, "--lr-decay-iters", 50).warmup_iters == 5
    assert resolved("--lr-decay-iters", 50).decay_iters == 50
    assert resolved("--adam-beta2", 0.95, "--lora-plus-ratio", 4).lora_plus_ratio == 4
    # A constant rate does not depend on the run's length, so that a resumed run may be longer.
    constant = ("--lr-decay-style", "constant", "--lr-warmup-iters", 7)
    assert parse(*constant).schedule.optimizer(100) == parse(*constant).schedule.optimizer(200)
    with pytest.raises(UsageError, match="100 iterations of warm-up must be fewer than the 100"):
        resolved("--lr-warmup-iters", 100)


def test_recomputation_in_megatrons_words() -> None:
    assert parse().batches.recompute() == {}
    assert parse("--recompute-granularity", "full").batches.recompute() == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    selective = parse("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp")
    assert selective.batches.recompute()["recompute_modules"] == ["core_attn", "mlp"]


def lora(*words: Any, seed: int = 1) -> LoraConfig:
    return LoraConfig.from_dict(parse(*words).lora.fields(seed))


def test_the_adapters_configuration() -> None:
    assert lora() == LoraConfig(r=8, lora_alpha=8.0, seed=1)
    config = lora(
        *("--lora-rank", 4, "--lora-alpha", 32, "--lora-dropout", 0.1, "--lora-target-modules", "q_proj", "linear_fc1"),
        *("--lora-exclude-modules", "up_proj", "--lora-layers", 0, 3, "--lora-use-rslora", "--lora-init", "gaussian"),
        *("--lora-shared-a", "--lora-use-dora", "--lora-adapter-dtype", "float32"),
        *("--lora-modules-to-save", "norm", "lm_head"),
        seed=5,
    )
    assert config == LoraConfig(
        r=4,
        lora_alpha=32.0,
        lora_dropout=0.1,
        target_modules=["q_proj", "linear_fc1"],
        exclude_modules=["up_proj"],
        modules_to_save=["norm", "lm_head"],
        layers_to_transform=[0, 3],
        use_rslora=True,
        use_dora=True,
        init_lora_weights="gaussian",
        shared_A=True,
        adapter_dtype="float32",  # type: ignore[arg-type]
        seed=5,
    )
    assert lora("--lora-init", "false").init_lora_weights is False
    assert lora("--lora-init", "true").init_lora_weights is True
    assert lora("--lora-init", "pissa_niter_16").init_lora_weights == "pissa_niter_16"
    with pytest.raises(ValueError, match="init_lora_weights is 'eva'; it can be true, false,"):
        lora("--lora-init", "eva")


def test_one_word_that_is_no_name_is_a_regular_expression() -> None:
    assert lora("--lora-target-modules", r".*\.(q|v)_proj").target_modules == r".*\.(q|v)_proj"
    assert lora("--lora-target-modules", "q_proj").target_modules == ("q_proj",)
    assert lora("--lora-target-modules", "model.layers.0.self_attn.q_proj").target_modules == (
        "model.layers.0.self_attn.q_proj",
    )
    with pytest.raises(UsageError, match=re.escape("give names, or one regular expression; '.*q' is no name")):
        lora("--lora-target-modules", "v_proj", ".*q")
    with pytest.raises(UsageError, match=re.escape("--lora-exclude-modules: '.*(q' is no regular")):
        lora("--lora-exclude-modules", ".*(q")


def test_a_peft_file_in_place_of_options(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"})
    )
    assert lora("--lora-config", path, seed=9) == LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], seed=9)
    path.write_text(json.dumps({"r": 3, "seed": 2}))
    assert lora("--lora-config", path, seed=9).seed == 2
    path.write_text("[]")
    with pytest.raises(UsageError, match="expected a JSON object"):
        lora("--lora-config", path)
    for broken in (b"{", b'{"r": "\xe4"}'):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match=r"adapter_config\.json: not readable as JSON"):
            lora("--lora-config", path)


def test_every_option_is_plain_for_the_record() -> None:
    plain = parse("--eval-data", "e1", "e2", "--lora-layers", 1).plain()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["model"], plain["eval_data"], plain["lora_layers"], plain["lr"]) == ("m", ["e1", "e2"], [1], 2e-4)


def test_fp8_in_megatrons_words() -> None:
    assert parse().implementation.overrides() == {}
    words = [
        "--bf16",
        "--transformer-impl",
        "transformer_engine",
        "--fp8-format",
        "hybrid",
        "--fp8-recipe",
        "tensorwise",
        "--fp8-param-gather",
    ]
    assert parse(*words).implementation.overrides() == {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_param": True}
