"""Curves over training steps as figures: for reports, and for reproductions of published claims.

matplotlib is imported when a figure is made, and used without its global state.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokjax.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Readable on white and on near-black alike, and told apart by the colour-blind.
COLORS = ("#3a86c8", "#e2762b", "#2a9d76", "#c4589a", "#b8961e", "#7a6fd0", "#8c8c8c", "#cf4a4a")
_INK = "#1f2a37"  # text and axes; becomes the page's text colour in an inline SVG
_MANY = 200  # points from which on a curve is drawn as a mean over a faint original
_DRAWN = 600  # bins an original of many points is drawn in


@dataclass(frozen=True)
class Curve:
    """One labelled curve: `values` at `steps`; values that are not finite leave a gap.

    Attributes:
        label: its name in the legend.
        steps: x coordinates, ascending.
        values: y coordinates, as many.
        style: a matplotlib line style, e.g. "--" for a control.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str = "-"


def plot_curves(
    curves: Sequence[Curve],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    levels: Mapping[str, float] | None = None,
    borders: Mapping[str, float] | None = None,
    log_y: bool = False,
    size: tuple[float, float] = (8.0, 4.0),
) -> "Figure":
    """Returns a figure of several labelled curves on shared axes.

    A curve of many points is drawn as its running mean over a faint original. The y axis leaves
    out the rare far outliers of such a curve, and the figure says so.

    Args:
        curves: what to draw; curves without a finite value appear in the legend only.
        title: above the axes.
        x_label: below them.
        y_label: beside them, with the unit.
        levels: label to y of dashed horizontal lines, e.g. an entropy or a published number.
        borders: label to x of dotted vertical lines, e.g. where a stage begins.
        log_y: logarithmic y axis.
        size: width and height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn: list[np.ndarray] = []
    for number, curve in enumerate(curves):
        steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
        values = np.where(np.isfinite(values), values, np.nan)
        if log_y:
            values = np.where(values > 0, values, np.nan)
        drawn.append(values)
        color = COLORS[number % len(COLORS)]
        _draw(axes, steps, values, curve, color, sorted((borders or {}).values()))
    for number, (label, level) in enumerate((levels or {}).items()):
        axes.axhline(level, color=COLORS[-1 - number % 2], ls="--", lw=1.4, label=_plain(label))
    if log_y:
        axes.set_yscale("log")
    _limit_y(axes, drawn, list((levels or {}).values()), log_y)
    _draw_borders(axes, borders or {})
    axes.set_title(_plain(title), color=_INK, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(_plain(x_label), color=_INK)
    axes.set_ylabel(_plain(y_label), color=_INK)
    axes.grid(alpha=0.18, color=_INK, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, which="both")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if max(axes.get_ylim()) >= 2e4 and not log_y:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif not log_y:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        axes.yaxis.get_offset_text().set_color(_INK)
    if len(curves) + len(levels or {}) > 1:
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    return figure


def plot_bars(
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    colors: Sequence[str],
    title: str = "",
    x_label: str = "",
    legend: Mapping[str, str] | None = None,
    width: float = 8.0,
) -> "Figure":
    """Returns a figure of horizontal bars with intervals, the first at the top.

    Args:
        labels: of the bars.
        values: their lengths; one that is not finite leaves its place empty.
        intervals: low and high end of each.
        colors: of each.
        title: above the axes.
        x_label: below them, with the unit.
        legend: what a colour means.
        width: in inches; the height follows from the number of bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(width, 1.3 + 0.36 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = [i for i, value in enumerate(values) if np.isfinite(value)]
    for i in known:
        low, high = intervals[i]
        axes.barh(i, values[i], color=colors[i], alpha=0.85, height=0.62)
        axes.plot([low, high], [i, i], color=_INK, lw=1.4, solid_capstyle="butt")
        axes.annotate(
            f"{values[i]:.3g}",
            (max(high, values[i], 0.0), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_title(_plain(title), color=_INK, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(_plain(x_label), color=_INK)
    axes.grid(axis="x", alpha=0.18, color=_INK, lw=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(colors=_INK, which="both")
    if legend:
        handles = [Patch(color=color, label=label) for label, color in legend.items()]
        axes.legend(handles=handles, frameon=False, labelcolor=_INK, fontsize=9, loc="best")
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the figure to a `.png` or `.svg` file, whole or not at all.

    Raises:
        StorageError: the file cannot be written.
        ValueError: the name ends in something else.
    """
    kind = Path(path).suffix
    if kind not in (".png", ".svg"):
        raise ValueError(f"{path}: a figure is saved as .png or .svg")
    out = io.BytesIO()
    _save(figure, out, format=kind[1:], dpi=144, facecolor="white")
    write_atomically(Path(path), out.getvalue())


def inline_svg(figure: "Figure", label: str, name: str) -> str:
    """Returns the figure as an SVG element for an HTML page, in the page's text colour.

    Args:
        figure: made by `plot_curves`.
        label: what a screen reader says.
        name: unique on the page; it keeps the ids of several figures apart.
    """
    import html

    import matplotlib

    out = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Glyphs as paths: the same layout in every browser, whatever fonts it has.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        _save(figure, out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    # Glyphs and groups have the same ids in every figure.
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg).replace(_INK, "currentColor")
    head = re.compile(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>')
    start = f'<svg viewBox="\\1" role="img" aria-label="{html.escape(label)}" {_NAMESPACES}>'
    return head.sub(start, svg, count=1)


_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def _plain(text: str) -> str:
    """Returns text that matplotlib shows as it is: no formula, no label hidden by its `_`."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _save(figure: "Figure", out: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        # A name in a script that the font lacks is shown as boxes, as a browser would.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, **options)


def _draw(
    axes: Any,
    steps: np.ndarray,
    values: np.ndarray,
    curve: Curve,
    color: str,
    borders: Sequence[float],
) -> None:
    style: dict[str, Any] = {"color": color, "ls": curve.style, "label": _plain(curve.label)}
    if len(values) < _MANY:
        marker = "o" if np.isfinite(values).sum() <= 30 else None
        axes.plot(steps, values, lw=1.8, marker=marker, ms=3.5, **style)
        return
    axes.plot(*_thin(steps, values), color=color, alpha=0.22, lw=0.8)
    axes.plot(*_running_mean(steps, values, borders), lw=1.8, **style)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest point of each bin: the same picture with fewer points."""
    if len(values) <= 2 * _DRAWN:
        return steps, values
    keep = []
    for part in np.array_split(np.arange(len(values)), _DRAWN):
        finite = part[np.isfinite(values[part])]
        if len(finite) < len(part):
            keep.append(part[~np.isfinite(values[part])][0])  # the gap stays a gap
        if len(finite):
            keep += [finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]]
    index = np.unique(keep)
    return steps[index], values[index]


def _running_mean(
    steps: np.ndarray, values: np.ndarray, borders: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns means over a centred window at up to about `_DRAWN` points.

    The window is cut off at the ends and at the borders, so that no mean mixes two stages.
    """
    half = max(2, len(values) // 100)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    edges = np.unique([0, *np.searchsorted(steps, borders), len(values)])
    ends = np.concatenate([edges[:-1], edges[1:] - 1])
    spread = np.linspace(0, len(values) - 1, min(len(values), _DRAWN)).astype(int)
    index = np.unique(np.concatenate([spread, ends]))
    stage = np.searchsorted(edges, index, side="right")
    low = np.maximum(index - half, edges[stage - 1])
    high = np.minimum(index + half + 1, edges[stage])
    count = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(count, 1)
    return steps[index], np.where(count > 0, mean, np.nan)


def _limit_y(axes: Any, drawn: list[np.ndarray], levels: list[float], log_y: bool) -> None:
    finite = [values[np.isfinite(values)] for values in drawn]
    finite = [values for values in finite if len(values)]
    if not finite or log_y:
        return
    tops = [
        values.max() if len(values) < _MANY else np.quantile(values, 0.995) for values in finite
    ]
    highest, shown = max(values.max() for values in finite), max([*tops, *levels])
    lowest = min(values.min() for values in [*finite, np.asarray(levels)] if len(values))
    if highest - lowest <= 3 * (shown - lowest):
        return
    axes.set_ylim(lowest - 0.05 * (shown - lowest), shown + 0.15 * (shown - lowest))
    note = f"outliers up to {highest:.3g} are above the frame"
    axes.text(0.99, 0.01, note, transform=axes.transAxes, ha="right", fontsize=8, color=_INK)


def _draw_borders(axes: Any, borders: Mapping[str, float]) -> None:
    for label, place in borders.items():
        axes.axvline(place, color=_INK, ls=":", lw=1.2, alpha=0.7)
        axes.annotate(
            _plain(label),
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=_INK,
        )
