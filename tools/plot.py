"""The loss curve of a run as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlora_tools.charts import smoothed


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path, unit: str) -> None:
    """Draw training loss (each step, and smoothed) and evaluation loss over the iterations.

    Args:
        records: of ``metrics.jsonl``.
        path: of the PNG.
        unit: what the loss is a mean over.
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
        axes.plot(iterations, smoothed(losses), color="tab:blue", linewidth=1.8, label="training, smoothed")
    evaluations = [(record["iteration"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="tab:orange", markersize=4, label="evaluation")
    axes.set(xlabel="iteration", ylabel=f"loss [nats / {unit}]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if steps or evaluations:
        axes.legend(frameon=False)
    figure.savefig(path)
