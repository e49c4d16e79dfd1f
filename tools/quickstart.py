"""mlora's main job from end to end, on real input, in about two minutes on two cores.

1. Make data, a tokenizer and a small base model from the standard library's sources (`quickstart_data`).
2. Fine-tune the base with LoRA at TP 2 x PP 2 with sequence parallel: half of it, stop, resume, the rest.
3. Load the exported adapter with Hugging Face PEFT and hold it against our model: held-out loss and logits.
4. Print what changed and where everything lies. Anything that does not hold is one sentence and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlora_tools.quickstart_data import Recipe, prepare
from mlora_tools.quickstart_peft import Comparison, compare_with_peft, write_tokens
from mlora_tools.run_files import RunFiles

TOOLS = Path(__file__).resolve().parent
TENSOR, PIPELINE = 2, 2
LOGIT_TOLERANCE = 1e-4  # float32 on both sides
LOSS_TOLERANCE = 1e-3  # relative
SETTINGS = shlex.split(
    "--micro-batch-size 8 --global-batch-size 32 --lr 5e-3 --min-lr 0 --lr-decay-style cosine "
    "--weight-decay 0 --clip-grad 1.0 --seed 1234 --log-interval 1 --keep-last 2 "
    "--lora-rank 8 --lora-alpha 16 --lora-dropout 0.0 --lora-target-modules all-linear"
)
MARKER = "made-by-mlora-quickstart"


class Failed(Exception):
    """Something that the quickstart promises does not hold; the message is the one sentence to print."""


@dataclass(frozen=True)
class Folders:
    """What lies where under the work directory."""

    work: Path

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def base(self) -> Path:
        return self.data / "base"

    @property
    def heldout(self) -> Path:
        return self.data / "heldout.jsonl"

    @property
    def run(self) -> RunFiles:
        return RunFiles(self.work / "run")


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints a step's title, and its seconds when it is done."""
    print(f"== {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"   done in {time.monotonic() - began:.0f} s", flush=True)


def claim(folders: Folders) -> None:
    """Makes the work directory, or takes an earlier quickstart's, and removes what is made anew each time."""
    marker = folders.work / MARKER
    if folders.work.exists() and not marker.exists() and any(folders.work.iterdir()):
        raise Failed(f"{folders.work} exists and was not made by the quickstart: give another --workdir.")
    folders.work.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in ("run", "logs", "logits"):
        shutil.rmtree(folders.work / name, ignore_errors=True)
    for name in ("logs", "logits"):
        (folders.work / name).mkdir()


def torchrun(name: str, arguments: Sequence[str | Path], folders: Folders, *, verbose: bool) -> None:
    """Runs a script of ours on TENSOR x PIPELINE ranks of one thread each; output goes to `logs/NAME.log`.

    Raises:
        Failed: it did not exit with 0; the end of its output has been printed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, str(TENSOR * PIPELINE), *map(str, arguments)]
    # No GPU on purpose: four ranks need four of them with NCCL, and this must run anywhere.
    settings = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    log = folders.work / "logs" / f"{name}.log"
    with log.open("w", encoding="utf-8") as written:
        process = subprocess.Popen(
            command,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        with process:
            for line in process.stdout or ():
                written.write(line)
                if verbose:
                    print("   |", line, end="", flush=True)
    if process.returncode:
        if not verbose:
            print("".join(f"   | {line}\n" for line in log.read_text(encoding="utf-8").splitlines()[-40:]))
        raise Failed(f"{name} exited with code {process.returncode}; all of its output is in {log}.")


def train(folders: Folders, iterations: int, *, resume: bool, verbose: bool) -> None:
    """Half of the iterations with the trainer, or with `resume` the rest."""
    half = iterations // 2
    options = {
        "model": folders.base,
        "data": folders.data / "train.jsonl",
        "eval-data": folders.heldout,
        "output": folders.run.path,
        "tensor-model-parallel-size": TENSOR,
        "pipeline-model-parallel-size": PIPELINE,
        "seq-length": Recipe.max_pair_tokens,
        "train-iters": iterations,
        "lr-warmup-iters": min(5, half),
        "save-interval": half,
        "eval-interval": half,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    flags = ["--sequence-parallel", *(["--resume"] if resume else ["--exit-interval", str(half)])]
    name = "training-resumed" if resume else "training"
    torchrun(name, [TOOLS / "finetune_lora.py", *given, *SETTINGS, *flags], folders, verbose=verbose)


def megatron_logits(folders: Folders, *, verbose: bool) -> Path:
    """Our model's logits for the tokens of `logits/tokens.safetensors`, from a new start at TP x PP.

    Returns the file: float32 `logits` [samples, tokens, vocabulary].
    """
    folder = folders.work / "logits"
    write_tokens(folders.base, folders.heldout, folder / "tokens.safetensors")
    files = {
        "base": folders.base,
        "checkpoints": folders.run.checkpoints,
        "tokens": folder / "tokens.safetensors",
        "output": folder / "logits.safetensors",
    }
    arguments = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    arguments += [
        "--tensor-model-parallel-size",
        str(TENSOR),
        "--pipeline-model-parallel-size",
        str(PIPELINE),
        "--sequence-parallel",
    ]
    torchrun("logits", [TOOLS / "quickstart_logits.py", *arguments], folders, verbose=verbose)
    return files["output"]


def check_files(run: RunFiles) -> None:
    """Everything that the trainer promises is there."""
    adapter = [run.peft / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    for path in (*adapter, run.checkpoints, run.metrics, run.ranks, run.tensorboard, run.plot, run.config):
        if not path.exists():
            raise Failed(f"the trainer did not write {path}.")


def check_training(run: RunFiles, iterations: int) -> dict[int, float]:
    """The held-out loss by iteration, if the two runs did each iteration once and evaluated at both ends."""
    records = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    evaluations = {record["iteration"]: record["eval_loss"] for record in records if "eval_loss" in record}
    done = [record["iteration"] for record in records if "loss" in record]
    if done != list(range(1, iterations + 1)):
        raise Failed(f"metrics.jsonl does not hold the iterations 1 to {iterations} once each, but {done}.")
    missing = {0, iterations} - evaluations.keys()
    if missing:
        raise Failed(f"metrics.jsonl has no eval_loss for iteration {min(missing)}.")
    return evaluations


def check_numbers(comparison: Comparison, evaluations: dict[int, float], iterations: int) -> None:
    """Ours and HF PEFT's numbers agree, and training helped."""
    for iteration, peft in ((0, comparison.loss_before), (iterations, comparison.loss_after)):
        ours = evaluations[iteration]
        if abs(ours - peft) > LOSS_TOLERANCE * peft:
            raise Failed(f"held-out loss at iteration {iteration}: ours {ours:.6f}, HF PEFT's {peft:.6f}.")
    if not comparison.logit_difference < LOGIT_TOLERANCE:
        raise Failed(f"logits differ from HF PEFT's by {comparison.logit_difference:.1e}, over {LOGIT_TOLERANCE:.0e}.")
    if not comparison.loss_after < comparison.loss_before:
        raise Failed(f"the held-out loss went {comparison.loss_before:.4f} -> {comparison.loss_after:.4f}, not down.")


def report(folders: Folders, comparison: Comparison, evaluations: dict[int, float], iterations: int) -> None:
    """What came out, as a table."""
    parameters = json.loads(folders.run.config.read_text(encoding="utf-8"))["parameters"]
    before, after = comparison.loss_before, comparison.loss_after
    print("\n== held-out pairs, before and after (greedy)")
    for example in comparison.examples:
        print(f"\n   {example.signature}")
        print(f"     docstring  {example.reference}")
        print(f"     before     {example.before}")
        print(f"     after      {example.after}")
    trainable, total = parameters["trainable"], parameters["total"]
    rows = {
        "held-out loss, HF PEFT": f"{before:.4f} -> {after:.4f}  ({after / before - 1:+.1%})",
        "held-out loss, ours": f"{evaluations[0]:.4f} -> {evaluations[iterations]:.4f}",
        "greatest logit difference": f"{comparison.logit_difference:.1e}  (ours, HF PEFT)",
        "trainable parameters": f"{trainable:,} of {total:,}  ({trainable / total:.1%}; the base is tiny)",
        "iterations": f"1 to {iterations}, resumed after {iterations // 2}",
        "base model": folders.base,
        "checkpoints": folders.run.checkpoints,
        "PEFT adapter": folders.run.peft,
        "metrics": folders.run.metrics,
        "loss curve": folders.run.plot,
    }
    print("\n== result")
    for name, value in rows.items():
        print(f"   {name:<26}{value}")


def quickstart(folders: Folders, recipe: Recipe, iterations: int, *, fresh: bool, verbose: bool) -> None:
    """All steps. Raises `Failed` at the first thing that does not hold."""
    claim(folders)
    with step("data, tokenizer and a small base model from the standard library"):
        if not prepare(folders.data, recipe, fresh=fresh):
            print(f"   {folders.data} is there already (--fresh makes it anew)")
    half, layout = iterations // 2, f"TP {TENSOR} x PP {PIPELINE}, sequence parallel"
    with step(f"LoRA fine-tuning, {layout}: iterations 1 to {half}"):
        train(folders, iterations, resume=False, verbose=verbose)
    with step(f"stopped and resumed: iterations {half + 1} to {iterations}"):
        train(folders, iterations, resume=True, verbose=verbose)
    check_files(folders.run)
    evaluations = check_training(folders.run, iterations)
    with step(f"logits of our model, {layout}"):
        logits = megatron_logits(folders, verbose=verbose)
    with step("the exported adapter in Hugging Face PEFT"):
        comparison = compare_with_peft(folders.base, folders.run.peft, folders.heldout, logits)
    report(folders, comparison, evaluations, iterations)
    check_numbers(comparison, evaluations, iterations)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("quickstart-run"), help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=60, help="of fine-tuning, default: %(default)s")
    parser.add_argument(
        "--pretrain-steps", type=int, default=Recipe.pretrain_steps, help="of the base model, default: %(default)s"
    )
    parser.add_argument("--fresh", action="store_true", help="make data and base anew, not the ones of an earlier run")
    parser.add_argument("--verbose", action="store_true", help="show the output of the trainer's ranks as it comes")
    arguments = parser.parse_args(argv)
    if arguments.iterations < 2:
        parser.error(f"--iterations {arguments.iterations}: at least 2, for the run is stopped half-way and resumed")
    if arguments.pretrain_steps < 1:
        parser.error(f"--pretrain-steps {arguments.pretrain_steps}: at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The quickstart's command line; 0 when everything held."""
    arguments = _arguments(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mlora_tools").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    try:
        quickstart(
            Folders(arguments.workdir),
            Recipe(pretrain_steps=arguments.pretrain_steps),
            arguments.iterations,
            fresh=arguments.fresh,
            verbose=arguments.verbose,
        )
    except Failed as failure:
        print(f"\nquickstart failed: {failure}", file=sys.stderr)
        return 1
    print(f"\nquickstart succeeded in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
