"""The README's commands and snippets, run as they stand there.

Blocks of ``bash`` run one after the other in one folder, as a reader would run them; the quickstart goes first, with fewer
iterations, and makes the model and the data that the others use. Blocks of ``bash cluster`` need several hosts: their options are
parsed. Blocks of ``python`` run one after the other on two tensor-parallel ranks. The ``diff`` is applied to
``tools/pretrain_gpt_lora.py`` in that script's tests.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mlora
from mlora.model import build_model
from mlora.pretrained import Pretrained
from mlora_tools.arguments import Arguments
from parallel.sizes import ParallelSizes
from tests.ranks import run_ranks
from tests.tiny import write_model

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w[\w ]*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
SHELL = [text for kind, text in BLOCKS if kind == "bash"]
CLUSTER = [text for kind, text in BLOCKS if kind == "bash cluster"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
# This very test suite, the quickstart without the installation, and what learns in half a minute, with fewer iterations.
REPLACED = {
    "bash tools/test.sh\n": "",
    "bash tools/quickstart.sh\n": "python tools/quickstart.py --pretrain-steps 40 --iterations 10\n",
    "python tools/example_grpo.py --output runs/grpo\n": "python tools/example_grpo.py --output runs/grpo --train-iters 2\n",
}


def test_every_block_is_of_a_known_kind() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"bash", "bash cluster", "diff", "python"}
    assert SHELL and CLUSTER and PYTHON
    assert all(text in SHELL for text in REPLACED)


@pytest.mark.timeout(600)
def test_commands(tmp_path: Path) -> None:
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for text in SHELL:
        command = REPLACED.get(text, text)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env=settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("text", CLUSTER)
def test_cluster_commands_parse(text: str, tmp_path: Path) -> None:
    """Options of the trainer are parsed; what else is named in the repository is there."""
    assert subprocess.run(["bash", "-n", "-c", text], check=False).returncode == 0
    words = shlex.split(text.replace("\\\n", " ").replace("'", " "), comments=True)
    files = [word for word in words if word.startswith("tools/")]
    assert files and all((ROOT / file).is_file() for file in files)
    if "tools/finetune_lora.py" in words:
        Arguments.parse(words[words.index("tools/finetune_lora.py") + 1 :])


def run_snippets(rank: int, base: str, folder: str) -> bool:
    os.chdir(folder)
    names: dict[str, Any] = {"chunks": build_model(Pretrained.open(base), ParallelSizes(tensor=2))}
    for text in PYTHON:
        exec(compile(text, "README.md", "exec"), names)
    return bool(names["trainable"] > 0) and mlora.parameter_counts(names["chunks"]) == (
        names["trainable"],
        names["total"],
    )


def test_snippets(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_model(base, "llama")
    assert run_ranks(2, run_snippets, str(base), str(tmp_path)) == [True, True]
    assert (tmp_path / "peft-adapter" / "adapter_model.safetensors").is_file()
