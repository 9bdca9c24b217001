"""The plots of a report, as SVG."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from t5vae.metrics.picture import INK, STYLE

SIZE = (5.2, 3.4)  # inches
BLUE, GREY = "#1f77b4", "#9a9a9a"


def pictures(report: dict[str, Any]) -> dict[str, str]:
    """SVG documents by the name of what they show."""
    shown, measure = report["pictures"], report["measure"]
    return {
        "length": _drawn(lambda axes: _by_length(axes, shown["by_length"])),
        "eigenvalues": _drawn(lambda axes: _eigenvalues(axes, shown["eigenvalues"])),
        "histogram": _drawn(lambda axes: _histogram(axes, shown["histogram"])),
        "quantiles": _drawn(lambda axes: _quantiles(axes, shown["quantiles"])),
        "map": _drawn(lambda axes: _map(axes, shown["map"], shown["values"], measure)),
    }


def _drawn(draw: Callable[[Axes], None]) -> str:
    content = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": "t5vae"}):
        figure = Figure(SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _by_length(axes: Axes, lengths: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] for row in lengths]
    exact = np.array([row["exact_match"] for row in lengths])
    low, high = np.array([row["interval"] for row in lengths]).T
    error = [exact - np.minimum(low, exact), np.maximum(high, exact) - exact]
    axes.errorbar(tokens, exact, error, color=BLUE, marker="o", markersize=4, capsize=2)
    axes.set(xlabel="tokens, end token included", ylabel="exact match", ylim=(-0.03, 1.03))
    beside = axes.twinx()
    beside.bar(tokens, [row["n"] for row in lengths], color=GREY, alpha=0.25)
    beside.set_ylabel("sequences")
    beside.grid(False)


def _eigenvalues(axes: Axes, eigenvalues: list[float]) -> None:
    axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, color=BLUE, marker=".", markersize=4)
    axes.axhline(1, color=GREY, linestyle="--", label="N(0, I)")
    axes.set(xlabel="direction", ylabel="variance of the codes", ylim=(0, None))
    axes.legend(frameon=False, labelcolor=INK)


def _histogram(axes: Axes, histogram: dict[str, list[float]]) -> None:
    edges = np.array(histogram["edges"])
    x = np.linspace(edges[0], edges[-1], 200)
    axes.stairs(histogram["density"], edges, fill=True, color=BLUE, alpha=0.5, label="codes")
    axes.plot(x, np.exp(-x * x / 2) / np.sqrt(2 * np.pi), color=INK, label="N(0, 1)")
    axes.set(xlabel="value of a coordinate", ylabel="density")
    axes.legend(frameon=False, labelcolor=INK)


def _quantiles(axes: Axes, quantiles: dict[str, list[Any]]) -> None:
    x = np.arange(1, len(quantiles["values"][0]) + 1)
    normal = (-1.645, -0.674, 0, 0.674, 1.645)
    for values, level, there in zip(quantiles["values"], quantiles["levels"], normal, strict=True):
        axes.plot(x, values, color=BLUE, linewidth=1.4 if level == 0.5 else 0.8)
        axes.axhline(there, color=GREY, linestyle="--", linewidth=0.8)
    axes.set(xlabel="coordinate, by variance", ylabel="5, 25, 50, 75, 95 % quantiles")


def _map(axes: Axes, codes: dict[str, Any], values: list[float | None], measure: str) -> None:
    known = [value for value in values if value is not None]
    color = np.array([np.nan if value is None else value for value in values])
    points: dict[str, Any] = {"s": 7, "linewidths": 0}
    axes.scatter(codes["x"], codes["y"], color="#dddddd", **points)
    if known:
        limits = np.quantile(known, [0.02, 0.98])
        drawn = axes.scatter(
            codes["x"],
            codes["y"],
            c=color,
            cmap="viridis",
            vmin=limits[0],
            vmax=limits[1],
            **points,
        )
        axes.figure.colorbar(drawn, ax=axes, label=measure)
    share = f"{codes['share']:.0%} of the variance"
    axes.set(xlabel=f"the two main directions: {share}", aspect="equal")
