"""Measure what a trained run's space of Python lines is good for, on lines it has not seen.

    python benchmarks/uses.py --quick
    python benchmarks/uses.py --write

Shapes: N texts, D latent size.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from _report import installed, machine, table
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # `shards` is the package, not the script
from shards.write.corpora import Corpus as Source
from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS
from t5vae.evaluation.metrics import exact_match, quality
from t5vae.evaluation.trigram import Trigram
from t5vae.latent import LatentSpace, checker, measure
from t5vae.latent.corpus import Corpus
from t5vae.latent.functions import python_tree
from t5vae.latent.optimize import Candidate

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "benchmarks" / "uses.md"

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

HEAD = """\
# What one can do with a space

Printed by `python benchmarks/uses.py --write` on this machine: {machine} The run is that of \
`make train`: {sequences:,} training lines, D = {latent}. All texts below but those of pairs are \
held out.
"""

DRAWS = """\
## Draws

{draws:,} of each prior, decoded greedily; of the valid ones, how many are distinct, and of these, \
how many are not in the training set. The trigram is a model of the same training lines that knows \
three tokens. Density is of the codes of held-out lines, in nats a coordinate.

"""

SEARCHES = """\
## Properties

Fitted on {fit:,} training lines, R² on a fifth of them. {searches} lines that parse, one search \
each with the defaults, the best candidate that parses: how much its true value is above the \
line's, mean ± standard error. The candidates are ranked by the function, or by the prediction at \
the code of the decoded text alone. The control is the best by the function that parses of as \
many codes in random directions, at the distance of the trust region's boundary.

"""

TARGETS = """\
How far the best candidate's length is from a target, from lines of {least} to {most} characters.

"""

PENALTY = """\
The gain of length with a penalty on the decoder's doubt, ranked by the function.

"""

CHANGES = """\
## Directions

Up to {pairs} pairs: training lines and the same with the replacement. Then up to {pairs} held-out \
lines, moved: how many came out as the replacement in the text would have them, and how many have \
the new and nothing of the old. The limit is how many of the wanted lines come back exactly from \
their own codes.

"""

STRANGERS = """\
## Outliers

{texts:,} held-out lines against as many strange texts at most, all short enough for the model: \
area under the ROC curve, 0.5 for chance.

"""


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


def say(line: str) -> None:
    print(line, file=sys.stderr)


def draws(bench: Bench) -> str:
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
    return DRAWS.format(draws=n) + table(header, rows)


def best(candidates: list[Candidate], by: Callable[[Candidate], float]) -> Candidate | None:
    """The highest by a value of those that have a true one."""
    return max((c for c in candidates if c.value == c.value), key=by, default=None)


def spread(gains: list[float]) -> str:
    error = stdev(gains) / len(gains) ** 0.5
    return f"{mean(gains):.2f} ± {error:.2f}"


def searches(bench: Bench) -> str:
    space = bench.space
    lines = [text for text in bench.held_out if VALID(text)][: bench.amount.searches]

    def gains(name: str, penalty: float = 0.0) -> tuple[list[float], ...]:
        function, fitted = measure(name), space.get_property(name)
        ours, predicted, control = [], [], []
        for seed, line in enumerate(lines):
            how = {"radius": RADIUS, "penalty": penalty, "seed": seed, "n": 10**6}
            found = space.optimize(line, fitted, function=function, check=VALID, **how)
            start = function(line)
            for values, by in ((ours, value_of), (predicted, prediction_of)):
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
        rows.append((name, *(f"{each:.2f}" for each in r2), *map(spread, gains(name))))
    fit = space.get_property(PROPERTIES[0]).n
    header = ("", "R², ridge", "R², mlp", "ranked by function", "by prediction", "control")
    text = SEARCHES.format(fit=fit, searches=len(lines)) + table(header, rows)

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
    text += "\n" + TARGETS.format(least=min(lengths), most=max(lengths))
    text += table(("target", "the line itself", "the best"), rows)

    say("penalties")
    rows = [(f"{penalty:g}", spread(gains("length", penalty)[0])) for penalty in PENALTIES]
    return text + "\n" + PENALTY + table(("penalty", "gain"), rows)


def value_of(candidate: Candidate) -> float:
    return candidate.value or 0.0


def prediction_of(candidate: Candidate) -> float:
    return candidate.predicted


def changes(bench: Bench) -> str:
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
    return CHANGES.format(pairs=n) + table((*header, "limit"), rows)


def strangers(bench: Bench) -> str:
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
    return STRANGERS.format(texts=len(usual)) + table(("", "texts", *scores), rows)


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/quickstart", help="a trained run")
    parser.add_argument("--quick", action="store_true", help="few texts, to see that all runs")
    parser.add_argument("--write", action="store_true", help=f"save as {DOC.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write saves whole runs: leave out --quick")
    try:
        bench = Bench(LatentSpace.load(args.run), QUICK if args.quick else FULL)
        sections = [part(bench) for part in (draws, searches, changes, strangers)]
    except UserError as error:
        parser.exit(2, f"{error}\n")
    head = HEAD.format(
        machine=machine(installed(sys.executable, ("torch", "scikit-learn", "zuko"))),
        sequences=len(bench.known),
        latent=bench.space.latent_size,
    )
    page = "\n".join((head, *sections))
    print(page)
    if args.write:
        DOC.write_text(page)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
