"""Pictures of a run, by matplotlib, imported only here and only when a run ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def loss_plot(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    floor: float | None = None,
    floor_label: str = "floor",
) -> Path | None:
    """Training and validation loss over steps, with the floor where it is known.

    Args:
        rows: Rows of metrics.jsonl.
        path: PNG to write; its folder is made.
        title: Name of the run.
        floor: Lowest possible loss in nats a token, if known.
        floor_label: What the floor is.

    Returns:
        The path, or None where there is too little to draw or matplotlib is missing.
    """
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
    if len(train) < 2:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*train), color="#56B4E9", linewidth=0.8, alpha=0.6, label="train")
    axes.plot(*zip(*_smoothed(train)), color="#0072B2", linewidth=1.8, label="train, smoothed")
    if val:
        axes.plot(*zip(*val), color="#D55E00", marker="o", markersize=3.5, label="validation")
        best = min(val, key=lambda point: point[1])
        axes.plot(*best, marker="*", markersize=12, color="#D55E00", linestyle="none")
        axes.annotate(
            f"{best[1]:.3f}", best, textcoords="offset points", xytext=(-4, 10), ha="right"
        )
    if floor is not None:
        axes.axhline(floor, color="#666666", linestyle="--", linewidth=1)
        axes.annotate(
            f"{floor_label} {floor:.3f}",
            (0.01, floor),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, -12),
            color="#444444",
        )
    low = min([v for _, v in train + val] + ([floor] if floor is not None else []))
    high = max(v for _, v in train)
    axes.set_ylim(max(low - 0.08 * (high - low), 0 if low >= 0 else low), None)
    axes.set_xscale("log")
    axes.set_xlabel("optimizer step (log)")
    axes.set_ylabel("loss in nats a token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """De-biased moving average over about a fiftieth of the points, so that it does not lag."""
    beta = 1 - 1 / max(len(points) / 50, 1.25)
    total = weight = 0.0
    out = []
    for step, value in points:
        total = beta * total + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        out.append((step, total / weight))
    return out


def sweep_plot(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    losses: Mapping[str, float],
    path: Path,
    *,
    title: str,
) -> Path | None:
    """The curves of a sweep beside each other, and the last loss over the rate.

    Args:
        curves: (step, loss) of every run, by its rate as written.
        losses: Last validation loss by rate; rates without one are left out of the right half.
        path: PNG to write; its folder is made.
        title: Name of the sweep.

    Returns:
        The path, or None where no run has a loss or matplotlib is missing.
    """
    if not losses:
        return None
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    order = sorted(curves, key=float)
    for i, lr in enumerate(order):
        if curves[lr]:
            colour = colormaps["viridis"](0.9 * i / max(len(order) - 1, 1))
            left.plot(*zip(*curves[lr]), color=colour, linewidth=1.5, label=lr)
    left.set_xlabel("optimizer step")
    left.set_ylabel("loss in nats a token")
    left.legend(title="train.lr", frameon=False)
    points = sorted((float(lr), loss) for lr, loss in losses.items())
    best = min(points, key=lambda point: point[1])
    right.plot(*zip(*points), color="#0072B2", marker="o", linewidth=1.2)
    right.plot(*best, marker="*", markersize=14, color="#D55E00", linestyle="none")
    right.annotate(
        f"{best[1]:.3f} at {best[0]:g}",
        best,
        textcoords="offset points",
        xytext=(0, -16),
        ha="center",
    )
    right.set_xscale("log")
    right.margins(y=0.2)
    right.set_xlabel("train.lr (log)")
    right.set_ylabel("last validation loss")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
