"""Commands that go between texts and codes: encode, decode, reconstruct, interpolate, ..."""

import io
import json as json_module
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from t5vae.cli.app import Json, Jsonl, app, console, print_json
from t5vae.cli.given import (
    PANEL,
    STDIN,
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
from t5vae.cli.shown import print_as_json, print_table
from t5vae.common.errors import UserError
from t5vae.common.kinds import PRIORS
from t5vae.common.paths import expand

if TYPE_CHECKING:
    import numpy as np
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
        typer.Option(
            help="A folder for texts and codes (codes.npy), streamed: for millions.",
            callback=expand,
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Turn texts into codes.

    Example: `t5vae encode runs/quickstart --file lines.txt --out codes`
    """
    if out is not None:
        if jsonl:
            raise UserError("--out writes what --jsonl would print: give one of them")
        if texts and file is not None:
            raise UserError("texts and --file: give one of them")
        source = file if file is not None else given_texts(texts, file, column).texts
        corpus = load(run, device).encode_corpus(source, out, column)
        if json:
            count = {"left_out": corpus.left_out, "reasons": corpus.reasons}
            print_json({"folder": str(out), "sequences": len(corpus), **count})
        else:
            typer.echo(f"{len(corpus):,} codes: {out}")
        return
    given = given_texts(texts, file, column)
    codes = load(run, device).encode(given.texts).tolist()
    rows = [{**entry, "code": code} for entry, code in zip(given.entries(), codes, strict=True)]
    if print_as_json(json, jsonl, {"latent_size": len(codes[0]), "texts": rows}, rows, given):
        return
    for text, code in zip(given.texts, codes, strict=True):
        shown = " ".join(f"{value:6.2f}" for value in code[:8])
        typer.echo(f"{shown}{' ...' if len(code) > 8 else ''}  {text}")


@app.command(rich_help_panel=PANEL)
def decode(
    run: Space,
    codes: Annotated[
        str,
        typer.Argument(
            help="An array (.npy), a folder of `t5vae encode --out`, or JSON of `t5vae encode "
            "--json`, or --jsonl, or of lists of numbers; - for what comes from stdin.",
            callback=expand,
        ),
    ] = "-",
    n: Annotated[int, typer.Option("-n", help="Candidates for each code.", min=1)] = 1,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
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
    lines = [
        {"text": text, "number": number}
        for number, candidates in enumerate(texts)
        for text in ([candidates] if n == 1 else candidates)
    ]
    if print_as_json(json, jsonl, {"texts": texts}, lines):
        return
    for line in lines:
        typer.echo(line["text"] if n == 1 else f"{line['number']}  {line['text']}")


def _codes(source: str) -> "Tensor":
    """Codes from a file, a folder, a pipe or standard input, float32 [N, D]."""
    import numpy as np
    import torch

    path = Path(source)
    path = path / "codes.npy" if path.is_dir() else path
    try:
        if path.suffix == ".npy":
            rows = np.load(path, mmap_mode="r")
        else:
            rows = _parsed(sys.stdin.buffer.read() if source == "-" else path.read_bytes())
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


def _parsed(data: bytes) -> "np.ndarray":
    """Rows of numbers in the bytes of an array, of JSON, or of lines of JSON."""
    import numpy as np

    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return np.load(io.BytesIO(data))
    text = data.decode("utf-8-sig")
    try:
        given = json_module.loads(text)
    except ValueError:
        given = [json_module.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(given, dict):
        given = given.get("texts", [given])
    return np.asarray(
        [row["code"] if isinstance(row, dict) else row for row in given], dtype=np.float32
    )


@app.command(rich_help_panel=PANEL)
def reconstruct(
    run: Space,
    texts: Texts = None,
    file: File = None,
    column: Column = None,
    device: Device = None,
    json: Json = False,
    jsonl: Jsonl = False,
) -> None:
    """Encode texts and decode them again: = came back exactly, ~ shows what changed.

    Example: `t5vae reconstruct runs/quickstart "x = a + 1" "return self._name"`
    """
    given = given_texts(texts, file, column)
    decoded = load(run, device).reconstruct(given.texts)
    from t5vae.latent.differences import difference

    pairs = list(zip(given.texts, decoded, map(difference, given.texts, decoded), strict=True))
    exact = sum(text == back for text, back, _ in pairs)
    rows = [
        {
            **entry,
            "reconstruction": back,
            "exact": text == back,
            "parts": [{"old": part.old, "new": part.new} for part in parts],
        }
        for entry, (text, back, parts) in zip(given.entries(), pairs, strict=True)
    ]
    document = {"texts": rows, "exact": exact / len(rows)}
    if print_as_json(json, jsonl, document, rows, given):
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
        typer.echo(f"{line['at']:4.2f}  {line['text']}")


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
    drawn = load(run, device).sample(n, prior, check, seed, temperature=temperature)
    how = {"prior": prior, "temperature": temperature, "check": check, "seed": seed}
    document = {"texts": drawn.texts, "drawn": drawn.drawn, **how}
    if print_as_json(json, jsonl, document, [{"text": text} for text in drawn.texts]):
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
