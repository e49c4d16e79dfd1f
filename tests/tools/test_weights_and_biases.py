"""A run of the trainer that logs to Weights & Biases, offline, and what the library has then written."""

import json
import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  # Imported once here, not in every forked rank.

import mlora_tools.run  # noqa: F401  # Likewise.
from tests.tools.runs import metrics, run, write_base, write_pairs

wandb = pytest.importorskip("wandb")
BLOCK = 32 * 1024


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the pieces of an offline file: LevelDB's log format behind seven bytes of its own."""
    content = path.read_bytes()
    assert content.startswith(b":W&B")
    at = 7
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        yield kind, content[at + 7 : at + 7 + length]
        at += 7 + length


def _history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary a call."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, pending = [], b""
    for kind, piece in _chunks(path):
        pending = piece if kind in (1, 2) else pending + piece  # full, first; middle, last
        if kind in (1, 4):
            record = Record.FromString(pending)
            if record.HasField("history"):
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def test_a_run_and_its_resumption_are_one_run_there(tmp_path: Path) -> None:
    offline = partial(os.environ.update, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    output = tmp_path / "run"
    argv = [
        *("--model", write_base(tmp_path / "base"), "--data", write_pairs(tmp_path / "train.jsonl", 20)),
        *("--eval-data", write_pairs(tmp_path / "heldout.jsonl", 4, first=20), "--seq-length", 24),
        *("--global-batch-size", 4, "--train-iters", 4, "--log-adapter-norms-interval", 2, "--output", output),
        *("--wandb-project", "mlora-tests", "--lora-target-modules", "q_proj", "--resume"),
    ]
    for number, more in enumerate([("--exit-interval", 2), ()]):
        ranks = run(1, [*argv, *more], tmp_path / f"log{number}", offline)
        assert ranks[0].code == 0, ranks[0].text
    files = sorted(output.glob("wandb/offline-run-*/*.wandb"))
    identity = (output / "wandb" / "run-id").read_text().strip()
    assert {path.name for path in files} == {f"run-{identity}.wandb"} and len(files) == 2
    logged = [row for path in files for row in _history(path)]
    recorded = metrics(output)
    assert [row["iteration"] for row in logged] == [record["iteration"] for record in recorded]
    for row, record in zip(logged, recorded, strict=True):
        if "loss" in record:
            assert row["loss/train"] == record["loss"] and row["grad norm"] == record["grad_norm"]
            assert row["tokens per second"] > 0 and row["peak memory in bytes"] > 1e6
        if "eval_loss" in record:
            assert row["loss/eval"] == record["eval_loss"]
        for projection, norms in record.get("adapter_norms", {}).items():
            assert row[f"norm of BA/{projection}"] == norms["BA"]
            assert row[f"norm of BA over W/{projection}"] == norms["BA"] / norms["W"]
    assert sum("norm of A/model.layers.0.self_attn.q_proj" in row for row in logged) == 2


def test_a_refusal_of_the_library_is_one_line(tmp_path: Path) -> None:
    argv = [
        *("--model", write_base(tmp_path / "base"), "--data", write_pairs(tmp_path / "train.jsonl", 4)),
        *("--seq-length", 24, "--global-batch-size", 4, "--output", tmp_path / "run", "--wandb-project", "a/b"),
    ]
    ranks = run(1, argv, tmp_path / "log", partial(os.environ.update, {"WANDB_MODE": "offline"}))
    assert ranks[0].code == 2
    assert ranks[0].text.splitlines()[-1].startswith("error: --wandb-project a/b: ")
