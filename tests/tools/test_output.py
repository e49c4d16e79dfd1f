"""The directory of a run: when it may be written, and whether a resumed run is the same run."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlora_tools.output import Output, model_digest, versions
from parallel.errors import DamagedError


def with_checkpoint(path: Path, settings: dict[str, Any]) -> Output:
    """A run that has a checkpoint, of which only the small files are there."""
    output = Output(path)
    output.write_config({"settings": settings, "starts": []})
    checkpoint = output.checkpoints / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "mlora.json").write_text("{}")
    return output


def test_a_new_run_needs_an_empty_place(tmp_path: Path) -> None:
    assert Output(tmp_path / "new").check(resume=False) is None
    assert Output(tmp_path).check(resume=False) is None
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="exists and is not empty: give another one, or --resume"):
        Output(tmp_path).check(resume=False)
    with pytest.raises(NotADirectoryError, match="is a file"):
        Output(tmp_path / "file").check(resume=False)
    with pytest.raises(FileExistsError, match="not empty, and what is in it is no run"):
        Output(tmp_path).check(resume=True)
    with pytest.raises(OSError, match="/proc/a"):
        Output(Path("/proc/a/run")).check(resume=False)
    assert Output(tmp_path / "a" / "b").check(resume=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_was_killed_while_it_wrote_its_first_file_is_no_run(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "config.json.partial").write_text("{")
    assert Output(tmp_path).check(resume) is None


def test_where_nothing_is_saved_a_resumed_run_starts_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    none, killed = Output(tmp_path / "none"), Output(tmp_path / "killed")
    killed.write_config({"settings": {}, "starts": []})
    for output in (none, killed):
        assert output.check(resume=True) is None
        assert f"nothing to resume in {output.path}: the run starts at iteration 0" in caplog.text
        with pytest.raises(FileNotFoundError, match="--resume: there is no checkpoint in"):
            output.check(resume=True, must_exist=True)
    killed.check_same({})
    none.check_same({"--lr": 1})  # Of a run that was never started.


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = with_checkpoint(tmp_path / "run", {})
    with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole.*adapter_config\.json is missing"):
        output.check(resume=True)
    assert "checkpoint iter_0000003 is damaged and is passed over: " in caplog.text


def test_changed_settings_are_named(tmp_path: Path) -> None:
    before = {"--lr": 1e-4, "--data": "a" * 64, "--eval-data": None, "LoRA's target_modules": ["q_proj"]}
    before["--lr-decay-iters"] = 4
    output = with_checkpoint(tmp_path / "run", before)
    output.check_same({**before, "LoRA's target_modules": ("q_proj",)})
    now = before | {"--lr": 2e-4, "--data": "b" * 64, "--eval-data": "c" * 64}
    now["LoRA's target_modules"] = ("q_proj", "v_proj")
    with pytest.raises(ValueError) as error:
        output.check_same({**now, "--new": 1})
    assert str(error.value).endswith(
        "--lr was 0.0001, is 0.0002; --data has other content; --eval-data was not given; "
        'LoRA\'s target_modules was ["q_proj"], is ["q_proj", "v_proj"]; --new was null, is 1'
    )
    with pytest.raises(ValueError, match=r"--lr-decay-iters was 4, is 6 \(without the option: --train-iters\)"):
        Output(tmp_path / "run").check_same({**before, "--lr-decay-iters": 6})
    with pytest.raises(ValueError, match="--data was given"):
        output.check_same({**before, "--data": None})
    with pytest.raises(ValueError, match=r"--lr was 0\.0001, is null"):
        output.check_same({name: value for name, value in before.items() if name != "--lr"})


def test_a_config_that_was_edited(tmp_path: Path) -> None:
    output = Output(tmp_path)
    for text in ("{", "[]", "{}", '{"settings": 1, "starts": []}', '{"settings": {}}'):
        output.config.write_text(text)
        with pytest.raises(ValueError, match="is not as the trainer wrote it"):
            output.read_config()


def test_the_config_appears_whole_and_elsewhere_is_noticed(tmp_path: Path) -> None:
    output = Output(tmp_path / "a" / "run")
    with pytest.raises(FileNotFoundError, match="must be on storage that all hosts share"):
        output.check_visible()
    output.write_config({"settings": {"x": [1]}, "starts": []})
    output.check_visible()
    assert json.loads(output.config.read_text())["settings"] == {"x": [1]}
    assert [path.name for path in output.path.iterdir()] == ["config.json"]


def test_models_are_told_apart(tmp_path: Path) -> None:
    def model(name: str, config: str = "{}", weights: bytes = bytes(3 * 2**20), file: str = "model.safetensors") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / file).write_bytes(weights)
        return model_digest(tmp_path / name)

    one = model("one")
    assert model("copy") == one
    others = [
        model("config", config='{"a": 1}'),
        model("begin", weights=b"1" + bytes(3 * 2**20 - 1)),
        model("end", weights=bytes(3 * 2**20 - 1) + b"1"),
        model("longer", weights=bytes(3 * 2**20 + 1)),
        model("file", file="other.safetensors"),
    ]
    assert len({one, *others}) == 6


def test_versions_of_what_decides_the_numbers() -> None:
    found = versions()
    assert {"python", "torch", "megatron-core", "megatron-mlora"} <= found.keys()
    assert all(found.values())
