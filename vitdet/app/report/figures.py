"""The report's plots, as SVG text. Colours are told apart by colour-blind people too."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from vitdet.app.report.matching import RECALLS, Json

# "Color Universal Design" (Okabe and Ito 2008), without black and the pale yellow
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.edgecolor": "#7b8794",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "vitdet",  # the same file for the same numbers
    "text.parse_math": False,  # names of classes are no formulas
}


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _line(place: int) -> dict[str, Any]:
    """A colour and a dash; more lines than colours differ in their dashes."""
    dash = _DASHES[place // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": dash}


def precision_recall(curves: Mapping[str, np.ndarray]) -> str:
    """Draw precision over recall.

    Args:
        curves: name -> (101,) precision at `RECALLS`.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for place, (name, curve) in enumerate(curves.items()):
            axes.plot(RECALLS, curve, label=name, linewidth=1.8, **_line(place))
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        beside = len(curves) > 4
        axes.legend(
            loc="center left" if beside else "lower left",
            bbox_to_anchor=(1.01, 0.5) if beside else None,
            fontsize=8,
        )
        return _svg(figure)


def confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    """Draw a confusion matrix: colour is the share of the row, numbers are objects.

    Args:
        counts: (n, n), rows what it is.
        names: of the n rows and columns.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(3.4, 1.2 + 0.42 * len(names))
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 1.2, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(names))
        axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
        axes.set(xlabel="found", ylabel="true")
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.55 else "#1f2933"
                axes.text(column, row, f"{count}", ha="center", va="center", color=colour, size=8)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the row")
        return _svg(figure)


def gains(values: Mapping[str, float]) -> str:
    """Draw what AP50 gains without each kind of errors, in points; nan has no bar."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.6), layout="constrained")
        axes = figure.subplots()
        names = list(values)[::-1]
        points = np.nan_to_num([100 * values[name] for name in names])
        labels = ["-" if np.isnan(values[name]) else f"{100 * values[name]:.1f}" for name in names]
        bars = axes.barh(names, points, color=COLOURS[0], height=0.65)
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set(xlabel="points of AP50 gained without this kind")
        axes.set_xlim(0, 1.15 * max(*points, 0.1))
        axes.grid(axis="y", visible=False)
        return _svg(figure)


def training(metrics: Sequence[Json], names: Sequence[str], title: str, *, log: bool) -> str:
    """Draw numbers of metrics.json over the images seen.

    Args:
        metrics: the file's lines.
        names: what to draw of them; lines without a name are left out of its curve.
        title: of the vertical axis.
        log: whether the vertical axis is logarithmic.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(names):
            points = [(line["images_seen"], line[name]) for line in metrics if name in line]
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < 12 else None
            label = name.removeprefix("loss_")
            axes.plot(x, y, label=label, linewidth=1.5, marker=marker, ms=4, **_line(place))
        axes.set(xlabel="images seen", ylabel=title, xlim=(0, None))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own are formulas
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return _svg(figure)
