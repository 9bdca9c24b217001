"""What commands on a latent space are given: a model, and texts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t5vae.cli.app import quiet_transformers
from t5vae.common.errors import UserError
from t5vae.common.files import reading
from t5vae.common.paths import expand
from t5vae.common.seeds import FIRST_SEED, LAST_SEED

if TYPE_CHECKING:
    from t5vae.latent import LatentSpace

PANEL = "The latent space"
STDIN = ("-", "/dev/stdin")


def _check_seed(seed: int) -> int:
    if not FIRST_SEED <= seed <= LAST_SEED:
        raise UserError(f"--seed is {seed}: choose one from -2^63 to 2^64 - 1")
    return seed


Space = Annotated[
    str, typer.Argument(help="A run folder, or an exported model's.", callback=expand)
]
Texts = Annotated[
    list[str] | None, typer.Argument(help="Texts; none, or -, reads a line each from stdin.")
]
File = Annotated[
    str | None,
    typer.Option(
        help="Read texts from here instead: a line each; .jsonl, .csv and .parquet need --column; "
        ".gz and .zst too. Empty ones are left out.",
        callback=expand,
    ),
]
Column = Annotated[str | None, typer.Option(help="The field of --file that holds the text.")]
Check = Annotated[
    str | None,
    typer.Option(help="Keep only valid ones: python, json, smiles, regex:..., pkg.func."),
]
Seed = Annotated[int, typer.Option(help="Of what is random.", callback=_check_seed)]
Temperature = Annotated[
    float,
    typer.Option(help="0 decodes the likeliest token at each step, above 0 draws.", min=0),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ...; default the accelerator, if there is one."),
]


@dataclass(frozen=True)
class Given:
    """Texts that a command was given.

    Attributes:
        texts: the texts.
        rows: the number of each one's row in --file, from 0; None for texts from elsewhere.
        reasons: how many more there were that are left out, by reason.
    """

    texts: list[str]
    rows: Sequence[int] | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)

    def entries(self) -> list[dict[str, Any]]:
        """For each text what tells it from others: itself, and its row if that is known."""
        if self.rows is None:
            return [{"text": text} for text in self.texts]
        pairs = zip(self.texts, self.rows, strict=True)
        return [{"text": text, "row": int(row)} for text, row in pairs]

    def fitting(self, space: "LatentSpace") -> "Given":
        """Those with no more tokens than the model takes.

        Raises:
            UserError: there are none.
        """
        from t5vae.latent.corpus import TOO_LONG

        at = [i for i, ids in enumerate(space.token_ids(self.texts)) if space.fits(ids)]
        if not at:
            raise UserError(
                f"no text has up to {space.model.config.sequence_length} tokens, the most that "
                "this model takes"
            )
        if len(at) == len(self.texts):
            return self
        rows = None if self.rows is None else [self.rows[i] for i in at]
        reasons = {**self.reasons, TOO_LONG: len(self.texts) - len(at)}
        return Given([self.texts[i] for i in at], rows, reasons)


def given_texts(texts: list[str] | None, file: str | None, column: str | None) -> Given:
    """Texts from arguments, a file, or standard input."""
    if file is not None:
        if texts:
            raise UserError("texts and --file: give one of them")
        return _of_file(file, column)
    if column is not None:
        raise UserError("--column names a field of --file, which is not given")
    return Given(texts if texts and texts != ["-"] else _standard_input())


def _of_file(file: str, column: str | None) -> Given:
    from t5vae.latent.corpus import FileTexts, left_out

    source = FileTexts(file, column)
    chunks = list(source.chunks(0))
    if not chunks:
        why = f"; {left_out(source.skipped)}" if source.skipped else ""
        raise UserError(f"{source.name} holds no texts{why}")
    rows, texts = (list(chain.from_iterable(parts)) for parts in zip(*chunks, strict=True))
    return Given(texts, rows, source.skipped)


def _standard_input() -> list[str]:
    from shards.write.formats.text import read_text

    name = "standard input"
    with reading(name):
        # Closed, it is None.
        lines = (
            list(chain.from_iterable(read_text(sys.stdin.buffer, name, None))) if sys.stdin else []
        )
    if not lines:
        raise UserError("standard input is empty: give texts as arguments, or a line each")
    if bad := next((line for line in lines if not isinstance(line, str)), None):
        raise UserError(str(bad))
    return lines


def exactly(count: int, texts: list[str] | None, file: str | None, column: str | None) -> Given:
    """As many texts as a command needs."""
    found = given_texts(texts, file, column)
    if len(found.texts) != count:
        raise UserError(f"texts needed: {count}, given: {len(found.texts)}")
    return found


def load(run: str, device: str | None) -> "LatentSpace":
    from t5vae.latent import LatentSpace

    quiet_transformers()
    return LatentSpace.load(run, device)
