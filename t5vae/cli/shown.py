"""How commands show texts: as one JSON document, as lines of JSON, or to people."""

import json as json_module
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from t5vae.cli.app import console, print_json
from t5vae.cli.given import Given

BREAKS = ("\n", "\r")


def print_as_json(
    json: bool,
    jsonl: bool,
    document: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    given: Given | None = None,
) -> bool:
    """Print what a program is to read, if it is asked for; say what of --file was left out.

    Args:
        json: print the document.
        jsonl: print the lines.
        document: all that is to be said.
        lines: an object for each text that the command is for, with the text first.
        given: the texts that the command was given.

    Returns:
        Whether it was asked for. If not, people get plain texts: a line says so where these hold
        line breaks, so that no program could tell them apart.
    """
    if given is not None:
        document = {**document, **left_out(given)}
    if json:
        print_json(document)
    elif jsonl:
        for line in lines:
            typer.echo(json_module.dumps(line, ensure_ascii=False))
    elif broken := sum(map(_is_broken, lines)):
        typer.echo(
            f"{broken:,} of {len(lines):,} hold line breaks: --jsonl prints what can be read back",
            err=True,
        )
    return json or jsonl


def left_out(given: Given) -> dict[str, Any]:
    """What of --file was left out, for a JSON document; said in a line on standard error too."""
    if given.reasons:
        from t5vae.latent import corpus

        typer.echo(corpus.left_out(given.reasons), err=True)
    return {"left_out": sum(given.reasons.values()), "reasons": dict(given.reasons)}


def _is_broken(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_broken, value.values()))
    return isinstance(value, str) and any(each in value for each in BREAKS)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], **how: Any) -> None:
    """A table of texts; `how` it looks, in the words of rich."""
    from rich.table import Table

    table = Table(*header, **how)
    for row in rows:
        table.add_row(*row)
    console(1000).print(table)
