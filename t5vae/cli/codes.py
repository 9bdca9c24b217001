"""Commands from texts to codes and back: encode, decode, reconstruct."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t5vae.cli.app import LAYOUT, Json, Jsonl, app, console, print_json, tell
from t5vae.cli.given import (
    PANEL,
    Column,
    Device,
    File,
    Seed,
    Space,
    Temperature,
    Texts,
    given_texts,
    load,
)
from t5vae.cli.shown import print_as_json
from t5vae.common.errors import UserError, first_line, printable
from t5vae.common.files import parse_json
from t5vae.common.paths import expand

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text
    from torch import Tensor

    from t5vae.latent.differences import Part


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
        tell(f"{shown}{' ...' if len(code) > 8 else ''}  {text}")


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
        tell(line["text"] if n == 1 else f"{line['number']}  {line['text']}")


def _codes(source: str) -> "Tensor":
    """Codes from a file, a folder, a pipe or standard input, float32 [N, D]."""
    import numpy as np
    import torch

    from t5vae.latent.artifacts import open_array

    path = Path(source)
    path = path / "codes.npy" if path.is_dir() else path
    try:
        if path.suffix == ".npy":
            rows = open_array(path)
        elif source == "-":
            rows = _parsed(sys.stdin.buffer.read())
        else:
            rows = _parsed(path.read_bytes())
        with np.errstate(all="ignore"):
            z_ND = torch.from_numpy(np.array(rows, dtype=np.float32))
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        where = "standard input" if source == "-" else source
        raise UserError(
            f"{where} holds no codes ({first_line(error)}): give a .npy array, a folder of "
            "`t5vae encode --out`, or JSON"
        ) from None
    if z_ND.ndim != 2 or not z_ND.isfinite().all():
        raise UserError(f"codes are rows of finite numbers; these have the shape {rows.shape}")
    return z_ND


def _parsed(data: bytes) -> "np.ndarray":
    """Rows of numbers in the bytes of an array, of JSON, or of lines of JSON."""
    import numpy as np

    from t5vae.latent.artifacts import load_array

    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return load_array(io.BytesIO(data), len(data))
    text = data.decode("utf-8-sig")
    try:
        given = parse_json(text)
    except ValueError:
        given = [parse_json(line) for line in text.split("\n") if line.strip()]
    if isinstance(given, dict):
        given = given.get("texts", [given])
    rows = [row["code"] if isinstance(row, dict) else row for row in given]
    with np.errstate(all="ignore"):
        return np.asarray(rows, dtype=np.float32)


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
        old, new = (printable(each, LAYOUT) if coloured else each for each in (part.old, part.new))
        if old == new:
            shown.append(old)
            continue
        if old:
            shown.append(old if coloured else f"[-{old}-]", "red strike")
        if new:
            shown.append(new if coloured else f"{{+{new}+}}", "green")
    return shown
