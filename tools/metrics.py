"""The numbers of a run: `metrics.jsonl`, one record an iteration, an evaluation and a look at the adapter's norms, and the same
for TensorBoard and Weights & Biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mlora_tools.text_file import write_text
from parallel.errors import naming

_NAMES = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "grad_norm": "grad norm",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
    "peak_memory": "peak memory in bytes",
    **{
        f"{prefix}reward_{name}": f"reward {name}/{run}"
        for prefix, run in (("", "train"), ("eval_", "eval"))
        for name in ("chosen", "rejected", "margin", "accuracy")
    },
}


class Sink(Protocol):
    """What else takes the numbers."""

    def __call__(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Take the numbers of an iteration by name."""

    def close(self) -> None:
        """There are no more."""


class Metrics:
    """Appends records. Those of iterations after ``start``, which a run that was stopped made and this one makes again, go.

    Args:
        path: of ``metrics.jsonl``.
        tensorboard: directory for TensorBoard's events.
        start: the iteration that the run goes on from.
        sink: also gets every record's numbers, by the names that TensorBoard has for them, with their iteration.

    Attributes:
        records: all that are in the file.

    Raises:
        ValueError: a line of the file that is there is no record; its number is named.
    """

    def __init__(self, path: Path, tensorboard: Path, start: int, sink: Sink | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.records = [record for record in _read(path) if record["iteration"] <= start]
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(tensorboard), purge_step=start + 1)
        self._sink = sink

    @property
    def evaluated(self) -> set[int]:
        """Iterations that have an evaluation."""
        return {record["iteration"] for record in self.records if "eval_loss" in record}

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, which has its ``iteration``.

        Raises:
            OSError: it cannot be written; the file is named.
        """
        self.records.append(record)
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        numbers = scalars(record)
        for name, value in numbers.items():
            self._events.add_scalar(name, value, record["iteration"])
        if self._sink is not None:
            self._sink(numbers, record["iteration"])

    def close(self) -> None:
        """Write what is left in buffers."""
        self._file.close()
        self._events.close()
        if self._sink is not None:
            self._sink.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by the names that TensorBoard shows them under."""
    numbers = {name: record[key] for key, name in _NAMES.items() if key in record}
    for projection, norms in record.get("adapter_norms", {}).items():
        numbers |= {f"norm of {name}/{projection}": norms[name] for name in ("A", "B", "BA")}
        numbers[f"norm of BA over W/{projection}"] = norms["BA"] / norms["W"] if norms["W"] else 0.0
    return numbers


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
