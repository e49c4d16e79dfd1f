"""Fine-tuning runs for tests: a tiny model with tokenizer and data, and ranks of the trainer's command line.

Ranks are forked, as in :mod:`tests.ranks`, but meet as torchrun's workers do: by environment variables. What torchrun itself does
is tested with torchrun.
"""

import contextlib
import gc
import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlora_tools.finetune_lora import main
from tests.ports import free_port
from tests.tiny import VOCAB, write_model

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!"
LIMIT_S = 100
Entry = Callable[[Sequence[str]], int]


def write_base(path: Path, kind: str = "llama", **changes: Any) -> Path:
    """A tiny model with a tokenizer of one token a letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_model(path, kind, **changes)
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *LETTERS])}
    assert len(words) <= VOCAB
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """Prompts and completions of several lengths."""

    def record(number: int) -> dict[str, str]:
        letter = LETTERS[number % 26]
        return {
            "prompt": f"{letter * (1 + number % 7)}: ",
            "completion": f"{letter.upper()} {'abc'[number % 3] * 3}.",
        }

    return write_records(path, map(record, range(first, first + count)))


def write_records(path: Path, records: Iterable[dict[str, str]]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Finished:
    """How a rank ended: its exit code (minus a signal's number) and what it printed."""

    code: int
    text: str


def _work(
    rank: int, size: int, port: int, entry: Entry, argv: Sequence[str], log: Path, before: Callable[[], None] | None
) -> None:
    gc.freeze()  # Megatron collects garbage when it saves: spare it what came from the parent.
    with log.open("w", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True) for number in (1, 2))
        for name in list(os.environ):
            if name.startswith(("TORCHELASTIC_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                del os.environ[name]
        if size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        logging.getLogger().handlers.clear()  # pytest's, which are not the command line's
        if before is not None:
            before()
        code = 99
        with contextlib.suppress(SystemExit):
            code = entry(list(argv))
        os._exit(code)


class Ranks:
    """A command line of ours, the trainer's unless ``entry`` is another, running on forked ranks.

    Args:
        size: of the world.
        argv: of the command line.
        folder: for what the ranks print.
        before: called in each rank first.
    """

    def __init__(
        self,
        size: int,
        argv: Sequence[Any],
        folder: Path,
        before: Callable[[], None] | None = None,
        entry: Entry = main,
    ) -> None:
        context = multiprocessing.get_context("fork")
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        for log in self.logs:
            log.write_text("")
        words = [str(word) for word in argv]
        self.processes = [
            context.Process(target=_work, args=(rank, size, port, entry, words, self.logs[rank], before))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, limit_s: float = LIMIT_S) -> list[Finished]:
        """How each rank ended; those that do not end in time are killed, and the test fails."""
        end = time.monotonic() + limit_s
        try:
            for rank, process in enumerate(self.processes):
                process.join(max(0.0, end - time.monotonic()))
                assert process.exitcode is not None, (
                    f"rank {rank} runs on after {limit_s} s:\n{self.logs[rank].read_text()}"
                )
        finally:
            for process in self.processes:
                if process.exitcode is None:
                    process.kill()
                    process.join()
        return [
            Finished(int(process.exitcode or 0), _ours(log.read_text()))
            for process, log in zip(self.processes, self.logs, strict=True)
        ]

    def wait_for(self, text: str, limit_s: float = LIMIT_S) -> None:
        """Until rank 0 has printed ``text``."""
        end = time.monotonic() + limit_s
        while text not in self.logs[0].read_text():
            assert time.monotonic() < end, f"no {text!r} in {limit_s} s:\n{self.logs[0].read_text()}"
            assert self.processes[0].is_alive(), f"ended before {text!r}:\n{self.logs[0].read_text()}"
            time.sleep(0.02)

    def signal(self, number: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)


def _ours(text: str) -> str:
    """Without the warnings of torch's C++ side, such as one that a busy machine's peer does not answer yet."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("[W", "[rank")))


def run(size: int, argv: Sequence[Any], folder: Path, before: Callable[[], None] | None = None) -> list[Finished]:
    """Run the trainer on ``size`` ranks to its end."""
    return Ranks(size, argv, folder, before).wait()


def metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run, without what differs from run to run."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second", "peak_memory")}
        for record in records
    ]
