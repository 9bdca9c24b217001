"""Commands that find texts by what they are like: fit-property, optimize, outliers, dedupe."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from t5vae.cli.app import Json, Jsonl, app, console, print_json, tell
from t5vae.cli.given import (
    PANEL,
    Check,
    Column,
    Device,
    File,
    Given,
    Seed,
    Space,
    Texts,
    exactly,
    given_texts,
    load,
)
from t5vae.cli.shown import left_out, print_as_json
from t5vae.common.errors import UserError
from t5vae.common.paths import expand

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
    given: Given | None = None
    measured: Any = function or name
    if values is not None:
        if function is not None:
            raise UserError("--values and --function: give one of them")
        if file is None or column is None:
            raise UserError("--values needs the texts that have them: give --file and --column")
        from t5vae.latent.tables import read_values

        texts, measured, empty = read_values(file, column, values)
        given = Given(texts, reasons=empty)
    elif file is not None:
        given = given_texts(None, file, column)
    space = load(run, device)
    fitted = space.fit_property(given.texts if given else None, measured, kind=kind, name=name)
    path = space.keep_property(fitted)
    fitting = given.fitting(space) if given else Given([])
    if without := len(fitting.texts) and len(fitting.texts) - fitted.n:
        fitting = replace(fitting, reasons={**fitting.reasons, "no value": without})
    missing = left_out(fitting)
    if json:
        shown = {key: getattr(fitted, key) for key in ("name", "kind", "r2", "n", "scale")}
        print_json({**shown, "file": str(path), **missing})
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
    jsonl: Jsonl = False,
) -> None:
    """Search near one text for texts with more of a property: gradient steps, decoded and ranked.

    Example: `t5vae optimize runs/quickstart "x = f(a)" --property calls --check python`
    """
    if minimize and target is not None:
        raise UserError("--min and --target: give one of them")
    given = exactly(1, texts, file, column)
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
    found = space.optimize(
        given.texts[0], fitted, radius=radius, penalty=penalty, n=n, seed=seed, **how
    )
    settings = {"property": property, "r2": fitted.r2, "goal": how["goal"], "radius": radius}
    candidates = [asdict(candidate) for candidate in found.candidates]
    if print_as_json(json, jsonl, {**settings, **asdict(found)}, candidates, given):
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
    jsonl: Jsonl = False,
) -> None:
    """Score how badly the model knows texts, in nats a token; the strangest first.

    Example: `t5vae outliers runs/quickstart --file lines.txt -n 20`
    """
    given = given_texts(texts, file, column)
    space = load(run, device)
    given = given.fitting(space)
    scores: list[float] = []
    for chunk in _chunks(given.texts, "scored"):
        scores += space.outlier_scores(chunk).tolist()
    scored = zip(given.entries(), scores, strict=True)
    ranked = sorted(({**entry, "score": score} for entry, score in scored), key=_score)[:n]
    if print_as_json(json, jsonl, {"texts": ranked}, ranked, given):
        return
    for row in ranked:
        tell(f"{row['score']:6.3f}  {row['text']}")


def _score(row: dict[str, Any]) -> float:
    """To sort by, the strangest first."""
    return -row["score"]


@app.command(rich_help_panel=PANEL)
def dedupe(
    run: Space,
    texts: Texts = None,
    radius: Annotated[
        float,
        typer.Option(help="How near repeats lie, in standard deviations of the prior.", min=0),
    ] = 0.1,
    corpus: Annotated[
        Path | None,
        typer.Option(help="A folder of `t5vae encode --out`, in place of texts.", callback=expand),
    ] = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Leave out texts whose code lies near an earlier one's; with --json, say which repeats which.

    Example: `t5vae dedupe runs/quickstart --file lines.txt --radius 0.2 > fewer.txt`
    """
    if corpus is not None and (texts or file is not None):
        raise UserError("texts and --corpus: give one of them")
    given = given_texts(texts, file, column) if corpus is None else Given([])
    space = load(run, device)
    if corpus is None:
        given = given.fitting(space)
        originals = space.deduplicate(given.texts, radius)
    else:
        opened = space.open_corpus(corpus)
        rows = None if opened.rows_N is None else opened.rows_N.tolist()
        given = Given(opened.texts(range(len(opened))), rows)
        originals = space.deduplicate(opened, radius)
    pairs = list(zip(given.entries(), originals, strict=True))
    kept = [entry for at, (entry, original) in enumerate(pairs) if at == original]
    repeats = [
        {**entry, "repeats": given.texts[original]}
        for at, (entry, original) in enumerate(pairs)
        if at != original
    ]
    texts = [entry["text"] for entry in kept]
    document = {"texts": texts, "repeats": repeats, "radius": radius}
    if print_as_json(json, jsonl, document, kept, given):
        return
    for text in texts:
        tell(text)
    typer.echo(f"{len(kept):,} of {len(pairs):,} texts kept", err=True)


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
