"""What a run has left in its directory, as far as it is there: a run that still writes, was killed or lacks a file is read too."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlora_tools.run_files import RunFiles

Record = dict[str, Any]


@dataclass
class Recording:
    """A run's files.

    Attributes:
        path: its directory.
        config: ``config.json``; empty if it is not there.
        records: of ``metrics.jsonl``, oldest first.
        ranks: ``ranks.json``; empty if it is not there.
        written: when ``metrics.jsonl`` was last written, seconds since the epoch.
        exported: the adapter was exported, which ends a run.
        missing: what could not be read and what the reader will not find for that reason, a sentence each.
    """

    path: Path
    config: Record = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    ranks: Record = field(default_factory=dict)
    written: float | None = None
    exported: bool = False
    missing: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """Read a directory.

        Raises:
            FileNotFoundError: it does not exist, or nothing in it is a run's.
        """
        files = RunFiles(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no directory")
        found = cls(path, exported=files.peft.is_dir())
        found.config = found._object(files.config, "no configuration")
        found._read_metrics(files.metrics)
        found.ranks = found._object(files.ranks, "no ranks, hosts and collectives")
        if not (found.config or found.records):
            raise FileNotFoundError(f"{path} holds no run: {' '.join(found.missing)}")
        return found

    def _object(self, path: Path, lost: str) -> Record:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.missing.append(f"{path.name} is missing: {lost}.")
            return {}
        except (OSError, ValueError) as error:
            self.missing.append(f"{path.name} cannot be read ({error}): {lost}.")
            return {}
        if not isinstance(content, dict):
            self.missing.append(f"{path.name} is no JSON object: {lost}.")
            return {}
        return content

    def _read_metrics(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            self.written = path.stat().st_mtime
        except FileNotFoundError:
            self.missing.append(f"{path.name} is missing: no curves and norms.")
            return
        except OSError as error:
            self.missing.append(f"{path.name} cannot be read ({error}): no curves and norms.")
            return
        bad = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                record["iteration"] += 0
            except (ValueError, KeyError, TypeError):
                bad.append(number)
            else:
                self.records.append(record)
        if bad == [len(lines)]:
            self.missing.append(f"Line {bad[0]} of {path.name}, its last, is half a record: it is being written.")
        elif bad:
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            self.missing.append(f"{path.name}: no records in lines {shown}; they are left out.")

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(iterations, values) of what records have under ``key``; of an iteration that was made twice, the later."""
        values = {record["iteration"]: record[key] for record in self.records if _is_number(record.get(key))}
        return list(values), list(values.values())

    @property
    def iteration(self) -> int:
        """The last one that is recorded."""
        return max((record["iteration"] for record in self.records), default=0)

    @property
    def end(self) -> int | None:
        """The last one that there will be."""
        end = self.config.get("train_iters")
        return end if isinstance(end, int) else None

    def state(self, now: float | None = None) -> str:
        """In words: finished, or how far it is and how long ago it last wrote."""
        if self.exported and self.iteration == self.end:
            return "finished"
        of = f" of {self.end}" if self.end else ""
        if self.written is None:
            return "nothing recorded yet"
        ago = max(0, round((time.time() if now is None else now) - self.written))
        unit = next(
            (f"{ago // size} {name}" for size, name in ((86400, "d"), (3600, "h"), (60, "min")) if ago >= size), ""
        )
        return f"iteration {self.iteration}{of}, last written {unit or f'{ago} s'} before this report"


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != float("inf") and value == value
    )
