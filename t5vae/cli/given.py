"""What commands on a latent space are given: a model, and texts."""

import sys
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from t5vae.cli.app import quiet_transformers
from t5vae.common.errors import UserError

if TYPE_CHECKING:
    from t5vae.latent import LatentSpace

PANEL = "The latent space"

Space = Annotated[str, typer.Argument(help="A run folder, or an exported model's.")]
Texts = Annotated[
    list[str] | None, typer.Argument(help="Texts; none, or -, reads a line each from stdin.")
]
File = Annotated[
    str | None,
    typer.Option(
        help="Read texts from here instead: a line each; .jsonl, .csv and .parquet need --column; "
        ".gz and .zst too."
    ),
]
Column = Annotated[str | None, typer.Option(help="The field of --file that holds the text.")]
Check = Annotated[
    str | None,
    typer.Option(help="Keep only valid ones: python, json, smiles, regex:..., pkg.func."),
]
Seed = Annotated[int, typer.Option(help="Of what is random.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ...; default the accelerator, if there is one."),
]


def given_texts(texts: list[str] | None, file: str | None, column: str | None) -> list[str]:
    """Texts from arguments, a file, or standard input."""
    if file is not None:
        if texts:
            raise UserError("texts and --file: give one of them")
        from t5vae.latent.corpus import FileTexts

        found = list(chain.from_iterable(FileTexts(file, column).chunks(0)))
        if not found:
            raise UserError(f"{file} holds no texts")
        return found
    if column is not None:
        raise UserError("--column names a field of --file, which is not given")
    if texts and texts != ["-"]:
        return texts
    try:
        lines = [line.rstrip("\n") for line in sys.stdin]
        "".join(lines).encode()  # in the locale C what is no text is read as lone surrogates
    except UnicodeError as error:
        raise UserError(f"standard input is not text: {error}") from None
    if not lines:
        raise UserError("standard input is empty: give texts as arguments, or a line each")
    return lines


def exactly(count: int, texts: list[str] | None, file: str | None, column: str | None) -> list[str]:
    """As many texts as a command needs."""
    found = given_texts(texts, file, column)
    if len(found) != count:
        raise UserError(f"texts needed: {count}, given: {len(found)}")
    return found


def load(run: str, device: str | None) -> "LatentSpace":
    from t5vae.latent import LatentSpace

    quiet_transformers()
    return LatentSpace.load(run, device)


def fitting_texts(space: "LatentSpace", texts: list[str]) -> list[str]:
    """Those with no more tokens than the model takes."""
    ids = space.token_ids(texts)
    fitting = [text for text, row in zip(texts, ids, strict=True) if space.fits(row)]
    if not fitting:
        raise UserError(
            f"no text has up to {space.model.config.sequence_length} tokens, the most that this "
            "model takes"
        )
    if len(fitting) < len(texts):
        typer.echo(f"left out, with too many tokens: {len(texts) - len(fitting):,}", err=True)
    return fitting
