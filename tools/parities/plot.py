"""The comparison as a picture: the curves on top of each other, and how far they are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.parities.compare import TOL_LOSS, Handover

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#555555"
# Float32 losses of a few nats differ by 2e-7 or not at all; "not at all" is drawn here.
FLOOR = 1e-8


def draw(
    path: Path,
    losses: Mapping[str, NDArray[np.float64]],
    handovers: Sequence[Handover],
    *,
    title: str,
) -> Path:
    """Write the plot as a PNG.

    Args:
        path: Where; its folder is made.
        losses: Loss of every step by backend, the reference first.
        handovers: Runs that changed their backend half way.
        title: What was run.

    Raises:
        ImportError: matplotlib is missing.
        OSError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.4, 6.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
    _curves(top, losses, handovers)
    _differences(bottom, losses, handovers)
    for axes in (top, bottom):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    bottom.set_xlabel("optimizer step")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _curves(
    axes: Any, losses: Mapping[str, NDArray[np.float64]], handovers: Sequence[Handover]
) -> None:
    """Loss over steps. The curves coincide, so they differ in width and are named by a legend."""
    for i, (name, values) in enumerate(losses.items()):
        steps = np.arange(1, len(values) + 1)
        dashes = ("-", "--", ":")[(i - 1) % 3]
        style: dict[str, Any] = {"linewidth": 1.6, "marker": ".", "linestyle": dashes}
        every = max(len(values) // 25, 1)
        if i == 0:
            style = {"linewidth": 7, "alpha": 0.35, "solid_capstyle": "round"}
        label = f"{name} (reference)" if i == 0 else name
        axes.plot(
            steps, values, color=COLORS[i % len(COLORS)], label=label, markevery=every, **style
        )
    for i, handover in enumerate(handovers):
        steps = handover.first_step + np.arange(len(handover.losses))
        color = COLORS[(len(losses) + i) % len(COLORS)]
        mark = "s" if i % 2 == 0 else "D"
        style = {"marker": mark, "markersize": 6 + 2 * (i % 2)}
        style |= {"markerfacecolor": "none"}
        style |= {"linestyle": "", "markevery": max(len(steps) // 12, 1)}
        axes.plot(steps, handover.losses, color=color, label=_name(handover), **style)
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _differences(
    axes: Any, losses: Mapping[str, NDArray[np.float64]], handovers: Sequence[Handover]
) -> None:
    """Absolute difference of every step, on a logarithmic axis, against the tolerance."""
    reference, *others = losses
    lines = [
        (f"{name} against {reference}", 1, np.abs(losses[name] - losses[reference]))
        for name in others
    ]
    for h in handovers:
        own = losses[h.source][h.first_step - 1 :]
        lines.append((f"{_name(h)}, against {h.source}", h.first_step, np.abs(h.losses - own)))
    ends = []
    size = 4.5 if len(losses[reference]) <= 60 else 2.5
    for i, (label, first, gaps) in enumerate(lines):
        if not gaps.size:
            continue
        color, mark = COLORS[(1 + i) % len(COLORS)], "osD^v"[i % 5]
        shown = np.where(gaps > FLOOR, gaps, FLOOR)
        steps = first + np.arange(len(gaps))
        axes.plot(steps, shown, color=color, linewidth=1, alpha=0.35)
        axes.plot(steps, shown, color=color, linestyle="", marker=mark, markersize=size, alpha=0.9)
        ends.append((float(shown[-1]), label, color))
    axes.axhline(TOL_LOSS, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"tolerance {TOL_LOSS:.0e} nats",
        (0.01, TOL_LOSS),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color=GREY,
        fontsize=9,
    )
    highest = max([TOL_LOSS, *(float(np.nanmax(g, initial=0)) for _, _, g in lines)])
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 2.5, 8 * min(highest, 1e6))
    decades = range(-7, int(np.log10(min(highest, 1e6))) + 2, 1 if highest < 1 else 2)
    axes.set_yticks([FLOOR, *(10.0**d for d in decades)])
    axes.set_yticklabels(["0", *(f"$10^{{{d}}}$" for d in decades)])
    axes.minorticks_off()
    axes.set_ylabel("|difference of loss| (nats a token)")
    _label_ends(axes, ends, len(losses[reference]))


def _name(handover: Handover) -> str:
    return handover.label.replace("->", "\N{RIGHTWARDS ARROW}")


def _label_ends(axes: Any, ends: list[tuple[float, str, str]], num_steps: int) -> None:
    """Name each line at its right end, pushed apart where they would overlap."""
    low, high = np.log10(axes.get_ylim())
    room = 0.09 * (high - low)
    previous = -np.inf
    for value, label, color in sorted(ends):
        height = max(np.log10(value), previous + room)
        previous = height
        axes.annotate(
            label,
            (num_steps, 10**height),
            xytext=(8, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
