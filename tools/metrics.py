"""The numbers of a run: `metrics.jsonl`, one record an iteration and one an evaluation, and the same for TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

_TENSORBOARD_NAMES = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "grad_norm": "grad norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}


class Metrics:
    """Appends records. Those of iterations after ``start``, which a run that was stopped made and this one makes again, go.

    Args:
        path: of ``metrics.jsonl``.
        tensorboard: directory for TensorBoard's events.
        start: the iteration that the run goes on from.

    Attributes:
        records: all that are in the file.

    Raises:
        ValueError: a line of the file that is there is no record; its number is named.
    """

    def __init__(self, path: Path, tensorboard: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.records = [record for record in _read(path) if record["iteration"] <= start]
        _write(path, self.records)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(tensorboard), purge_step=start + 1 if start else None)

    @property
    def evaluated(self) -> set[int]:
        """Iterations that have an evaluation."""
        return {record["iteration"] for record in self.records if "eval_loss" in record}

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, which has its ``iteration``."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, name in _TENSORBOARD_NAMES.items():
            if key in record:
                self._events.add_scalar(name, record[key], record["iteration"])

    def close(self) -> None:
        """Write what is left in buffers."""
        self._file.close()
        self._events.close()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["iteration"] += 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # A run that was killed may leave half a line.
            raise ValueError(f"{path}:{number}: not a record of metrics") from None
        records.append(record)
    return records


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
