"""How good a space gets for a budget of compute: the original's design, a plain autoencoder, ours.

    python benchmarks/quality.py --minutes 8 --write
    python benchmarks/quality.py --ablations --write

On lines of Python, on two CPU cores or all accelerators; a T5-small on the latter. What was
trained is kept in --out, and not trained again. --write puts the section into docs/quality.md.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml
from _launches import ON_CPU, QUICKSTART, T5_SMALL, Launch, build_shards
from _report import ROOT, Block, Page, Target, figure, installed, table

from shards import open_index
from t5vae.config import load_config
from t5vae.evaluation import read_report
from t5vae.evaluation.tables import value_at
from t5vae.metrics.reading import read_metrics

LEGACY = ROOT / "configs" / "legacy.yaml"
STEPS = 1000
"""Of an ablation."""
CALIBRATION = 40
"""Steps that tell how long one takes."""

AUTOENCODER = (
    *("objective.mmd.weight=0", "objective.latent_noise=0", "objective.input_mask=0"),
    "model.normalize=false",
)
SIZES = ("vocab_size", "sequence_length", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
"""All contenders have these in common, whatever configs/legacy.yaml says."""

ABLATIONS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "no input mask": ("objective.input_mask=0",),
    "no noise": ("objective.latent_noise=0",),
    "no MMD": ("objective.mmd.weight=0",),
    "2,048 pieces": ("data.shards={out}/shards-2048",),
    "bottleneck attention, 8 memory tokens": ("model.bottleneck=attention",),
    "kernel multi_rbf": ("objective.mmd.kernel=multi_rbf",),
    "latent size / 2": ("model.latent_size={half_latent}",),
}

FIGURES = {
    "exact match": "exact_match",
    "1 - edit distance": "edit_similarity",
    "valid, N(0, I)": "valid",
    "unique": "unique",
    "novel": "novel",
    "valid x unique x novel": "valid_unique_novel",
    "valid, fitted Gaussian": "gaussian.valid",
    "valid x unique x novel, fitted": "gaussian.valid_unique_novel",
    "interpolation: valid": "interpolation.validity",
    "interpolation: distinct": "interpolation.distinct",
    "similarity at z + eps/2": "smoothness.half.similarity",
    "what a wrong code costs, nats": "shuffled_gap",
    "length from the code, R²": "probe.r2",
    "MMD² to N(0, I)": "mmd",
    "participation ratio": "participation_ratio",
}

CONTROLS = ("trigram", "held out")

ABLATION_COLUMNS = (
    *("exact match", "valid, N(0, I)", "unique", "novel", "valid, fitted Gaussian"),
    *("interpolation: valid", "similarity at z + eps/2", "participation ratio", "MMD² to N(0, I)"),
)


def contenders() -> dict[str, tuple[str, ...]]:
    """Each one's changes to QUICKSTART."""
    original = yaml.safe_load(LEGACY.read_text())
    sections = {name: original[name] for name in ("model", "objective", "optim")}
    return {"legacy": tuple(flat(sections)), "autoencoder": AUTOENCODER, "ours": ()}


def flat(tree: dict[str, Any], above: str = "") -> Iterator[str]:
    """Nested settings as overrides, without SIZES."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{name}.")
        elif name not in SIZES:
            yield f"{above}{name}={value if isinstance(value, str) else json.dumps(value)}"


class Place(NamedTuple):
    """Where runs take place, and what is trained there."""

    title: str
    ranks: int
    environment: dict[str, str]
    settings: tuple[str, ...]
    length: int
    beside: int
    """Ablations at a time."""


def place() -> Place:
    if not torch.accelerator.is_available():
        return Place("2 CPU cores", 2, ON_CPU, (), 16, 2)
    ranks = torch.accelerator.device_count()
    settings = (
        *(*T5_SMALL, "data.global_batch_size=512"),
        *("model.latent_size=256", "optim.lr=1e-3"),
    )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "accelerator"
    return Place(f"{ranks} x {name}", ranks, {}, settings, 20, 1)


class Bench(NamedTuple):
    place: Place
    out: Path

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    def settings(self, run: Path, *changes: str) -> list[str]:
        """Of a run, later ones over earlier ones."""
        own = (f"data.shards={self.shards}", f"run.output_dir={run}", f"run.name={run.name}")
        quiet = ("eval.every=0", "checkpoint.every=0")
        return [str(QUICKSTART), *own, *quiet, *self.place.settings, *changes]

    def launch(self, title: str, ranks: int, settings: list[str]) -> None:
        title = f"{time.strftime('%H:%M')} {title}"
        Launch.of(title, ranks, self.place.environment, ROOT / "train.py", *settings)

    def train(self, name: str, *changes: str, ranks: int, minutes: float | None = None) -> Path:
        """A run of that many minutes, or of STEPS steps, and its evaluation, unless it is there."""
        run = self.out / re.sub(r"\W+", "-", name)
        if (run / "eval.json").is_file():
            return run
        steps = STEPS
        if minutes is not None:
            trial = self.out / f"{run.name}-trial"
            often = ("log.every=5", f"train.steps={CALIBRATION}")
            self.launch(f"{name}, trial", ranks, self.settings(trial, *changes, *often))
            took = median(line["step_seconds"] for line in read_metrics(trial)[2:])
            steps = int(60 * minutes / took)
        self.launch(name, ranks, self.settings(run, f"train.steps={steps}", *changes))
        for command in ("export", "eval"):
            subprocess.run(
                [str(Path(sys.executable).with_name("t5vae")), command, str(run)],
                check=True,
                stdout=subprocess.DEVNULL,
                env=os.environ | self.place.environment,
            )
        return run

    def ablations(self) -> Iterator[tuple[str, Path]]:
        """All of them."""
        config = load_config(QUICKSTART, self.settings(self.out)[1:])
        values = {"out": self.out, "half_latent": config.model.latent_size // 2}
        build_shards(self.out / "shards-2048", 2048, self.place.length)
        with ThreadPoolExecutor(self.place.beside) as pool:
            runs = {
                name: pool.submit(
                    self.train,
                    f"ablation {name}",
                    *(change.format(**values) for change in changes),
                    ranks=1,
                )
                for name, changes in ABLATIONS.items()
            }
            yield from ((name, run.result()) for name, run in runs.items())


def score(report: dict[str, Any]) -> float:
    """Exact match times valid x unique x novel, by the better prior."""
    generated = (report["valid_unique_novel"], report["gaussian"]["valid_unique_novel"])
    return report["exact_match"] * max(generated)


def cell(report: dict[str, Any], name: str) -> str:
    value = value_at(report, name)
    interval = value_at(report["intervals"], name)
    if value is None:
        return ""
    digits = 5 if abs(value) < 0.01 and name == "mmd" else 3
    if interval is None:
        return f"{value:.{digits}f}"
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def figure_rows(reports: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row of each figure and the score: the reports', then the controls of "ours"."""
    controls = reports["ours"]["controls"]
    rows = []
    for title, name in FIGURES.items():
        beside = [value_at(controls[control], name) for control in ("trigram", "held_out")]
        rows.append(
            (
                title,
                *(cell(report, name) for report in reports.values()),
                *("" if value is None else f"{value:.3f}" for value in beside),
            )
        )
    scores = (f"**{score(report):.3f}**" for report in reports.values())
    return [*rows, ("**score**", *scores, "", "")]


def contest(bench: Bench, minutes: float) -> Block:
    runs = {
        name: bench.train(name, *changes, ranks=bench.place.ranks, minutes=minutes)
        for name, changes in contenders().items()
    }
    reports = {name: read_report(run) for name, run in runs.items()}
    rows = figure_rows(reports)
    scores = {name: score(report) for name, report in reports.items()}
    lines = {name: read_metrics(run) for name, run in runs.items()}
    rows.append(("steps", *(f"{found[-1]['step']:,}" for found in lines.values()), "", ""))
    trained = [(found[-1]["time"] - found[0]["time"]) / 60 for found in lines.values()]
    rows.append(("minutes, first to last line", *map(figure, trained), "", ""))
    config = load_config(runs["ours"] / "config.yaml")
    t5 = config.model.t5
    text = (
        f"{minutes:g} minutes of training each on {bench.place.title}, width {t5.d_model}, "
        f"{t5.num_layers} + {t5.num_layers} layers, batches of {config.data.global_batch_size}.\n\n"
    )
    header = ("", *reports, *CONTROLS)
    met = list(targets(reports["ours"], scores, bench.place))
    return Block("equal time", text + table(header, rows), met)


def targets(ours: dict[str, Any], scores: dict[str, float], place: Place) -> Iterator[Target]:
    large = bool(place.settings)
    yield Target("ours: exact match", 0.95 if large else 0.60, ours["exact_match"])
    yield Target("ours: valid draws of N(0, I)", 0.95 if large else 0.75, ours["valid"])
    if large:
        yield Target("ours: unique", 0.90, ours["unique"])
        yield Target(
            "ours: novel, the trigram's", ours["controls"]["trigram"]["novel"], ours["novel"]
        )
        yield Target("ours: valid interpolations", 0.90, ours["interpolation"]["validity"])
    yield Target("ours: score, that of legacy", scores["legacy"], scores["ours"])
    yield Target("ours: score, that of autoencoder", scores["autoencoder"], scores["ours"])


def ablated(bench: Bench) -> Block:
    chosen = {title: FIGURES[title] for title in ABLATION_COLUMNS}
    rows = []
    for name, run in bench.ablations():
        report = read_report(run)
        figures = (value_at(report, at) for at in chosen.values())
        values = (
            f"{value:.5f}" if at == "mmd" else f"{value:.3f}"
            for at, value in zip(chosen.values(), figures, strict=True)
        )
        rows.append((name, *values, f"{score(report):.3f}"))
    header = ("change", *chosen, "score")
    text = f"{STEPS:,} steps each on {bench.place.title}.\n\n"
    return Block("ablations", text + table(header, rows))


def data(bench: Bench) -> str:
    index = open_index(str(bench.shards))
    return (
        f"Byte-level BPE of {index.vocab_size:,} pieces, up to {index.max_length} tokens, which "
        f"keeps {index.share_within(index.max_length):.0%} of the distinct lines: "
        f"{index.splits['train'].sequences:,} for training, and "
        f"{index.splits['valid'].sequences:,} held out."
    )


def main() -> None:
    page = Page(__doc__, "quality.md", apart=True)
    page.add_argument("--minutes", type=float, default=8, help="of training, each contender")
    page.add_argument("--ablations", action="store_true", help="in place of these contenders")
    page.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    args = page.options()
    bench = Bench(place(), args.out.resolve())
    build_shards(bench.shards, 4096, bench.place.length)
    block = ablated(bench) if args.ablations else contest(bench, args.minutes)
    page.publish([block], installed("torch", "transformers", "deepspeed"), data(bench))


if __name__ == "__main__":
    main()
