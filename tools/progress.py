"""What a person sees of a run: a progress bar in a terminal, lines elsewhere."""

import contextlib
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any


class Progress(contextlib.ExitStack):
    """A context that shows iterations as they are done.

    Args:
        start, end: iterations done before, and in the end.
        log_interval: iterations between lines where there is no terminal.
        metrics: what the objective tells beside the loss.
    """

    def __init__(self, start: int, end: int, log_interval: int, metrics: Sequence[str] = ()) -> None:
        super().__init__()
        self._start, self._end, self._log_interval, self._metrics = start, end, log_interval, metrics
        self._bar: Any = None
        self._seconds = 0.0

    def __enter__(self) -> "Progress":
        super().__enter__()
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = self.enter_context(
                tqdm(initial=self._start, total=self._end, unit="it", dynamic_ncols=True, smoothing=0.1)
            )
            self.enter_context(logging_redirect_tqdm())
        return self

    def step(self, record: dict[str, Any]) -> None:
        """Show an iteration: loss and the objective's metrics, tokens a second, gradient norm and the time that is left."""
        self._seconds += record["seconds"]
        iteration = record["iteration"]
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s, grad norm {record['grad_norm']:.3g}",
                refresh=False,
            )
            self._bar.update(iteration - self._bar.n)
        elif iteration % self._log_interval == 0 or iteration in (self._start + 1, self._end):
            left = self._seconds / (iteration - self._start) * (self._end - iteration)
            self.line(
                f"iteration {iteration}/{self._end} | loss {record['loss']:.4f} | {self._told(record)}lr {record['lr']:.3e} | "
                f"grad norm {record['grad_norm']:.3g} | {record['tokens_per_second']:,.0f} tokens/s | "
                f"ETA {timedelta(seconds=round(left))}"
            )

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show an evaluation."""
        told = self._told(record, "eval_")
        self.line(f"iteration {record['iteration']}/{self._end} | {told}evaluation loss {record['eval_loss']:.4f}")

    def _told(self, record: dict[str, Any], prefix: str = "") -> str:
        return "".join(f"{name.replace('_', ' ')} {record[prefix + name]:.3g} | " for name in self._metrics)

    def line(self, text: str) -> None:
        """Show a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)
