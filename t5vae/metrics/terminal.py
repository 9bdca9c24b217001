"""Panels as text for a terminal, by plotext."""

import numpy as np
import plotext
from matplotlib.ticker import MaxNLocator

from t5vae.metrics.panels import Drawing, Line, Panel, Scale, alone, is_skip, thin, tick_label

HEIGHT = 16  # rows of a panel
NARROW = 76  # columns of a panel at least, where there are several side by side
COLORS = (33, 208, 40, 160, 135, 94, 205, 37, 178, 246)  # of 256
HELD_OUT = "o"
GAP = "   "  # between entries of the legend
MARKS = {False: "^", True: "x"}  # of spikes and of skipped steps


def draw(drawing: Drawing, width: int, colored: bool) -> str:
    """All panels, and what their marks mean.

    Args:
        drawing: what is drawn.
        width: of the terminal, in columns.
        colored: whether it shows colours; else runs differ by letters.
    """
    across = min(len(drawing.panels), max(1, width // NARROW))
    panels = [_panel(panel, drawing, width // across - 1, colored) for panel in drawing.panels]
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    lines = [" ".join(parts) for row in rows for parts in zip(*row, strict=True)]
    text = "\n".join([*lines, _legend(drawing, width, colored)])
    return text if colored else "\n".join(map(str.rstrip, plotext.uncolorize(text).split("\n")))


def _panel(panel: Panel, drawing: Drawing, width: int, colored: bool) -> list[str]:
    plotext.clear_figure()
    plotext.limit_size(False, False)
    plotext.plotsize(width, HEIGHT)
    plotext.theme("clear")
    plotext.title(panel.key if panel.scale else f"{panel.key}: no finite value")
    plotext.xlabel(drawing.x_label)
    if panel.scale:
        _ticks(panel, panel.scale)
        for run, line in enumerate(panel.lines):
            _draw_line(line, panel.scale, run, width, colored or len(drawing.names) == 1)
    return plotext.build().split("\n")[:HEIGHT]


def _ticks(panel: Panel, scale: Scale) -> None:
    x = [x for line in panel.lines for c in (line.curve, line.held_out) if c for x in c.x[[0, -1]]]
    low, high = min(x), max(x)
    at = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    plotext.xticks(at, list(map(tick_label, at)))
    if scale.kind == "linear":
        round_ones = MaxNLocator(5).tick_values(scale.low, scale.high)
        ticks = [float(tick) for tick in round_ones if scale.low <= tick <= scale.high]
    else:
        ticks = scale.ticks
    plotext.yticks(list(_transform(np.array(ticks), scale)), list(map(tick_label, ticks)))


def _transform(y: np.ndarray, scale: Scale) -> np.ndarray:
    if scale.kind == "log":
        return np.log10(y)
    return np.arcsinh(y / scale.width) if scale.kind == "asinh" else y


def _draw_line(line: Line, scale: Scale, run: int, width: int, fine: bool) -> None:
    color = COLORS[run % len(COLORS)]
    if line.curve:
        x, y = thin(line.curve, 2 * width)
        y = _transform(y, scale)
        marker = "braille" if fine else _letter(run)
        for part in np.split(np.arange(len(y)), np.flatnonzero(np.isnan(y))):
            part = part[np.isfinite(y[part])]
            if len(part) > 1:
                plotext.plot(list(x[part]), list(y[part]), marker=marker, color=color)
        lone = alone(y)
        plotext.scatter(list(x[lone]), list(y[lone]), marker=marker, color=color)
    if line.held_out:
        x, y = thin(line.held_out, width)
        known = np.isfinite(y)
        y = _transform(y[known], scale)
        plotext.scatter(list(x[known]), list(y), marker=HELD_OUT, color=color)
    floor = float(_transform(np.array(scale.low), scale))
    for skips, marker in MARKS.items():
        at = [event.x for event in line.events if is_skip(event) == skips]
        plotext.scatter(at, [floor] * len(at), marker=marker, color=color)


def _letter(run: int) -> str:
    return chr(ord("A") + run % 26)


def _legend(drawing: Drawing, width: int, colored: bool) -> str:
    lines = [line for panel in drawing.panels for line in panel.lines]
    events = [event for line in lines for event in line.events]
    entries: list[tuple[str, int | None]] = [(name, None) for name in drawing.names]
    if len(entries) > 1:
        entries = [
            (f"{'━━' if colored else _letter(run)} {name}", COLORS[run % len(COLORS)])
            for run, name in enumerate(drawing.names)
        ]
    if any(line.held_out for line in lines):
        entries.append((f"{HELD_OUT} held-out", None))
    for skips, label in ((False, "spike"), (True, "skipped step")):
        if any(is_skip(event) == skips for event in events):
            entries.append((f"{MARKS[skips]} {label}", None))
    text, column = "", 0
    for entry, color in entries:
        if column:
            fits = column + len(GAP) + len(entry) <= width
            text += GAP if fits else "\n"
            column = column + len(GAP) if fits else 0
        text += plotext.colorize(entry, color) if color else entry
        column += len(entry)
    return text
