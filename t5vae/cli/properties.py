"""Commands that find texts by what they are like: fit-property, optimize, outliers, dedupe."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from t5vae.cli.app import Json, app, console, print_json
from t5vae.cli.given import (
    PANEL,
    Check,
    Column,
    Device,
    File,
    Seed,
    Space,
    Texts,
    exactly,
    fitting_texts,
    given_texts,
    load,
)
from t5vae.common.errors import UserError

if TYPE_CHECKING:
    from t5vae.latent.optimize import Candidate, Optimized

CHUNK = 16_384


@app.command(rich_help_panel=PANEL)
def fit_property(
    run: Space,
    name: Annotated[str, typer.Argument(help="What to keep it as.")],
    function: Annotated[
        str | None,
        typer.Option(
            help="The value of a text: length, calls, names, logp, qed, or a function of yours, "
            "pkg.module:func; default NAME."
        ),
    ] = None,
    file: File = None,
    column: Column = None,
    values: Annotated[
        str | None, typer.Option(help="The field of --file that holds the value.")
    ] = None,
    kind: Annotated[
        Literal["ridge", "mlp"], typer.Option(help="Linear, or a network with a hidden layer.")
    ] = "ridge",
    device: Device = None,
    json: Json = False,
) -> None:
    """Fit a property of texts on their codes, and keep it with the model for `optimize`.

    By default on training sequences, 50,000 at most.

    Example: `t5vae fit-property runs/molecules solubility --file esol.csv --column smiles
    --values logS`
    """
    texts: list[str] | None = None
    measured: Any = function or name
    if values is not None:
        if function is not None:
            raise UserError("--values and --function: give one of them")
        if file is None or column is None:
            raise UserError("--values needs the texts that have them: give --file and --column")
        from t5vae.latent.tables import read_values

        texts, measured = read_values(file, column, values)
    elif file is not None:
        texts = given_texts(None, file, column)
    space = load(run, device)
    fitted = space.fit_property(texts, measured, kind=kind, name=name)
    path = space.keep_property(fitted)
    if json:
        shown = {key: getattr(fitted, key) for key in ("name", "kind", "r2", "n", "scale")}
        print_json({**shown, "file": str(path)})
    else:
        typer.echo(
            f"{name}, by {kind} on {fitted.n:,} texts: R² {fitted.r2:.3f} on those held out; {path}"
        )


@app.command(rich_help_panel=PANEL)
def optimize(
    run: Space,
    property: Annotated[
        str,
        typer.Option(
            help="One that fit-property kept; or length, calls, names, logp or qed, fitted at need."
        ),
    ],
    texts: Texts = None,
    minimize: Annotated[bool, typer.Option("--min", help="Less of it, not more.")] = False,
    target: Annotated[
        float | None, typer.Option(help="Close to this value, neither more nor less.")
    ] = None,
    function: Annotated[
        str | None,
        typer.Option(help="The true value, to rank by: as in fit-property; default NAME's own."),
    ] = None,
    check: Check = None,
    radius: Annotated[
        float, typer.Option(help="Of the trust region, in standard deviations of the prior.")
    ] = 1.5,
    penalty: Annotated[
        float,
        typer.Option(help="Of a nat a token of the decoder's doubt, in deviations.", min=0),
    ] = 0.0,
    n: Annotated[int, typer.Option("-n", help="How many, the best first.", min=1)] = 10,
    seed: Seed = 0,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Search near one text for texts with more of a property: gradient steps, decoded and ranked.

    Example: `t5vae optimize runs/quickstart "x = f(a)" --property calls --check python`
    """
    if minimize and target is not None:
        raise UserError("--min and --target: give one of them")
    (text,) = exactly(1, texts, file, column)
    from t5vae.latent.checkers import checker
    from t5vae.latent.measures import NAMES, measure

    truth = function or (property if property in NAMES else None)
    how = {
        "goal": target if target is not None else "min" if minimize else "max",
        "function": measure(truth) if truth else None,
        "check": checker(check) if check else None,
    }
    space = load(run, device)
    fitted = space.get_property(property)
    found = space.optimize(text, fitted, radius=radius, penalty=penalty, n=n, seed=seed, **how)
    if json:
        settings = {"property": property, "r2": fitted.r2, "goal": how["goal"], "radius": radius}
        print_json({**settings, **asdict(found)})
        return
    _print_optimized(found, truth)
    if not found.candidates:
        typer.echo("no other text was found: raise --radius, or ask for no --check", err=True)
    typer.echo(
        f"{found.decoded:,} codes decoded; {property} is predicted with R² {fitted.r2:.2f}",
        err=True,
    )


def _print_optimized(found: "Optimized", truth: str | None) -> None:
    from rich.table import Table

    def row(candidate: "Candidate") -> list[str]:
        value = [] if candidate.value is None else [f"{candidate.value:g}"]
        rest = (candidate.predicted, candidate.distance, candidate.nats_per_token)
        return [*value, *(f"{each:.2f}" for each in rest), candidate.text]

    table = Table(*([truth] if truth else []), "predicted", "distance", "nats/token", "text")
    table.add_row(*row(found.start), end_section=True)
    for candidate in found.candidates:
        table.add_row(*row(candidate))
    console(1000).print(table)


@app.command(rich_help_panel=PANEL)
def outliers(
    run: Space,
    texts: Texts = None,
    n: Annotated[
        int | None, typer.Option("-n", help="Only the furthest out; default all.", min=1)
    ] = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Score how badly the model knows texts, in nats a token; the strangest first.

    Example: `t5vae outliers runs/quickstart --file lines.txt -n 20`
    """
    given = given_texts(texts, file, column)
    space = load(run, device)
    fitting = fitting_texts(space, given)
    scores: list[float] = []
    for chunk in _chunks(fitting, "scored"):
        scores += space.outlier_scores(chunk).tolist()
    ranked = sorted(zip(scores, fitting, strict=True), key=lambda pair: -pair[0])[:n]
    if json:
        rows = [{"text": text, "score": score} for score, text in ranked]
        print_json({"texts": rows, "left_out": len(given) - len(fitting)})
        return
    for score, text in ranked:
        typer.echo(f"{score:6.3f}  {text}")


@app.command(rich_help_panel=PANEL)
def dedupe(
    run: Space,
    texts: Texts = None,
    radius: Annotated[
        float,
        typer.Option(help="How near repeats lie, in standard deviations of the prior.", min=0),
    ] = 0.1,
    corpus: Annotated[
        Path | None, typer.Option(help="A folder of `t5vae encode --out`, in place of texts.")
    ] = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Leave out texts whose code lies near an earlier one's; with --json, say which repeats which.

    Example: `t5vae dedupe runs/quickstart --file lines.txt --radius 0.2 > fewer.txt`
    """
    if corpus is not None and (texts or file is not None):
        raise UserError("texts and --corpus: give one of them")
    given = [] if corpus is not None else given_texts(texts, file, column)
    space = load(run, device)
    if corpus is not None:
        opened = space.open_corpus(corpus)
        fitting = opened.texts(range(len(opened)))
        originals = space.deduplicate(opened, radius)
    else:
        fitting = fitting_texts(space, given)
        originals = space.deduplicate(fitting, radius)
    kept = [row for row, original in enumerate(originals) if row == original]
    if json:
        repeats = [
            {"text": fitting[row], "repeats": fitting[original]}
            for row, original in enumerate(originals)
            if row != original
        ]
        print_json({"texts": [fitting[row] for row in kept], "repeats": repeats, "radius": radius})
        return
    for row in kept:
        typer.echo(fitting[row])
    typer.echo(f"{len(kept):,} of {len(fitting):,} texts kept", err=True)


def _chunks(texts: list[str], title: str) -> Iterator[list[str]]:
    """Some thousands at a time, with a progress bar where there are more."""
    if len(texts) <= CHUNK:
        yield texts
        return
    from t5vae.common.progress import stage

    with stage(title, len(texts)) as advance:
        for at in range(0, len(texts), CHUNK):
            yield texts[at : at + CHUNK]
            advance(len(texts[at : at + CHUNK]))
