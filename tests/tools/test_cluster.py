"""The scripts for clusters: their options are the trainer's, their fields Kubernetes' own, and their times fit together."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlora_tools.arguments import Arguments

CLUSTER = Path(__file__).resolve().parents[2] / "tools" / "cluster"


def _options(command: str, tmp_path: Path) -> Arguments:
    """What stands behind the trainer's name in a command, with a configuration in the place of the cluster's."""
    words = shlex.split(command.replace("\\\n", " "))
    start = next(number for number, word in enumerate(words) if word in ("tools/finetune_lora.py", "mlora-finetune"))
    config = tmp_path / "run.yaml"
    config.write_text("model: base\ndata: train.jsonl\noutput: run\n")
    options = words[start + 1 :]
    options[options.index("--config") + 1] = str(config)
    return Arguments.parse(options)


def test_the_slurm_script(tmp_path: Path) -> None:
    path = CLUSTER / "job.sbatch"
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    command = text[text.index("srun ") :].replace("$1", "run.yaml")
    assert _options(command, tmp_path).inputs.resume
    (signalled,) = re.findall(r"--signal=TERM@(\d+)", text)
    (waits,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)
    assert int(waits) < int(signalled)


@pytest.fixture
def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "job.yaml").read_text()))


def test_the_kubernetes_manifests_are_kubernetes(manifests: list[dict[str, Any]]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    manifests[1]["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifests[1], kubernetes_validate.latest_version(), strict=True)


def test_the_pods_find_each_other_and_have_time_to_save(manifests: list[dict[str, Any]], tmp_path: Path) -> None:
    service, job = manifests
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"][2]
    assert (
        job["spec"]["completions"] == job["spec"]["parallelism"] and f"--nnodes {job['spec']['completions']}" in command
    )
    assert f"--nproc-per-node {container['resources']['limits']['nvidia.com/gpu']} " in command
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert f"--rdzv-endpoint {name}-0.{pod['subdomain']}:" in command
    (waits,) = (int(item["value"]) for item in container["env"])
    assert waits < pod["terminationGracePeriodSeconds"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert _options(command, tmp_path).inputs.resume
    shell = command.replace("exec torchrun", "echo")
    for index, host in (("0", "1"), ("1", "0")):
        done = subprocess.run(
            ["bash", "-c", shell], env={"JOB_COMPLETION_INDEX": index}, capture_output=True, text=True
        )
        assert f"--rdzv-conf is_host={host} " in done.stdout
