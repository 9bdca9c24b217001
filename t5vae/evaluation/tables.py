"""Reports as tables for people: one beside its controls, several beside one another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from t5vae.common.errors import printable


class Row(NamedTuple):
    """A figure of the reports.

    Attributes:
        name: its path in a report.
        control: the path under `controls` of what stands beside it; None for none.
        better: 1 where higher is better, -1 lower, 0 where it depends.
        meaning: in words.
    """

    name: str
    control: str | None
    better: int
    meaning: str


# A draw is a draw: the trigram model's figures stand beside every prior's.
ROWS = [
    Row("exact_match", "shuffled.exact_match", 1, "held-out texts that come back"),
    Row("token_accuracy", "shuffled.token_accuracy", 1, "tokens back at their place"),
    Row("edit_similarity", "shuffled.edit_similarity", 1, "1 - edit distance / length"),
    Row("nats_per_token", "trigram.nats_per_token", -1, "teacher-forced cross-entropy"),
    Row("shuffled_gap", None, 1, "nats a token a wrong code costs"),
    Row("valid", "trigram.valid", 1, "draws of N(0, I) that pass"),
    Row("unique", "trigram.unique", 1, "distinct ones among the valid"),
    Row("novel", "trigram.novel", 1, "of these, not in the training set"),
    Row("valid_unique_novel", "trigram.valid_unique_novel", 1, "the three multiplied"),
    Row("gaussian.valid", "trigram.valid", 1, "draws of a fitted Gaussian"),
    Row("gaussian.valid_unique_novel", "trigram.valid_unique_novel", 1, "the same, distinct, new"),
    Row(
        "interpolation.validity", "endpoints.interpolation.validity", 1, "steps of paths that pass"
    ),
    Row("interpolation.directness", "endpoints.interpolation.directness", 1, "1: no detour"),
    Row("interpolation.largest_step", "endpoints.interpolation.largest_step", -1, "1: one jump"),
    Row("interpolation.distinct", "endpoints.interpolation.distinct", 1, "texts on a path"),
    Row("interpolation.exact_ends", "endpoints.interpolation.exact_ends", 1, "both ends right"),
    Row("smoothness.quarter.similarity", "shuffled.smoothness.similarity", 1, "of z and z + eps/4"),
    Row("smoothness.half.similarity", "shuffled.smoothness.similarity", 1, "of z and z + eps/2"),
    Row("smoothness.half.valid", "shuffled.smoothness.valid", 1, "texts at z + eps/2 that pass"),
    Row("smoothness.one.similarity", "shuffled.smoothness.similarity", 0, "of z and z + eps"),
    Row("smoothness.one.valid", "shuffled.smoothness.valid", 1, "texts at z + eps that pass"),
    Row("probe.r2", "shuffled.probe.r2", 1, "{measure}, linear in the code"),
    Row("mmd", "prior.mmd", -1, "MMD^2 of codes and N(0, I)"),
    Row("sliced_wasserstein", "prior.sliced_wasserstein", -1, "W2^2 to N(0, 1), on directions"),
    Row("epps_pulley_slices", "prior.epps_pulley_slices", -1, "another distance, on directions"),
    Row("epps_pulley_axes", "prior.epps_pulley_axes", -1, "the same, on coordinates"),
    Row("mean_square_norm", "prior.mean_square_norm", 0, "|z|^2 / D"),
    Row("participation_ratio", "prior.participation_ratio", 0, "directions that carry variance"),
    Row("active_dimensions", "prior.active_dimensions", 0, "coordinates that vary"),
]
SAME = ("check", "measure", "n", "shards")  # what reports that are compared should share


def value_at(report: dict[str, Any], name: str) -> Any:
    """A dotted name's value; None where there is none."""
    value: Any = report
    for key in name.split("."):
        value = (value or {}).get(key)
    return value


def figure(value: float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.5f}" if abs(value) < 0.01 and value else f"{value:.3f}"


class Cells(NamedTuple):
    """A figure of one report, in words."""

    metric: str
    figure: str
    interval: str
    control: str
    beside: str
    meaning: str


def cells(report: dict[str, Any]) -> list[Cells]:
    """All rows of a report: the figure, its interval of 95 %, the control's name and figure.

    Args:
        report: what `evaluate` returned, or `eval.json` read back.
    """
    return [
        Cells(
            row.name.replace("_", " "),
            figure(value_at(report, row.name)),
            " to ".join(map(figure, value_at(report["intervals"], row.name) or ())),
            row.control.partition(".")[0] if row.control else "",
            figure(value_at(report["controls"], row.control)) if row.control else "",
            row.meaning.format(measure=printable(report["measure"])),
        )
        for row in ROWS
    ]


def table(report: dict[str, Any]) -> Table:
    """A report: metric, model, its interval of 95 %, the control beside it, what it means.

    Args:
        report: what `evaluate` returned, or `eval.json` read back.
    """
    n = report["n"]
    grid = Table(
        title=f"{n['held_out']:,} held-out sequences, {n['samples']:,} samples, "
        f"{n['interpolations']:,} interpolations; check: {printable(report['check'] or 'none')}",
        title_justify="left",
    )
    grid.add_column("metric", no_wrap=True)
    grid.add_column("model", justify="right", no_wrap=True)
    grid.add_column("95 %", justify="right", no_wrap=True)
    grid.add_column("control", justify="right", no_wrap=True)
    grid.add_column("meaning")
    for row in cells(report):
        control = f"{row.control} {row.beside}".strip()
        grid.add_row(row.metric, row.figure, row.interval, control, row.meaning)
    return grid


def comparison(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> Table:
    """Reports side by side, and of each metric the best in bold.

    Args:
        names: of the columns.
        reports: as many, what `evaluate_run` returned or `eval.json` read back.
    """
    grid = Table()
    grid.add_column("metric", no_wrap=True)
    for name in names:
        grid.add_column(printable(name), justify="right")
    for row in ROWS:
        values = [value_at(report, row.name) for report in reports]
        known = [row.better * value for value in values if value is not None and row.better]
        best = max(known, default=None)
        cells = [
            Text(figure(value), "bold" if value is not None and row.better * value == best else "")
            for value in values
        ]
        grid.add_row(row.name.replace("_", " "), *cells)
    return grid


def differences(reports: Sequence[dict[str, Any]]) -> list[str]:
    """In what reports differ that should not, for their figures to be comparable."""
    made = [report | {"shards": report["made_from"]["shards_sha256"]} for report in reports]
    return [name for name in SAME if any(one[name] != made[0][name] for one in made)]
