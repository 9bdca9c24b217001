"""Measure what a trained run's space of Python lines is good for, on lines it has not seen.

    python benchmarks/uses.py --quick
    python benchmarks/uses.py --write

Shapes: N texts, D latent size.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from _report import ROOT, Block, Page, installed, say, table
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor

from shards.write.corpora import Corpus as Source
from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS
from t5vae.evaluation.metrics import exact_match, quality
from t5vae.evaluation.trigram import Trigram
from t5vae.latent import LatentSpace, checker, measure
from t5vae.latent.corpus import Corpus
from t5vae.latent.functions import python_tree
from t5vae.latent.optimize import Candidate

PROPERTIES = ("length", "calls", "names")
GOALS = (30.0, 15.0)
PENALTIES = (0.3, 1.0)
RADIUS = 1.5
STRENGTHS = (1.0, 1.5)
REPLACEMENTS = {
    "`return` to `yield`": (r"\breturn\b", "yield"),
    "`self.` to `cls.`": (r"\bself\.", "cls."),
    "`True` to `False`": (r"\bTrue\b", "False"),
    "`==` to `!=`": (r"==", "!="),
    "`+` to `-`": (r" \+ ", " - "),
    "`name` to `value`": (r"\bname\b", "value"),
}
VALID = checker("python")


class Amount(NamedTuple):
    draws: int
    searches: int
    pairs: int
    texts: int


FULL, QUICK = Amount(10_000, 150, 200, 2000), Amount(200, 3, 20, 50)


@dataclass(frozen=True)
class Bench:
    """A run, and how much is measured of it."""

    space: LatentSpace
    amount: Amount

    @cached_property
    def training(self) -> Corpus:
        return self.space.training()

    @cached_property
    def known(self) -> list[str]:
        return self.training.texts(range(len(self.training)))

    @cached_property
    def held_out(self) -> list[str]:
        dataset = self.space.workspace.dataset()
        texts = dataset.texts("valid", range(dataset.sequences("valid")))
        return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]

    def fitting(self, texts: Iterable[str]) -> list[str]:
        texts = list(texts)
        ids = self.space.token_ids(texts)
        return [text for text, row in zip(texts, ids, strict=True) if self.space.fits(row)]


def draws(bench: Bench) -> Iterator[Block]:
    space, n = bench.space, bench.amount.draws
    known = frozenset(bench.known)
    held_out_ND = space.encode(bench.held_out)

    def row(name: str, texts: list[str], density: str) -> tuple[str, ...]:
        found = quality(texts, known, VALID)
        names = ("valid", "unique", "novel", "valid_unique_novel")
        return (name, *(f"{found[each]:.3f}" for each in names), density)

    rows = []
    for name in PRIORS:
        say(f"prior {name}")
        prior = space.prior(name)
        density = prior.log_density(held_out_ND).mean().item() / space.latent_size
        texts = space.decode(prior.draw(n, Generator().manual_seed(0)))
        rows.append(row(f"`{name}`", texts, f"{density:.3f}"))
    trigram = Trigram(space.tokenize(bench.known), space.tokenizer.eos_token_id)
    longest = space.model.config.sequence_length
    ids = trigram.sample(n, longest, np.random.default_rng(0))
    rows.append(row("trigram", space.detokenize(ids), "-"))
    header = ("drawn from", "valid", "unique", "novel", "product", "density")
    yield Block("draws", table(header, rows))


def best(candidates: list[Candidate], by: str) -> Candidate | None:
    """The highest by a value of those that have a true one."""
    true = (each for each in candidates if each.value == each.value)
    return max(true, key=attrgetter(by), default=None)


def with_error(gains: list[float]) -> str:
    error = stdev(gains) / len(gains) ** 0.5
    return f"{mean(gains):.2f} ± {error:.2f}"


def searches(bench: Bench) -> Iterator[Block]:
    space = bench.space
    lines = [text for text in bench.held_out if VALID(text)][: bench.amount.searches]

    def gains(name: str, penalty: float = 0.0) -> tuple[list[float], ...]:
        function, fitted = measure(name), space.get_property(name)
        ours, predicted, control = [], [], []
        for seed, line in enumerate(lines):
            how = {"radius": RADIUS, "penalty": penalty, "seed": seed, "n": 10**6}
            found = space.optimize(line, fitted, function=function, check=VALID, **how)
            start = function(line)
            for values, by in ((ours, "value"), (predicted, "predicted")):
                winner = best(found.candidates, by)
                values.append(winner.value - start if winner else 0.0)
            around = space.neighbors(line, RADIUS, found.decoded, seed)
            values = [function(text) for text in around if VALID(text)]
            control.append(max([start, *values]) - start)
        return ours, predicted, control

    rows = []
    for name in PROPERTIES:
        say(f"property {name}")
        r2 = (space.fit_property(None, name, kind=kind).r2 for kind in ("ridge", "mlp"))
        rows.append((name, *(f"{each:.2f}" for each in r2), *map(with_error, gains(name))))
    header = ("", "R², ridge", "R², mlp", "ranked by function", "by prediction", "control")
    yield Block("properties", table(header, rows))

    say("targets")
    rows = []
    for goal in GOALS:
        before, after = [], []
        for line in lines:
            how = {"function": measure("length"), "check": VALID, "radius": RADIUS, "n": 1}
            found = space.optimize(line, space.get_property("length"), goal=goal, **how)
            off = [abs(len(each) - goal) for each in (line, *(c.text for c in found.candidates))]
            before.append(off[0])
            after.append(min(off))
        rows.append((f"{goal:g}", f"{mean(before):.1f}", f"{mean(after):.1f}"))
    lengths = list(map(len, lines))
    text = f"From lines of {min(lengths)} to {max(lengths)} characters:\n\n"
    yield Block("lengths", text + table(("target", "the line itself", "the best"), rows))

    say("penalties")
    rows = [(f"{penalty:g}", with_error(gains("length", penalty)[0])) for penalty in PENALTIES]
    yield Block("penalties", table(("penalty", "gain"), rows))


def changes(bench: Bench) -> Iterator[Block]:
    space, n = bench.space, bench.amount.pairs
    rows = []
    for name, (old, new) in REPLACEMENTS.items():
        say(name)

        def pairs(texts: list[str], old: str = old, new: str = new) -> list[tuple[str, str]]:
            found = [text for text in texts if re.search(old, text)][: 2 * n]
            replaced = [re.sub(old, new, text) for text in found]
            short = set(bench.fitting(replaced))
            both = zip(found, replaced, strict=True)
            return [(before, after) for before, after in both if after in short][:n]

        order = np.random.default_rng(0).permutation(len(bench.known))
        direction = space.direction(pairs([bench.known[i] for i in order]))
        lines, wanted = map(list, zip(*pairs(bench.held_out), strict=True))
        shares = []
        for strength in STRENGTHS:
            moved = direction.apply(lines, strength)
            held = [new in text and not re.search(old, text) for text in moved]
            shares += [exact_match(moved, wanted), mean(held)]
        limit = exact_match(space.reconstruct(wanted), wanted)
        figures = (f"{share:.2f}" for share in (direction.consistency, *shares, limit))
        rows.append((name, str(len(lines)), *figures))
    header = ["", "lines", "consistency"]
    header += [f"{what}, {each:g}" for each in STRENGTHS for what in ("exactly", "changed")]
    yield Block("directions", table((*header, "limit"), rows))


def strangers(bench: Bench) -> Iterator[Block]:
    space, n = bench.space, bench.amount.texts
    rng = np.random.default_rng(0)
    usual = bench.held_out[:n]
    gaussian = space.prior("gaussian")

    def shuffled(text: str) -> str:
        tokens = space.tokenize([text])[0][:-1]
        return space.detokenize([[tokens[i] for i in rng.permutation(len(tokens))]])[0]

    def swapped(text: str) -> str:
        at = int(rng.integers(max(1, len(text) - 1)))
        return text[:at] + text[at : at + 2][::-1] + text[at + 2 :]

    kinds = {
        "sentences of docstrings": sentences(),
        "lines with their tokens shuffled": map(shuffled, usual),
        "lines with two characters swapped": map(swapped, usual),
    }
    scores: dict[str, Callable[[list[str]], Tensor | list[float]]] = {
        "nats a token": space.outlier_scores,
        "distance to 5 training codes": lambda texts: [
            mean(each.distance for each in near) for near in space.nearest(texts, 5)
        ],
        "density of the Gaussian": lambda texts: -gaussian.log_density(space.encode(texts)),
    }
    of_usual = {name: score(usual) for name, score in scores.items()}
    rows = []
    for kind, texts in kinds.items():
        say(kind)
        seen = {*usual, *bench.known}
        strange = [text for text in bench.fitting(texts) if text not in seen][:n]
        labels = [0] * len(usual) + [1] * len(strange)
        areas = (
            roc_auc_score(labels, [*of_usual[name], *score(strange)])
            for name, score in scores.items()
        )
        rows.append((kind, str(len(strange)), *(f"{area:.3f}" for area in areas)))
    yield Block("outliers", table(("", "texts", *scores), rows))


def sentences() -> list[str]:
    """First lines of the standard library's docstrings, in random order."""
    found = set()
    files = Source(None, "python").files
    for path in (Path(file.path) for file in files):
        tree = python_tree(path.read_text(errors="replace"))
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found.add((ast.get_docstring(node) or "").partition("\n")[0])
    ordered = sorted(found - {""})
    return [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]


def main() -> None:
    page = Page(__doc__, "benchmarks/uses.md", quick="few texts, to see that all runs")
    page.add_argument("--run", type=Path, default=ROOT / "runs/quickstart", help="a trained run")
    args = page.options()
    try:
        bench = Bench(LatentSpace.load(args.run), QUICK if args.quick else FULL)
        blocks = [block for part in (draws, searches, changes, strangers) for block in part(bench)]
    except UserError as error:
        page.exit(2, f"{error}\n")
    page.publish(
        blocks,
        installed("torch", "scikit-learn", "zuko"),
        f"The run has {len(bench.known):,} training lines, D = {bench.space.latent_size}; "
        f"searches have radius {RADIUS:g}.",
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
