"""A run as one HTML page: what the template in ``template/`` is filled with."""

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mlora_tools.charts import Chart, Curve, smoothed
from mlora_tools.heatmap import Heatmap
from mlora_tools.recording import Recording

_TEMPLATE = Path(__file__).parent / "template"
_LOSS_UNITS = {"sft": "nats per target token", "dpo": "per pair"}
_BYTES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def render(recording: Recording, now: datetime.datetime | None = None) -> str:
    """The page.

    Args:
        recording: of the run; what it cannot show is added to its ``missing``.
        now: the time to date it with.
    """
    now = now or datetime.datetime.now().astimezone()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": size_of, "value": _plain}
    charts = _charts(recording)
    heatmap = Heatmap.of(recording)
    if heatmap is None and recording.records:
        recording.missing.append("No norms of the adapter are recorded; --log-adapter-norms-interval N records them.")
    return environment.get_template("page.html").render(
        name=recording.path.resolve().name,
        recording=recording,
        state=recording.state(now.timestamp()),
        made=now.strftime("%Y-%m-%d %H:%M %Z"),
        style=(_TEMPLATE / "page.css").read_text(encoding="utf-8"),
        script=(_TEMPLATE / "page.js").read_text(encoding="utf-8"),
        tiles=_tiles(recording),
        charts=charts,
        heatmap=heatmap,
        facts=_facts(recording.config),
        options=_options(recording.config),
        starts=_starts(recording.config),
        hosts=_hosts(recording.ranks),
        traffic=_traffic(recording.ranks),
    )


def size_of(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for size, unit in _BYTES:
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _large(count: float) -> str:
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4g}"


def _rate(value: float) -> str:
    if value == 0 or value >= 0.001:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# What else than the loss has a chart where it is recorded: key, title, unit, format, whether the axis starts at 0.
_CHARTS: tuple[tuple[str, str, str, Callable[[float], str], bool], ...] = (
    ("reward_margin", "Reward margin", "chosen over rejected", _number, False),
    ("reward_accuracy", "Reward accuracy", "share of pairs in their order", _number, True),
    ("grad_norm", "Gradient norm", "before clipping", _number, True),
    ("lr", "Learning rate", "", _rate, True),
    ("tokens_per_second", "Throughput", "tokens per second", _number, True),
    ("peak_memory", "Memory", "peak of the rank with most", size_of, True),
)


def _charts(recording: Recording) -> list[Chart]:
    """Those of which something is recorded."""
    iterations, losses = recording.series("loss")
    noisy = len(losses) > 20
    loss_curves = [
        Curve("training", iterations, losses, "faint" if noisy else "main"),
        *([Curve("training, smoothed", iterations, smoothed(losses))] if noisy else []),
        Curve("evaluation", *recording.series("eval_loss"), kind="second", dots=True),
    ]
    objective = recording.config.get("arguments", {}).get("objective", "sft")
    charts = [Chart("Loss", _LOSS_UNITS.get(objective, ""), loss_curves, _loss)]
    for key, title, unit, form, from_zero in _CHARTS:
        curve = Curve(title.lower(), *recording.series(key))
        evaluation = Curve("evaluation", *recording.series(f"eval_{key}"), kind="second", dots=True)
        charts.append(Chart(title, unit, [curve, evaluation], form, from_zero))
    charts = [chart for chart in charts if chart.curves]
    last = max((curve.xs[-1] for chart in charts for curve in chart.curves), default=1)
    for chart in charts:
        chart.x_range = (0, max(last, 1))
    return charts


def _tiles(recording: Recording) -> list[tuple[str, str, str]]:
    """(what, value, beside it) of the numbers that one looks for first."""
    tiles = []
    iterations, losses = recording.series("loss")
    if losses:
        tiles.append(("training loss", _loss(smoothed(losses)[-1]), f"from {_loss(losses[0])}"))
    _, evaluations = recording.series("eval_loss")
    if evaluations:
        tiles.append(("evaluation loss", _loss(evaluations[-1]), f"from {_loss(evaluations[0])}"))
    if iterations:
        tiles.append(("iterations", f"{recording.iteration:,}", _left(recording)))
    _, speeds = recording.series("tokens_per_second")
    if speeds:
        _, tokens = recording.series("tokens")
        tiles.append(("tokens per second", _number(median(speeds)), f"median; {_large(sum(tokens))} in all"))
    _, memory = recording.series("peak_memory")
    if memory:
        tiles.append(("peak memory", size_of(memory[-1]), "of a rank"))
    counts = recording.config.get("parameters", {})
    if counts:
        share = counts["trainable"] / counts["total"]
        tiles.append(("parameters trained", f"{counts['trainable']:,}", f"{share:.3%} of {_large(counts['total'])}"))
    return tiles


def _left(recording: Recording) -> str:
    """How many iterations there will be, and how long those that are left take at the pace of the last ones."""
    if not recording.end:
        return ""
    _, seconds = recording.series("seconds")
    left = recording.end - recording.iteration
    if not (left > 0 and seconds):
        return f"of {recording.end:,}"
    return f"of {recording.end:,}; {datetime.timedelta(seconds=round(median(seconds[-100:]) * left))} left"


def _facts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run is, in a few lines."""
    base, data, heldout, lora = (config.get(key) or {} for key in ("base", "data", "eval_data", "lora"))
    options = config.get("arguments", {})
    facts = [
        ("Base model", f"{base.get('path', '')} ({base.get('model_type', 'of no known family')})" if base else ""),
        ("Training data", _files(options.get("data"), data)),
        ("Evaluation data", _files(options.get("eval_data"), heldout)),
        ("LoRA", ", ".join(f"{key} {_plain(lora[key])}" for key in ("r", "lora_alpha", "lora_dropout") if key in lora)),
        ("Targets", _plain(lora.get("target_modules", ""))),
    ]
    batch = [("global_batch_size", "a global batch"), ("seq_length", "tokens a sequence")]
    facts.append(("Batches", ", ".join(f"{options[key]:,} {what}" for key, what in batch if key in options)))
    return [(name, text) for name, text in facts if text]


def _files(paths: Any, facts: Mapping[str, Any]) -> str:
    if not paths:
        return ""
    counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in facts.items() if isinstance(value, int))
    return f"{_plain(paths)} ({counts})" if counts else _plain(paths)


def _options(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Every option and field, by where it stands in ``config.json``."""
    groups = {"Options": config.get("arguments", {}), "LoRA": config.get("lora", {})}
    if config.get("starts"):
        groups["Versions"] = config["starts"][-1].get("versions", {})
    return {title: [(key, _plain(value)) for key, value in group.items()] for title, group in groups.items() if group}


def _starts(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row for each time that the run was started."""
    rows = []
    for start in config.get("starts", []):
        sizes = [(what, start.get(key)) for what, key in (("TP", "tensor"), ("PP", "pipeline"), ("DP", "data"))]
        layout = " × ".join(f"{what} {size}" for what, size in sizes if size is not None)
        if start.get("virtual_pipeline"):
            layout += f", {start['virtual_pipeline']} chunks a stage"
        if start.get("sequence_parallel"):
            layout += ", sequence parallel"
        rows.append(
            {
                "iteration": f"{start.get('iteration', 0):,}",
                "time": str(start.get("time", ""))[:16].replace("T", " "),
                "world": str(start.get("world_size", "")),
                "layout": layout,
                "device": f"{start.get('device', '')}, {start.get('backend', '')}".strip(", "),
            }
        )
    return rows


def _hosts(ranks: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Host -> its ranks."""
    hosts: dict[str, list[Mapping[str, Any]]] = {}
    for rank in ranks.get("ranks", []):
        hosts.setdefault(str(rank.get("host", "?")), []).append(rank)
    return hosts


def _traffic(ranks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each kind of collective, over the ranks; the greatest first."""
    found: dict[tuple[str, str, int, str], list[tuple[int, int]]] = {}
    for rank in ranks.get("ranks", []):
        for flow in rank.get("collectives", []):
            key = (flow["kind"], flow["axis"], flow["size"], flow["direction"])
            found.setdefault(key, []).append((flow["count"], flow["bytes"]))
    most = max((size for flows in found.values() for _, size in flows), default=1) or 1
    rows = [
        {
            "kind": kind.replace("_", "-"),
            "axis": axis,
            "size": size,
            "direction": direction,
            "ranks": len(flows),
            "count": _span(count for count, _ in flows),
            "bytes": max(size for _, size in flows),
            "share": max(size for _, size in flows) / most,
        }
        for (kind, axis, size, direction), flows in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], row["kind"], row["axis"]))


def _span(counts: Iterable[int]) -> str:
    values: Sequence[int] = sorted(counts)
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def _plain(value: Any) -> str:
    """A value of ``config.json`` for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)
