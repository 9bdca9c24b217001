"""Commands that go between texts and codes: encode, decode, reconstruct, interpolate, ..."""

import json as json_module
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
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
    given_texts,
    load,
)
from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

    from t5vae.latent.differences import Part

    PriorName = str
else:
    PriorName = Literal[tuple(PRIORS)]

Temperature = Annotated[
    float,
    typer.Option(help="0 decodes the likeliest token at each step, above 0 draws.", min=0),
]
Method = Annotated[Literal["linear", "slerp"], typer.Option(help="Straight, or along an arc.")]


@app.command(rich_help_panel=PANEL)
def encode(
    run: Space,
    texts: Texts = None,
    file: File = None,
    column: Column = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for texts and codes (codes.npy), streamed: for millions."),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Turn texts into codes.

    Example: `t5vae encode runs/quickstart --file lines.txt --out codes`
    """
    if out is not None:
        source = file if file is not None else given_texts(texts, file, column)
        corpus = load(run, device).encode_corpus(source, out, column)
        if json:
            count = {"sequences": len(corpus), "left_out": corpus.left_out}
            print_json({"folder": str(out), **count})
        else:
            typer.echo(f"{len(corpus):,} codes: {out}")
        return
    given = given_texts(texts, file, column)
    codes = load(run, device).encode(given).tolist()
    if json:
        rows = [{"text": text, "code": code} for text, code in zip(given, codes, strict=True)]
        print_json({"latent_size": len(codes[0]), "texts": rows})
        return
    for text, code in zip(given, codes, strict=True):
        shown = " ".join(f"{value:6.2f}" for value in code[:8])
        typer.echo(f"{shown}{' ...' if len(code) > 8 else ''}  {text}")


@app.command(rich_help_panel=PANEL)
def decode(
    run: Space,
    codes: Annotated[
        str,
        typer.Argument(
            help="An array (.npy), a folder of `t5vae encode --out`, or JSON of `t5vae encode "
            "--json` or of lists of numbers; - for JSON from stdin."
        ),
    ] = "-",
    n: Annotated[int, typer.Option("-n", help="Candidates for each code.", min=1)] = 1,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Turn codes into texts, the best or several candidates.

    Example: `t5vae encode runs/quickstart "x = a + 1" --json | t5vae decode runs/quickstart -n 5`
    """
    z_ND = _codes(codes)
    space = load(run, device)
    if z_ND.shape[1] != space.latent_size:
        raise UserError(
            f"the codes have {z_ND.shape[1]} numbers each, the model's {space.latent_size}"
        )
    texts: list[Any] = space.decode(z_ND, n, temperature, seed)
    if json:
        print_json({"texts": texts})
        return
    for number, candidates in enumerate(texts):
        for text in [candidates] if n == 1 else candidates:
            typer.echo(text if n == 1 else f"{number}  {text}")


def _codes(source: str) -> "Tensor":
    """Codes from a file, a folder or standard input, float32 [N, D]."""
    import numpy as np
    import torch

    path = Path(source)
    path = path / "codes.npy" if path.is_dir() else path
    try:
        if path.suffix == ".npy":
            rows = np.load(path, mmap_mode="r")
        else:
            given = json_module.loads(sys.stdin.read() if source == "-" else path.read_text())
            if isinstance(given, dict):
                given = [row["code"] for row in given["texts"]]
            rows = np.asarray(given, dtype=np.float32)
        z_ND = torch.from_numpy(np.array(rows, dtype=np.float32))
    except (OSError, ValueError, TypeError, KeyError) as error:
        where = "standard input" if source == "-" else source
        raise UserError(
            f"{where} holds no codes ({error}): give a .npy array, a folder of `t5vae encode "
            "--out`, or JSON"
        ) from None
    if z_ND.ndim != 2 or not z_ND.isfinite().all():
        raise UserError(f"codes are rows of finite numbers; these have the shape {rows.shape}")
    return z_ND


@app.command(rich_help_panel=PANEL)
def reconstruct(
    run: Space,
    texts: Texts = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Encode texts and decode them again: = came back exactly, ~ shows what changed.

    Example: `t5vae reconstruct runs/quickstart "x = a + 1" "return self._name"`
    """
    given = given_texts(texts, file, column)
    decoded = load(run, device).reconstruct(given)
    from t5vae.latent.differences import difference

    pairs = list(zip(given, decoded, map(difference, given, decoded), strict=True))
    exact = sum(text == back for text, back, _ in pairs)
    if json:
        rows = [
            {
                "text": text,
                "reconstruction": back,
                "exact": text == back,
                "parts": [{"old": part.old, "new": part.new} for part in parts],
            }
            for text, back, parts in pairs
        ]
        print_json({"texts": rows, "exact": exact / len(rows)})
        return
    out = console()
    for text, back, parts in pairs:
        sign = "= " if text == back else "~ "
        out.print(sign, _shown(parts, out.is_terminal), sep="", soft_wrap=True)
    typer.echo(f"{exact:,} of {len(pairs):,} came back exactly", err=True)


def _shown(parts: "list[Part]", coloured: bool) -> "Text":
    """In colours, or else as `git diff --word-diff` shows them."""
    from rich.text import Text

    shown = Text()
    for part in parts:
        if part.old == part.new:
            shown.append(part.old)
            continue
        if part.old:
            shown.append(part.old if coloured else f"[-{part.old}-]", "red strike")
        if part.new:
            shown.append(part.new if coloured else f"{{+{part.new}+}}", "green")
    return shown


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
) -> None:
    """Walk from one text to another: two texts.

    Example: `t5vae interpolate runs/quickstart "x = a - 1" "x = a + 10 * 2"`
    """
    a, b = exactly(2, texts, file, column)
    walked = load(run, device).interpolate(a, b, steps=steps, method=method)
    if json:
        print_json({"a": a, "b": b, "method": method, "texts": walked})
        return
    for number, text in enumerate(walked):
        typer.echo(f"{number / (steps - 1):4.2f}  {text}")


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
) -> None:
    """Fill a square between four texts: its upper corners, then its lower ones.

    Example: `t5vae grid runs/quickstart "x = a" "x = a + 1" "return a" "return a + 1"`
    """
    a, b, c, d = corners = exactly(4, texts, file, column)
    rows = load(run, device).grid(a, b, c, d, steps=steps, method=method)
    if json:
        print_json({"corners": corners, "method": method, "texts": rows})
        return
    _print_table((), rows, show_header=False, show_lines=True)


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
) -> None:
    """Decode random points of the latent space.

    Example: `t5vae sample runs/quickstart -n 20 --prior flow --check python`
    """
    drawn = load(run, device).sample(n, prior, check, seed, temperature=temperature)
    if json:
        how = {"prior": prior, "temperature": temperature, "check": check, "seed": seed}
        print_json({"texts": drawn.texts, "drawn": drawn.drawn, **how})
        return
    for text in drawn.texts:
        typer.echo(text)
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
) -> None:
    """Decode points around one text, the commonest decodings first.

    Example: `t5vae neighbors runs/quickstart "x = a + 1" --radius 1`
    """
    (text,) = exactly(1, texts, file, column)
    found = Counter(load(run, device).neighbors(text, radius, n, seed)).most_common()
    if json:
        rows = [{"text": other, "points": points} for other, points in found]
        print_json({"text": text, "radius": radius, "texts": rows})
        return
    _print_table(("points", "text"), [(str(points), other) for other, points in found])


@app.command(rich_help_panel=PANEL)
def nearest(
    run: Space,
    texts: Texts = None,
    n: Annotated[int, typer.Option("-n", help="How many for each text.", min=1)] = 10,
    corpus: Annotated[
        Path | None,
        typer.Option(help="A folder of `t5vae encode --out`; default the training sequences."),
    ] = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Find the nearest training sequences, or the nearest texts of a corpus.

    Example: `t5vae nearest runs/quickstart "x = a + 1" -n 5`
    """
    given = given_texts(texts, file, column)
    space = load(run, device)
    found = space.nearest(given, n, space.open_corpus(corpus) if corpus else None)
    if json:
        rows = [
            {"text": text, "nearest": [vars(neighbor) for neighbor in neighbors]}
            for text, neighbors in zip(given, found, strict=True)
        ]
        print_json({"texts": rows})
        return
    for text, near in zip(given, found, strict=True):
        _print_table(("distance", text), ((f"{each.distance:.3f}", each.text) for each in near))


@app.command(rich_help_panel=PANEL)
def direction(
    run: Space,
    pairs: Annotated[
        Path,
        typer.Option(help="A file of pairs, before and after: two texts and a tab between a line."),
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
) -> None:
    """Change texts as the second texts of pairs differ from the first.

    Example: `t5vae direction runs/quickstart --pairs yield.tsv "return self.x" --strength 1.5`
    """
    strengths = strength or [1.0]
    known = _pairs(pairs)
    given = given_texts(texts, file, column)
    found = load(run, device).direction(known)
    moved = [found.apply(given, each) for each in strengths]
    if json:
        rows = [{"text": text, "moved": row} for text, *row in zip(given, *moved, strict=True)]
        how = {"strengths": strengths, "consistency": found.consistency}
        print_json({"pairs": len(known), **how, "texts": rows})
        return
    header = ("text", *(f"{each:+g}" for each in strengths))
    _print_table(header, zip(given, *moved, strict=True))
    if found.consistency is not None:
        typer.echo(
            f"{len(known):,} pairs, of which each points as the others do with a cosine of "
            f"{found.consistency:.2f} on average",
            err=True,
        )


def _pairs(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"the pairs {path} cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        before, tab, after = line.partition("\t")
        if not tab or "\t" in after:
            raise UserError(f"{path}, line {number}: a pair is two texts with a tab between")
        pairs.append((before, after))
    return pairs


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]], **how: Any) -> None:
    """A table of texts; `how` it looks, in the words of rich."""
    from rich.table import Table

    table = Table(*header, **how)
    for row in rows:
        table.add_row(*row)
    console(1000).print(table)
