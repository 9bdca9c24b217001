"""Panels as a picture, by matplotlib: PNG, SVG or PDF."""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from t5vae.common.errors import UserError
from t5vae.metrics.panels import Drawing, Line, Panel, alone, is_skip, thin, tick_label, trend

SUFFIXES = (".png", ".svg", ".pdf")
WIDTH, HEIGHT = 4.6, 3.1  # inches, of a panel
BINS = 600  # about a panel's pixels
TRENDS = 200
MARKED = 20  # evaluations that get a mark, about
LONGEST = 48  # characters of a run's name
INK = "#333333"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#b0b0b0",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "xtick.color": "#b0b0b0",
    "xtick.labelcolor": INK,
    "ytick.color": "#b0b0b0",
    "ytick.labelcolor": INK,
}


def check_out(out: Path) -> None:
    """Refuse a file that could not be written, before anything is read.

    Raises:
        UserError: its ending or its folder.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{out} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")


def write_picture(drawing: Drawing, out: Path) -> None:
    """Draw all panels into one file, of the format that its ending says.

    Raises:
        UserError: it cannot be written.
    """
    content = picture(drawing, out.suffix[1:].lower())
    try:
        out.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None


def picture(drawing: Drawing, format: str) -> bytes:
    """All panels as one picture: png, svg or pdf."""
    content = io.BytesIO()
    with mpl.rc_context(STYLE):
        _figure(drawing).savefig(content, format=format, dpi=150)
    return content.getvalue()


def _figure(drawing: Drawing) -> Figure:
    count = len(drawing.panels)
    columns = count if count <= 3 else min(4, -(-count // 2))
    rows = -(-count // columns)
    width = columns * WIDTH
    handles = _legend(drawing)
    names = [str(handle.get_label()) for handle in handles]
    across = max(1, min(len(names), int(width / (0.075 * max(map(len, names), default=1) + 0.6))))
    legend_height = 0.2 * -(-len(names) // across) + 0.15 if names else 0.0
    figure = Figure((width, rows * HEIGHT + legend_height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, drawing.panels, strict=False):
        _draw(axes, panel, drawing)
    for axes in grid[count:]:
        axes.set_visible(False)
    if handles:
        place: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "labelcolor": INK}
        for text in figure.legend(handles, names, ncols=across, **place).get_texts():
            text.set_parse_math(False)
    return figure


def _colors(count: int) -> list[str]:
    few, many = mpl.color_sequences["tab10"], mpl.colormaps["turbo"]
    colors = few[:count] if count <= len(few) else many(np.linspace(0.05, 0.95, count))
    return [mpl.colors.to_hex(color) for color in colors]


def _legend(drawing: Drawing) -> list[Line2D]:
    """The runs, if there are several, and what else is drawn."""
    lines = [line for panel in drawing.panels for line in panel.lines]
    events = [event for line in lines for event in line.events]
    runs = zip(_colors(len(drawing.names)), drawing.names, strict=True)
    handles = []
    if len(drawing.names) > 1:
        handles += [Line2D([], [], color=color, label=_shorten(name)) for color, name in runs]
    if any(line.held_out for line in lines):
        handles.append(Line2D([], [], label="held-out", **_held_out(INK)))
    for skips, label in ((False, "spike"), (True, "skipped step")):
        if any(is_skip(event) == skips for event in events):
            handles.append(Line2D([], [], label=label, **_mark(INK, skips)))
    return handles


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST else "\u2026" + name[1 - LONGEST :]


def _held_out(color: str) -> dict[str, Any]:
    face: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.2, "markersize": 4}
    return {"color": color, "linestyle": "--", "linewidth": 1.2, "marker": "o", **face}


def _mark(color: str, skips: bool) -> dict[str, Any]:
    marker = "x" if skips else "^"
    return {"color": color, "linestyle": "none", "marker": marker, "markersize": 5}


def _draw(axes: Axes, panel: Panel, drawing: Drawing) -> None:
    axes.set_title(panel.key, parse_math=False)
    axes.set_xlabel(drawing.x_label)
    if panel.scale is None:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=INK)
    elif panel.scale.kind != "linear":
        width = {"linear_width": panel.scale.width} if panel.scale.kind == "asinh" else {}
        axes.set_yscale(panel.scale.kind, **width)
        axes.set_yticks(panel.scale.ticks, list(map(tick_label, panel.scale.ticks)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.scale.high >= 1000:
        axes.yaxis.set_major_formatter(lambda value, _: tick_label(value))
    for color, line in zip(_colors(len(drawing.names)), panel.lines, strict=True):
        _draw_line(axes, line, color)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: tick_label(value))


def _draw_line(axes: Axes, line: Line, color: str) -> None:
    if line.curve:
        x, y = thin(line.curve, BINS)
        middle = trend(line.curve, TRENDS)
        faint: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.35} if middle else {"linewidth": 1.5}
        axes.plot(x, y, color=color, zorder=2, **faint)
        axes.plot(x[alone(y)], y[alone(y)], ".", color=color, zorder=2)
        if middle:
            axes.plot(*middle, color=color, linewidth=1.6, zorder=3)
    if line.held_out:
        every = max(1, len(line.held_out.y) // MARKED)
        axes.plot(*thin(line.held_out, BINS), zorder=4, markevery=every, **_held_out(color))
    for skips in (False, True):
        at = [event.x for event in line.events if is_skip(event) == skips]
        if at:  # matplotlib cannot lay out what is nowhere
            edge = axes.get_xaxis_transform()
            mark = _mark(color, skips)
            axes.plot(at, np.zeros(len(at)), transform=edge, clip_on=False, zorder=5, **mark)
