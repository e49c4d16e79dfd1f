"""The loss curve of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHED_OVER = 1 / 12  # of the run: less than the shape of the curve, more than the noise of a batch


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training loss (each step, and smoothed) and evaluation loss over the iterations.

    Args:
        records: of ``metrics.jsonl``.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [(record["iteration"], record["loss"]) for record in records if "loss" in record]
    if steps:
        iterations, losses = zip(*steps, strict=True)
        axes.plot(iterations, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training")
        axes.plot(iterations, _smoothed(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    evaluations = [(record["iteration"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="tab:orange", markersize=4, label="evaluation")
    axes.set(xlabel="iteration", ylabel="loss [nats / target token]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if steps or evaluations:
        axes.legend(frameon=False)
    figure.savefig(path)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start (Kingma and Ba 2015, section 3)."""
    keep = 1 - 1 / max(1.0, len(losses) * _SMOOTHED_OVER)
    average, weight, result = 0.0, 0.0, []
    for loss in losses:
        average = keep * average + (1 - keep) * loss
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result
