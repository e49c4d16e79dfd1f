"""Dataclasses as a command line and a configuration file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from mlora_tools.options import Help, UsageError, parse


@dataclass(frozen=True, kw_only=True)
class Basics:
    """basics"""

    name: Annotated[str, Help("a name")]
    count: Annotated[int, Help("how many, 100 %")] = 3
    rate: Annotated[float | None, Help("how fast")] = None
    mode: Annotated[Literal["slow", "fast"], Help("which")] = "slow"


@dataclass(frozen=True, kw_only=True)
class Rest:
    """the rest"""

    files: Annotated[tuple[Path, ...], Help("which files", "FILE")] = ()
    layers: Annotated[tuple[int, ...] | None, Help("which layers")] = None
    loud: Annotated[bool, Help("with noise")] = False
    config: Annotated[Path | None, Help("file of options")] = None


def read(*words: Any) -> tuple[Basics, Rest, set[str]]:
    (basics, rest), given = parse((Basics, Rest), [str(word) for word in words], "About.")
    return basics, rest, given


def test_values_have_the_fields_types() -> None:
    basics, rest, given = read(
        "--name", "n", "--rate", "1e-3", "--mode", "fast", "--files", "a", "b", "--layers", 0, 2, "--loud"
    )
    assert basics == Basics(name="n", count=3, rate=0.001, mode="fast")
    assert rest == Rest(files=(Path("a"), Path("b")), layers=(0, 2), loud=True)
    assert given == {"name", "rate", "mode", "files", "layers", "loud"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required but not given: --name"),
        (["--name", "n", "--cuont", 4], "unknown option --cuont; did you mean --count?"),
        (["--name", "n", "--cuont=4"], "unknown option --cuont; did you mean --count?"),
        (["--name", "n", "--xyz"], "unknown option --xyz"),
        (["--name", "n", "--mod", "fast"], "unknown option --mod; did you mean --mode?"),
        (["--name", "n", "stray"], "unexpected argument 'stray'"),
        (["--name", "n", "--count", "4.5"], "--count: invalid int value: '4.5'"),
        (["--name", "n", "--mode", "fsat"], "--mode: invalid choice: 'fsat'"),
        (["--name"], "--name: expected one argument"),
    ],
)
def test_wrong_command_lines_are_named(words: list[Any], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        read(*words)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("c.yaml", "name: n\nrate: 5e-3\nlayers: [1, 2]\nfiles: a.txt\nloud: true\ncount: null\n"),
        ("c.yml", "name: n\nrate: 0.005\nlayers: [1, '2']\nfiles: [a.txt]\nloud: true\n"),
        ("c.json", '{"name": "n", "rate": 5e-3, "layers": [1, 2], "files": ["a.txt"],\t"loud": true}'),
    ],
)
def test_a_configuration_file_is_the_same_options(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / file
    path.write_text(text)
    basics, rest, given = read("--config", path)
    assert basics == Basics(name="n", rate=0.005)
    assert rest == Rest(files=(Path("a.txt"),), layers=(1, 2), loud=True, config=path)
    assert given == {"name", "rate", "layers", "files", "loud", "config"}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: file\ncount: 7\nloud: true\n")
    basics, rest, _ = read("--config", path, "--name", "line", "--no-loud")
    assert (basics.name, basics.count, rest.loud) == ("line", 7, False)


def test_dashes_and_underscores_are_the_same_name(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Long:
        """long"""

        long_name: Annotated[int, Help("a number")] = 0
        config: Annotated[Path | None, Help("file")] = None

    for key in ("long-name", "long_name"):
        (tmp_path / "c.yaml").write_text(f"{key}: 4\n")
        (options,), _ = parse((Long,), ["--config", str(tmp_path / "c.yaml")], "")
        assert options.long_name == 4


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("c.yaml", "name: n\ncuont: 4\n", "unknown key 'cuont'; did you mean count?"),
        ("c.yaml", "name: n\nconfig: other.yaml\n", "unknown key 'config'"),
        ("c.yaml", "name: n\ncount: 4.5\n", "count: 4.5: expected a whole number"),
        ("c.yaml", "name: n\ncount: true\n", "count: True: expected a whole number"),
        ("c.yaml", "name: n\nloud: 1\n", "loud: 1: expected true or false"),
        ("c.yaml", "name: 3\n", "name: 3: expected a text"),
        ("c.yaml", "name: [a]\n", "name: ['a']: expected a text"),
        ("c.yaml", "name: n\nmode: fsat\n", "mode: 'fsat': expected one of slow, fast"),
        ("c.yaml", "name: n\nlayers: [1, x]\n", "layers: [1, 'x']: expected a whole number"),
        ("c.yaml", "name: n\nfiles: [3]\n", "files: [3]: expected a path"),
        ("c.yaml", "name: n\nrate: fast\n", "rate: 'fast': expected a number"),
        ("c.yaml", "name: n\nname: m\n", "'name' is given twice"),
        ("c.json", '{"name": "n", "name": "m"}', "'name' is given twice"),
        ("c.yaml", "- name\n", "expected names and values"),
        ("c.json", '[["name", "n"]]', "expected names and values"),
        ("c.yaml", "name: [\n", "not valid YAML"),
        ("c.json", "{", "not valid JSON"),
    ],
)
def test_wrong_configuration_files_are_named(tmp_path: Path, file: str, text: str, expected: str) -> None:
    path = tmp_path / file
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read("--config", path)
    assert str(error.value).startswith(str(path)) and expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("name: ä".encode("latin-1"))
    with pytest.raises(UsageError, match=r"c\.yaml: not readable as UTF-8"):
        read("--config", tmp_path / "c.yaml")


def test_a_missing_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        read("--config", tmp_path / "missing.yaml")


def test_help_has_groups_defaults_and_percent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for part in (
        "About.",
        "basics:",
        "the rest:",
        "how many, 100 % (default: 3)",
        "a name (required)",
        "--loud, --no-loud",
    ):
        assert part in text
