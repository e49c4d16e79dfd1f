"""The rooms of the repository: who imports whom, what each has heard of, and what may lie where."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import mlora

ROOT = Path(__file__).parents[1]
# Room -> the rooms whose names it may import.
MAY_IMPORT = {
    "parallel": {"parallel"},
    "mlora": {"mlora", "parallel"},
    "tools": {"mlora", "mlora_tools", "parallel"},
}
ROOMS = {"mlora", "mlora_tools", "parallel", "tests", "tools"}
# What every installation has. Other libraries are extras: imported where they are used, and the rest works without them.
DEPENDENCIES = {"megatron", "numpy", "psutil", "safetensors", "torch"}
EXTRAS = {
    "jinja2",
    "matplotlib",
    "peft",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "transformer_engine",
    "transformers",
    "wandb",
    "yaml",
}
# Comes with torch where there is a GPU. Kernels cannot be written without it, so it is their files that are imported late.
GPU_ONLY = {"triton"}
TOP_LEVEL = {"README.md", "mlora", "parallel", "pyproject.toml", "tests", "tools"}
# What meets Megatron's own training scripts. Wheels before 0.17 have no megatron.training.
MEGATRON_SCRIPTS = {
    Path(path)
    for path in (
        "mlora/megatron/base.py",
        "mlora/megatron/plug.py",
        "tests/tools/megatron_scripts.py",
        "tests/tools/test_pretrain_gpt_lora.py",
        "tools/pretrain_gpt_lora.py",
    )
}
# The command lines for adapters that run in one process.
ADAPTER_TOOLS = ("diff_adapters", "export_peft", "import_megatron", "import_peft", "inspect_adapter", "merge_lora")
NO_NOUNS = {"common", "helper", "helpers", "misc", "util", "utils"}
MOST_LINES = 330


def tracked() -> list[Path]:
    """Every file that git holds or would hold, from the repository's root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


FILES = tracked()
SOURCES = [path for path in FILES if path.suffix == ".py"]


def of(*rooms: str) -> list[Path]:
    return [path for path in SOURCES if path.parts[0] in rooms]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import in a tree, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            yield node.module, node.lineno


def imports_at_import_time(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Those that run when the file is imported: outside of functions, and not for the type checker only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([node], []))
        else:
            yield from imports_at_import_time(node)


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def root_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    paths = of(room)
    assert paths
    wrong = [
        f"{path}:{line} imports {module}"
        for path in paths
        for module, line in imports(parse(path))
        if root_of(module) in ROOMS - MAY_IMPORT[room]
    ]
    assert wrong == []


def test_nothing_of_megatron_but_its_core_is_imported() -> None:
    wrong = [
        f"{path}:{line} imports {module}"
        for path in of("mlora", "parallel", "tools", "tests")
        for module, line in imports(parse(path))
        if root_of(module) == "megatron" and not module.startswith("megatron.core") and path not in MEGATRON_SCRIPTS
    ]
    assert wrong == []


def test_the_library_is_imported_without_megatrons_training() -> None:
    wrong = [
        f"{path}:{line} imports {module} when it is imported"
        for path in of("mlora")
        for module, line in imports_at_import_time(parse(path))
        if module.startswith("megatron.training")
    ]
    assert wrong == []


def test_every_name_of_the_library_is_where_it_says() -> None:
    assert sorted(name for names in mlora.MODULES.values() for name in names) == mlora.__all__
    assert all(getattr(mlora, name) is not None for name in mlora.__all__)
    with pytest.raises(AttributeError, match="appply"):
        mlora.appply  # noqa: B018


def test_parallel_has_never_heard_of_the_adapters_that_use_it() -> None:
    heard = [
        f"{path}:{number}"
        for path in FILES
        if path.parts[0] == "parallel"
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if "lora" in line.lower()
    ]
    assert heard == []
    assert not any("lora" in path.name.lower() for path in FILES if path.parts[0] == "parallel")


def test_extras_are_imported_where_they_are_used() -> None:
    known = DEPENDENCIES | ROOMS | sys.stdlib_module_names
    wrong = [
        f"{path}:{line} imports {module} when it is imported"
        for path in of("mlora", "parallel")
        for module, line in imports_at_import_time(parse(path))
        if root_of(module) not in known | (GPU_ONLY if "kernels" in path.parts else set())
    ]
    assert wrong == []
    assert not EXTRAS & DEPENDENCIES


def files_of(module: str) -> list[Path]:
    """The files that run when a module of ours is imported, its packages' too."""
    parts = module.replace("mlora_tools", "tools").split(".")
    paths = [Path(*parts[:length], "__init__.py") for length in range(1, len(parts) + 1)]
    return [path for path in [*paths, Path(*parts).with_suffix(".py")] if path in SOURCES]


def names_imported(path: Path) -> set[str]:
    """Every module that importing a file imports; ``from package import module`` gives both."""
    tree = parse(path)
    lines = {line for _, line in imports_at_import_time(tree)}
    found = {module for module, _ in imports_at_import_time(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.lineno in lines:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_with(modules: Iterable[str]) -> dict[Path, set[str]]:
    """Every file of ours that runs when these modules are imported, and what it imports."""
    reached: dict[Path, set[str]] = {}
    waiting = [path for module in modules for path in files_of(module)]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached[path] = names_imported(path)
            waiting += [file for module in reached[path] for file in files_of(module)]
    return reached


def test_the_library_is_imported_without_a_gpus_compiler() -> None:
    reached = imported_with(mlora.MODULES)
    assert [(path, module) for path in reached for module in reached[path] if root_of(module) in GPU_ONLY] == []
    assert Path("mlora/attach.py") in reached and Path("parallel/stages.py") in reached


def test_adapters_are_converted_without_megatron() -> None:
    """It takes seconds to import and warns of what is not installed."""
    modules = [".".join(path.with_suffix("").parts) for path in of("mlora") if path.parts[1] == "conversion"]
    reached = imported_with([*modules, *(f"tools.{name}" for name in ADAPTER_TOOLS)])
    assert [(path, module) for path in reached for module in reached[path] if root_of(module) == "megatron"] == []
    assert {Path("parallel/reader.py"), Path("parallel/stream.py"), Path("tools/console.py")} <= reached.keys()


def test_the_top_level_holds_what_it_may() -> None:
    names = {path.parts[0] for path in FILES}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
    assert names >= TOP_LEVEL


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_are_named_by_a_noun_and_can_be_read_in_one_go(path: Path) -> None:
    assert not NO_NOUNS & set(path.with_suffix("").parts), "name the file by what it holds"
    assert re.fullmatch(r"[a-z0-9_]+", path.stem)
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES or path.parts[0] == "tests", f"{lines} lines: divide it"


def test_every_file_of_parallel_has_its_tests() -> None:
    sources = {path.name for path in of("parallel")} - {"__init__.py"}
    tested = {path.name.removeprefix("test_") for path in of("tests") if path.parts[1] == "parallel"}
    assert sources - tested == set()
