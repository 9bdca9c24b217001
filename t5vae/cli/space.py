"""Commands that move in the space: interpolate, grid, sample, neighbors, nearest, direction."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from t5vae.cli.app import Json, Jsonl, app, tell
from t5vae.cli.given import (
    PANEL,
    STDIN,
    Check,
    Column,
    Device,
    File,
    Seed,
    Space,
    Temperature,
    Texts,
    exactly,
    given_texts,
    load,
)
from t5vae.cli.shown import print_as_json, print_table
from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS
from t5vae.common.paths import expand

if TYPE_CHECKING:
    PriorName = str
else:
    PriorName = Literal[tuple(PRIORS)]

Method = Annotated[Literal["linear", "slerp"], typer.Option(help="Straight, or along an arc.")]


@app.command(rich_help_panel=PANEL)
def interpolate(
    run: Space,
    texts: Texts = None,
    steps: Annotated[int, typer.Option(help="Texts on the way, both ends included.", min=2)] = 11,
    method: Method = "linear",
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Walk from one text to another: two texts.

    Example: `t5vae interpolate runs/quickstart "x = a - 1" "x = a + 10 * 2"`
    """
    given = exactly(2, texts, file, column)
    a, b = given.texts
    walked = load(run, device).interpolate(a, b, steps=steps, method=method)
    document = {"a": a, "b": b, "method": method, "texts": walked}
    lines = [{"text": text, "at": at / (steps - 1)} for at, text in enumerate(walked)]
    if print_as_json(json, jsonl, document, lines, given):
        return
    for line in lines:
        tell(f"{line['at']:4.2f}  {line['text']}")


@app.command(rich_help_panel=PANEL)
def grid(
    run: Space,
    texts: Texts = None,
    steps: Annotated[int, typer.Option(help="Rows and columns, the corners included.", min=2)] = 5,
    method: Method = "linear",
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Fill a square between four texts: its upper corners, then its lower ones.

    Example: `t5vae grid runs/quickstart "x = a" "x = a + 1" "return a" "return a + 1"`
    """
    given = exactly(4, texts, file, column)
    a, b, c, d = given.texts
    rows = load(run, device).grid(a, b, c, d, steps=steps, method=method)
    document = {"corners": given.texts, "method": method, "texts": rows}
    lines = [
        {"text": text, "place": [down, right]}
        for down, row in enumerate(rows)
        for right, text in enumerate(row)
    ]
    if print_as_json(json, jsonl, document, lines, given):
        return
    print_table((), rows, show_header=False, show_lines=True)


@app.command(rich_help_panel=PANEL)
def sample(
    run: Space,
    n: Annotated[int, typer.Option("-n", help="How many.", min=1)] = 10,
    prior: Annotated[
        PriorName,
        typer.Option(help="That of training, or one fitted on codes of training sequences."),
    ] = "normal",
    temperature: Temperature = 0.0,
    check: Check = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Decode random points of the latent space.

    Example: `t5vae sample runs/quickstart -n 20 --prior flow --check python`
    """
    if check:
        from t5vae.latent.checkers import checker

        checker(check)  # refused before a prior is fitted
    drawn = load(run, device).sample(n, prior, check, seed, temperature=temperature)
    how = {"prior": prior, "temperature": temperature, "check": check, "seed": seed}
    document = {"texts": drawn.texts, "drawn": drawn.drawn, **how}
    if print_as_json(json, jsonl, document, [{"text": text} for text in drawn.texts]):
        return
    for text in drawn.texts:
        tell(text)
    if check:
        typer.echo(f"{n} of {drawn.drawn} drawn passed {check}", err=True)


@app.command(rich_help_panel=PANEL)
def neighbors(
    run: Space,
    texts: Texts = None,
    radius: Annotated[
        float,
        typer.Option(help="How far from it, in standard deviations of the prior.", min=0),
    ] = 1.5,
    n: Annotated[int, typer.Option("-n", help="How many points.", min=1)] = 50,
    seed: Seed = 0,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Decode points around one text, the commonest decodings first.

    Example: `t5vae neighbors runs/quickstart "x = a + 1" --radius 1`
    """
    given = exactly(1, texts, file, column)
    (text,) = given.texts
    found = Counter(load(run, device).neighbors(text, radius, n, seed)).most_common()
    rows = [{"text": other, "points": points} for other, points in found]
    document = {"text": text, "radius": radius, "texts": rows}
    if print_as_json(json, jsonl, document, rows, given):
        return
    print_table(("points", "text"), [(str(points), other) for other, points in found])


@app.command(rich_help_panel=PANEL)
def nearest(
    run: Space,
    texts: Texts = None,
    n: Annotated[int, typer.Option("-n", help="How many for each text.", min=1)] = 10,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `t5vae encode --out`; default the training sequences.",
            callback=expand,
        ),
    ] = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Find the nearest training sequences, or the nearest texts of a corpus.

    Example: `t5vae nearest runs/quickstart "x = a + 1" -n 5`
    """
    given = given_texts(texts, file, column)
    space = load(run, device)
    found = space.nearest(given.texts, n, space.open_corpus(corpus) if corpus else None)
    pairs = list(zip(given.entries(), found, strict=True))
    rows = [{**entry, "nearest": [vars(each) for each in near]} for entry, near in pairs]
    lines = [{**vars(each), "to": entry} for entry, near in pairs for each in near]
    if print_as_json(json, jsonl, {"texts": rows}, lines, given):
        return
    for text, near in zip(given.texts, found, strict=True):
        print_table(("distance", text), ((f"{each.distance:.3f}", each.text) for each in near))


@app.command(rich_help_panel=PANEL)
def direction(
    run: Space,
    pairs: Annotated[
        str,
        typer.Option(
            help="A file of pairs, before and after: two texts and a tab between a line.",
            callback=expand,
        ),
    ],
    texts: Texts = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="How far: 1 as the pairs do, negative back; repeatable."),
    ] = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Change texts as the second texts of pairs differ from the first.

    Example: `t5vae direction runs/quickstart --pairs yield.tsv "return self.x" --strength 1.5`
    """
    strengths = strength or [1.0]
    if pairs in STDIN and (file in STDIN or (file is None and texts in (None, [], ["-"]))):
        raise UserError("the texts and --pairs: one of them can come from standard input")
    known = _pairs(pairs)
    given = given_texts(texts, file, column)
    found = load(run, device).direction(known)
    moved = [found.apply(given.texts, each) for each in strengths]
    how = {"strengths": strengths, "consistency": found.consistency}
    columns = list(zip(given.entries(), *moved, strict=True))
    rows = [{**entry, "moved": row} for entry, *row in columns]
    lines = [
        {"text": text, "strength": each, "from": entry}
        for entry, *row in columns
        for each, text in zip(strengths, row, strict=True)
    ]
    document = {"pairs": len(known), **how, "texts": rows}
    if print_as_json(json, jsonl, document, lines, given):
        return
    header = ("text", *(f"{each:+g}" for each in strengths))
    print_table(header, zip(given.texts, *moved, strict=True))
    if found.consistency is not None:
        typer.echo(
            f"{len(known):,} pairs, of which each points as the others do with a cosine of "
            f"{found.consistency:.2f} on average",
            err=True,
        )


def _pairs(path: str) -> list[tuple[str, str]]:
    from t5vae.latent.corpus import FileTexts

    source = FileTexts(path, format="text")
    pairs = []
    for rows, lines in source.chunks(0):
        for row, line in zip(rows, lines, strict=True):
            before, tab, after = line.partition("\t")
            if not tab or "\t" in after:
                raise UserError(
                    f"{source.name}, line {row + 1}: a pair is two texts with a tab between"
                )
            pairs.append((before, after))
    return pairs
