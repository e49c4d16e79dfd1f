"""The trainer from its command line to its files, on forked ranks: layouts, stops, resumptions, failures."""

import importlib.util
import json
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  # Imported once here, not in every forked rank.
from safetensors.torch import load_file

import mlora_tools.run  # noqa: F401  # Likewise.
from mlora_tools.finetune_lora import main
from tests.tiny import VOCAB
from tests.tools.runs import Ranks, metrics, run, write_base, write_pairs

TP2_PP2_SP = (
    "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--sequence-parallel"
)  # fmt: skip
PP2_VPP2 = ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1)


@dataclass(frozen=True)
class Files:
    """A base model and data."""

    folder: Path

    @property
    def given(self) -> tuple[Any, ...]:
        return (
            *("--model", self.folder / "base", "--data", self.folder / "train.jsonl"),
            *("--eval-data", self.folder / "heldout.jsonl", "--seq-length", 24, "--global-batch-size", 8, "--lr", 0.02),
            *("--log-interval", 1),
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    write_base(folder / "base")
    write_pairs(folder / "train.jsonl", 50)
    write_pairs(folder / "heldout.jsonl", 9, first=50)
    return Files(folder)


SEVEN = (
    *("--train-iters", 7, "--eval-interval", 3, "--save-interval", 3, "--lora-dropout", 0.1, "--packing"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", 2, "--lora-plus-ratio", 4, "--keep-last", 2),
    *("--log-adapter-norms-interval", 3),
)


@pytest.fixture(scope="module")
def straight(files: Files) -> Path:
    """Seven iterations at TP 2 x PP 2 with sequence parallel, without a stop."""
    output = files.folder / "straight"
    ranks = run(
        4, [*files.given, *SEVEN, *TP2_PP2_SP, "--micro-batch-size", 2, "--output", output], files.folder / "log"
    )
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].text
    assert [rank.text for rank in ranks[1:]] == [""] * 3
    return output


@pytest.fixture(scope="module")
def half(files: Files) -> Path:
    """The first three of the same."""
    output = files.folder / "half"
    argv = [*files.given, *SEVEN, *TP2_PP2_SP, "--micro-batch-size", 2, "--output", output, "--exit-interval", 3]
    ranks = run(4, argv, files.folder / "log-half")
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].text
    assert "stopped after iteration 3 of 7" in ranks[0].text and "--resume" in ranks[0].text
    assert not (output / "peft").exists() and (output / "loss.png").exists()
    return output


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> bool:
    """Equal records but for the rounding of another order of sums."""
    return [flat(record) for record in ours] == [pytest.approx(flat(record), rel=1e-4) for record in theirs]


def flat(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers by name, those of each projection too."""
    norms = record.get("adapter_norms", {})
    return {key: value for key, value in record.items() if key != "adapter_norms"} | {
        f"{projection} {name}": norm for projection, values in norms.items() for name, norm in values.items()
    }


def test_everything_promised_is_there(straight: Path) -> None:
    assert sorted(path.name for path in straight.iterdir()) == [
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "peft", "ranks.json", "tensorboard"
    ]  # fmt: skip
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["iter_0000006", "iter_0000007"]
    records = metrics(straight)
    assert [record["iteration"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["iteration"] for record in records if "eval_loss" in record] == [0, 3, 6, 7]
    assert [round(record["lr"], 9) for record in records if "lr" in record][:3] == [0, 0.01, 0.02]
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert evaluations == sorted(evaluations, reverse=True)
    norms = {record["iteration"]: record["adapter_norms"] for record in records if "adapter_norms" in record}
    assert norms.keys() == {3, 6} and len(norms[3]) == 4 * 7  # layers and projections
    grown = [norms[number]["model.layers.3.mlp.down_proj"]["BA"] for number in (3, 6)]
    assert 0 < grown[0] < grown[1]
    assert all(json.loads(line).get("peak_memory", 1) > 0 for line in (straight / "metrics.jsonl").open())
    config = json.loads((straight / "config.json").read_text())
    assert config["parameters"]["trainable"] == sum(
        tensor.numel() for tensor in load_file(straight / "peft" / "adapter_model.safetensors").values()
    )
    assert config["parameters"]["total"] > config["parameters"]["trainable"]
    start = config["starts"][0]
    assert (start["world_size"], start["tensor"], start["pipeline"], start["data"]) == (4, 2, 2, 1)
    assert start["sequence_parallel"] is True and start["versions"]["torch"]
    assert config["arguments"]["global_batch_size"] == 8 and config["lora"]["lora_dropout"] == 0.1
    assert (straight / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, ("--micro-batch-size", 8)),
        (2, PP2_VPP2),
        (2, ("--micro-batch-size", 4)),
        (4, ("--tensor-model-parallel-size", 2)),
    ],
    ids=["one process", "PP2xVPP2", "DP2", "TP2xDP2"],
)
def test_every_layout_and_micro_batch_gives_the_same_run(
    files: Files, straight: Path, tmp_path: Path, size: int, layout: tuple[Any, ...]
) -> None:
    ranks = run(size, [*files.given, *SEVEN, *layout, "--output", tmp_path / "run"], tmp_path / "log")
    assert [rank.code for rank in ranks] == [0] * size, ranks[0].text
    assert close(metrics(tmp_path / "run"), metrics(straight))


def test_who_the_ranks_are_and_what_they_send(straight: Path) -> None:
    told = json.loads((straight / "ranks.json").read_text())
    assert told["iteration"] == 1 and [rank["rank"] for rank in told["ranks"]] == [0, 1, 2, 3]
    assert [(rank["tensor"], rank["pipeline"], rank["data"]) for rank in told["ranks"]] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)
    ]  # fmt: skip
    for rank in told["ranks"]:
        assert rank["host"] and rank["device"] == "cpu"
        sent = {(flow["kind"], flow["axis"], flow["direction"]): flow for flow in rank["collectives"]}
        gathered = sent["all_gather", "tensor model parallel", "forward"]
        assert gathered["size"] == 2 and gathered["count"] > 0 and gathered["bytes"] > gathered["count"]
        # Four micro batches of 2 x 24 tokens of 32 float32 features, between two stages.
        kind = "send" if rank["pipeline"] == 0 else "recv"
        between = [flow for key, flow in sent.items() if key[0] == kind and "pipeline" in key[1]]
        assert between and all(flow["bytes"] == flow["count"] * 2 * 24 // 2 * 32 * 4 for flow in between), sent


def test_packing_changes_nothing_about_a_sample(files: Files, straight: Path, tmp_path: Path) -> None:
    ranks = run(1, [*files.given, "--train-iters", 1, "--output", tmp_path / "run"], tmp_path / "log")
    assert ranks[0].code == 0, ranks[0].text
    alone, packed = metrics(tmp_path / "run")[0], metrics(straight)[0]
    assert alone["eval_target_tokens"] == packed["eval_target_tokens"]
    assert alone["eval_loss"] == pytest.approx(packed["eval_loss"], rel=1e-5)


def test_a_resumed_run_equals_one_that_never_stopped(files: Files, straight: Path, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(half, output)
    argv = [*files.given, *SEVEN, *TP2_PP2_SP, "--micro-batch-size", 2, "--output", output, "--resume"]
    ranks = run(4, argv, tmp_path / "log")
    assert [rank.code for rank in ranks] == [0] * 4, ranks[0].text
    assert metrics(output) == metrics(straight)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / "peft" / name).read_bytes() == (straight / "peft" / name).read_bytes()
    assert [start["iteration"] for start in json.loads((output / "config.json").read_text())["starts"]] == [0, 3]


def test_a_run_resumes_at_another_layout(files: Files, straight: Path, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(half, output)
    # As if it had gone on and was killed: what came after the checkpoint is made again.
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "loss": 99.0, "lr": 1, "grad_norm": 1, "tokens": 1, "target_tokens": 1}\n{"itera')
    ranks = run(2, [*files.given, *SEVEN, *PP2_VPP2, "--output", output, "--resume"], tmp_path / "log")
    assert [rank.code for rank in ranks] == [0] * 2, ranks[0].text
    assert close(metrics(output), metrics(straight))
    assert [start["world_size"] for start in json.loads((output / "config.json").read_text())["starts"]] == [4, 2]


def test_a_finished_run_resumes_to_what_it_lacks(files: Files, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "peft")
    records = [record for record in metrics(output) if record["iteration"] < 7 or "loss" in record]
    (output / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ranks = run(1, [*files.given, *SEVEN, "--output", output, "--resume"], tmp_path / "log")
    assert ranks[0].code == 0, ranks[0].text
    assert close(metrics(output), metrics(straight))
    ours, theirs = (path / "peft" / "adapter_model.safetensors" for path in (output, straight))
    assert ours.read_bytes() == theirs.read_bytes()


ENDLESS = ("--train-iters", 100_000, "--lr-decay-style", "constant", "--eval-interval", 2)


def test_sigterm_to_some_ranks_saves_on_all(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ranks = Ranks(4, [*files.given, *ENDLESS, *TP2_PP2_SP, "--output", output], tmp_path / "log")
    ranks.wait_for("iteration 2/")
    ranks.signal(signal.SIGTERM, [1, 3])
    ends = ranks.wait()
    assert [end.code for end in ends] == [0] * 4, ends[0].text
    done = max(record["iteration"] for record in metrics(output))
    assert f"stopped after iteration {done} of 100000" in ends[0].text
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"iter_{done:07d}"]
    # It goes on from there; with a constant learning rate the end may be another one.
    argv = [*files.given, *ENDLESS, "--train-iters", done + 1, *TP2_PP2_SP, "--output", output, "--resume"]
    ends = run(4, argv, tmp_path / "log")
    assert [end.code for end in ends] == [0] * 4, ends[0].text
    assert [record["iteration"] for record in metrics(output) if "loss" in record] == list(range(1, done + 2))
    assert {done + 1, *range(0, done + 1, 2)} == {
        record["iteration"] for record in metrics(output) if "eval_loss" in record
    }


def test_a_killed_rank_ends_all_and_the_checkpoint_stays(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = [*files.given, *ENDLESS, "--save-interval", 2, *TP2_PP2_SP, "--output", output]
    ranks = Ranks(4, argv, tmp_path / "log")
    ranks.wait_for("iteration 3/")
    ranks.signal(signal.SIGKILL, [2])
    ends = ranks.wait(60)
    assert ends[2].code == -signal.SIGKILL
    assert [end.code for end in ends if end.code != -signal.SIGKILL] == [1, 1, 1]
    assert ends[0].text.splitlines()[-1].startswith("error: another rank has ended or cannot be reached")
    newest = max(path.name for path in (output / "checkpoints").iterdir() if not path.name.endswith(".partial"))
    done = int(newest.removeprefix("iter_"))
    argv = [*files.given, *ENDLESS, "--train-iters", done + 1, "--output", output, "--resume"]
    ends = run(1, argv, tmp_path / "log")
    assert ends[0].code == 0, ends[0].text


def test_a_loss_that_is_no_number_stops_the_run(files: Files, tmp_path: Path) -> None:
    argv = [*files.given, "--lr", 1e30, "--train-iters", 6, "--save-interval", 1, "--output", tmp_path / "run"]
    ranks = run(2, argv, tmp_path / "log")
    assert [rank.code for rank in ranks] == [1, 1]
    error = ranks[0].text.splitlines()[-1]
    assert error.startswith("error: the ") and "of iteration 2 is nan" in error
    assert (tmp_path / "run" / "checkpoints" / "iter_0000001").is_dir()
    assert not (tmp_path / "run" / "checkpoints" / "iter_0000002").exists()


def _small_files_only() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_save_that_fails_leaves_what_is_there(files: Files, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(half, output)
    before = {path: path.read_bytes() for path in (output / "checkpoints").rglob("*") if path.is_file()}
    argv = [*files.given, *SEVEN, "--output", output, "--resume"]
    ranks = run(2, argv, tmp_path / "log", before=_small_files_only)
    assert [rank.code for rank in ranks] == [1, 1], ranks[0].text
    assert ranks[0].text.splitlines()[-1].startswith("error: ") and "File too large" in ranks[0].text
    assert {path: path.read_bytes() for path in before} == before
    assert not (output / "checkpoints" / "iter_0000006").exists()


def malformed_line(folder: Path) -> list[Any]:
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    return ["--data", folder / "bad.jsonl"]


def empty_data(folder: Path) -> list[Any]:
    (folder / "bad.jsonl").write_text("\n")
    return ["--data", folder / "bad.jsonl"]


def truncated_weights(folder: Path) -> list[Any]:
    base = write_base(folder / "truncated")
    victim = sorted(base.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    return ["--model", base]


def no_tokenizer(folder: Path) -> list[Any]:
    base = write_base(folder / "bare")
    for path in base.glob("tokenizer*"):
        path.unlink()
    return ["--model", base]


def full_output(folder: Path) -> list[Any]:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("precious")
    return []


def config_file(folder: Path) -> list[Any]:
    (folder / "c.yaml").write_text("tensor-model-parallel-size: 1\nlora-rnak: 4\n")
    return ["--config", folder / "c.yaml"]


def words(*given: Any) -> Callable[[Path], list[Any]]:
    return lambda folder: list(given)


@pytest.mark.parametrize(
    ("size", "more", "code", "expected"),
    [
        (1, malformed_line, 1, "bad.jsonl:3: not valid JSON"),
        (1, empty_data, 1, "bad.jsonl: the file has no record"),
        (2, words("--data", "/nowhere/d.jsonl"), 1, "No such file or directory: '/nowhere/d.jsonl'"),
        (1, words("--model", "/nowhere"), 1, "/nowhere/config.json is missing"),
        (2, truncated_weights, 1, ".safetensors cannot be read"),
        (1, no_tokenizer, 1, "has no tokenizer that can be loaded"),
        (2, full_output, 1, "run exists and is not empty"),
        (2, words("--resume", "--exit-on-missing-checkpoint"), 1, "--resume: there is no checkpoint in"),
        (1, config_file, 2, "c.yaml: unknown key 'lora-rnak'; did you mean lora_rank?"),
        (
            2,
            words("--lora-target-modules", "q_porj"),
            1,
            "'q_porj' matches no module on any stage; did you mean 'q_proj'",
        ),
        (1, words("--lora-rank", 0), 1, "r is 0"),
        (2, words("--tensor-model-parallel-size", 3), 1, "world size 2 does not fit tensor 3"),
        (2, words("--tensor-model-parallel-size", 0), 1, "tensor parallel size is 0"),
        (3, words("--tensor-model-parallel-size", 3), 1, "8 attention heads do not divide by tensor parallel size 3"),
        (3, words("--pipeline-model-parallel-size", 3), 1, "4 layers do not divide by 3 pipeline stages"),
        (2, words("--micro-batch-size", 3), 2, "--global-batch-size 8 is not a multiple of --micro-batch-size 3 x"),
        (1, words("--recompute-granularity", "selective", "--recompute-modules", "nothing"), 2, "nothing"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    files: Files, tmp_path: Path, size: int, more: Callable[[Path], list[Any]], code: int, expected: str
) -> None:
    argv = [*files.given, *more(tmp_path), "--output", tmp_path / "run"]
    before = sorted(tmp_path.rglob("*"))
    ranks = run(size, argv, tmp_path.with_name(tmp_path.name + "-log"))
    assert {rank.code for rank in ranks} == {code}, ranks[0].text
    lines = ranks[0].text.splitlines()
    assert lines[-1].startswith("error: ") and expected in lines[-1], ranks[0].text
    assert "Traceback" not in ranks[0].text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_resumed_run_with_other_settings_is_refused(files: Files, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(half, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    data = write_pairs(tmp_path / "other.jsonl", 50, first=1)
    changes = ["--data", data, "--lr", 0.01, "--global-batch-size", 4, "--lora-rank", 4, "--train-iters", 8]
    ranks = run(1, [*files.given, *SEVEN, *changes, "--output", output, "--resume"], tmp_path / "log")
    assert ranks[0].code == 1
    error = ranks[0].text.splitlines()[-1]
    for part in (
        "--data has other content",
        "--lr was 0.02, is 0.01",
        "--global-batch-size was 8, is 4",
        "LoRA's r was 8, is 4",
        "--lr-decay-iters was 7, is 8",
    ):
        assert part in error
    assert "--eval-data" not in error and "LoRA's lora_alpha" not in error
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_the_last_iteration_may_not_lie_before_the_checkpoint(files: Files, half: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(half, output)
    argv = [*files.given, *SEVEN, "--train-iters", 2, "--lr-decay-iters", 7, "--output", output, "--resume"]
    ranks = run(1, argv, tmp_path / "log")
    assert ranks[0].code == 2 and "is beyond the last iteration, 2" in ranks[0].text


def test_wrong_options_fail_in_this_process_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lora-rnak", "8"]) == 2
    assert capsys.readouterr().err == "error: unknown option --lora-rnak; did you mean --lora-rank?\n"


def test_a_library_that_an_option_needs_is_named_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("wandb", "tqdm") else find_spec(name)
    )
    argv = ["--model", "m", "--data", "d.jsonl", "--output", "o"]
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: tqdm not installed: pip install 'megatron-mlora[train]'\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert main([*argv, "--wandb-project", "p"]) == 2
    assert capsys.readouterr().err == "error: wandb not installed: pip install 'megatron-mlora[wandb]'\n"


def test_a_run_from_a_configuration_file(files: Files, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {files.folder / 'base'}\ndata: {files.folder / 'train.jsonl'}\nseq-length: 24\nglobal-batch-size: 8\n"
        "train-epochs: 0.3\nlr: 1e-3\nlora-target-modules: [q_proj, v_proj]\nbf16: true\nlora-adapter-dtype: float32\n"
        "recompute-granularity: full\nlora-use-dora: true\n"
    )
    ranks = run(1, ["--config", config, "--output", tmp_path / "run"], tmp_path / "log")
    assert ranks[0].code == 0, ranks[0].text
    assert len(metrics(tmp_path / "run")) == 2  # 15 of 50 pairs
    tensors = load_file(tmp_path / "run" / "peft" / "adapter_model.safetensors")
    assert {key.split(".self_attn.")[1] for key in tensors} == {
        f"{name}.{factor}"
        for name in ("q_proj", "v_proj")
        for factor in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    }
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}


def test_ends_of_the_model_train_and_are_resumed_from(files: Files, tmp_path: Path) -> None:
    """The adapter's directory has them whole and without padding, and the trainer goes on from it."""
    options: list[Any] = ["--model", files.folder / "base", "--data", files.folder / "train.jsonl", "--seq-length", 24]
    options += ["--global-batch-size", 8, "--train-iters", 2, "--lr", "1e-2"]
    adapter = ["--lora-target-modules", "q_proj", "lm_head", "--lora-modules-to-save", "embed_tokens", "model.norm"]
    sizes = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    ranks = run(2, [*options, *adapter, *sizes, "--output", tmp_path / "run"], tmp_path / "log")
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
    peft = tmp_path / "run" / "peft"
    shapes = {key: list(tensor.shape) for key, tensor in load_file(peft / "adapter_model.safetensors").items()}
    prefix = "base_model.model."
    assert {key: shape for key, shape in shapes.items() if ".layers." not in key} == {
        f"{prefix}model.embed_tokens.weight": [VOCAB, 32],
        f"{prefix}model.norm.weight": [32],
        f"{prefix}lm_head.lora_A.weight": [8, 32],
        f"{prefix}lm_head.lora_B.weight": [VOCAB, 8],
    }
    argv = [*options, "--resume-from-peft", peft, "--output", tmp_path / "more"]
    ranks = run(1, argv, tmp_path / "log2")
    assert ranks[0].code == 0, ranks[0].text
    first, more = metrics(tmp_path / "run"), metrics(tmp_path / "more")
    assert more[0]["loss"] < first[0]["loss"]
    assert load_file(tmp_path / "more" / "peft" / "adapter_model.safetensors").keys() == shapes.keys()
