"""`t5vae shards`: build, verify and inspect datasets."""

import unicodedata
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shards.write.formats import FORMATS
from t5vae.common.cpus import cpus
from t5vae.common.errors import UserError
from t5vae.common.paths import expand

if TYPE_CHECKING:
    from shards.format.index import Index

    Format = str
else:
    Format = Literal[tuple(FORMATS)]

HELP_OF_FORMATS = ", ".join(f"`{name}` {f.help}" for name, f in FORMATS.items() if f.help) + "."
HELP_OF_DEFAULTS = "".join(
    f" With `--format {name}` it may be left out: {f.default.help}."
    for name, f in FORMATS.items()
    if f.default
)
LENGTHS = (8, 12, 16, 20, 24, 32, 48, 64, 128, 256, 512)

app = typer.Typer(
    no_args_is_help=True,
    help="Datasets: text in, shuffled and packed WebDataset shards out.",
    rich_markup_mode="markdown",
)
Folder = Annotated[
    str,
    typer.Argument(help="The dataset's folder or URL.", show_default=False, callback=expand),
]


@app.command()
def build(
    out: Annotated[str, typer.Option(help="The dataset's folder, to be made.", callback=expand)],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="A Hugging Face name or a folder; `byte` (one token a byte); or `train:N` to "
            "train one of N pieces on the corpus.",
            callback=expand,
        ),
    ],
    max_length: Annotated[
        int, typer.Option(help="The most tokens of a sequence, its end token counted.")
    ],
    source: Annotated[
        str | None,
        typer.Argument(
            help="A file (also .gz, .zst), a folder, a quoted glob, a URL, or `-` for standard "
            f"input.{HELP_OF_DEFAULTS}",
            show_default=False,
            callback=expand,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(help=f"By default as the files' names say, else text. {HELP_OF_FORMATS}"),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The field, or WebDataset member, that holds the text.")
    ] = None,
    bad_rows: Annotated[
        Literal["error", "skip"],
        typer.Option(
            help="What a row does that is none, such as one with more cells than the header: "
            "`skip` leaves it out, names and counts it."
        ),
    ] = "error",
    valid_fraction: Annotated[
        float, typer.Option(help="The share of texts held out as the split `valid`.")
    ] = 0.02,
    overflow: Annotated[
        Literal["drop", "truncate", "split"],
        typer.Option(help="What becomes of longer sequences: `split` makes several of one."),
    ] = "drop",
    dedupe: Annotated[bool, typer.Option(help="Keep one of equal texts.")] = True,
    seed: Annotated[int, typer.Option(help="The seed of the shuffle.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes to work in; by default one for each CPU that this one may use.", min=1
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="Make part K of N alone, as `3/16`: any machine may make any, at any time. "
            "`t5vae shards join` then makes the dataset.",
            metavar="K/N",
        ),
    ] = None,
) -> None:
    """Build a dataset from text. Same input and options: the same bytes.

    A build that was halted goes on when the same command is given again.

    Example: `t5vae shards build tweets.txt --out data/tweets --tokenizer train:8192
    --max-length 32`
    """
    from shards.write.builder import build as build_dataset

    index = build_dataset(
        source,
        out,
        tokenizer=tokenizer,
        max_length=max_length,
        format=format,
        column=column,
        bad_rows=bad_rows,
        valid_fraction=valid_fraction,
        overflow=overflow,
        dedupe=dedupe,
        seed=seed,
        workers=workers or cpus(),
        part=None if part is None else _part(part),
    )
    if index:
        _print_totals(index)
    else:
        typer.echo(f"part {part} of {out} is there: once all are, t5vae shards join {quote(out)}")


@app.command()
def join(
    out: Annotated[
        str,
        typer.Argument(
            help="The dataset's folder, as given to `build`.", show_default=False, callback=expand
        ),
    ],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes to work in; by default one for each CPU that this one may use.", min=1
        ),
    ] = None,
) -> None:
    """Make a dataset of the parts that `build --part` made: the bytes of a build in one go.

    Example: `t5vae shards join data/tweets`
    """
    from shards.write.builder import join as join_parts

    _print_totals(join_parts(out, workers=workers or cpus()))


def _part(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
        raise UserError(f"--part {text}: give K/N, as 3/16")
    return int(number), int(of)


@app.command()
def verify(path: Folder) -> None:
    """Check every byte of a dataset, in a folder or at a URL; exit with 1 if it is damaged.

    Example: `t5vae shards verify s3://bucket/tweets`
    """
    from shards.read.verifier import verify as verify_dataset

    report = verify_dataset(path)
    for problem in report.problems:
        typer.echo(problem)
    if not report.ok:
        raise typer.Exit(1)
    typer.echo(
        f"{path} is whole: {report.sequences:,} sequences in {report.blocks:,} blocks of "
        f"{report.shards:,} shards"
    )


@app.command()
def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="The dataset's folder or URL; with `--position`, those of a mixture.",
            metavar="path",
            show_default=False,
            callback=expand,
        ),
    ],
    examples: Annotated[int, typer.Option(help="How many sequences to show of each split.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    position: Annotated[
        int | None,
        typer.Option(
            help="Show what training reads from here instead: the stream's `consumed` before a "
            "step.",
            min=0,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(help="With `--position`: how many, as `data.global_batch_size`.", min=1),
    ] = 256,
    seed: Annotated[int, typer.Option(help="With `--position`: the run's, as `run.seed`.")] = 0,
    order_version: Annotated[
        int | None,
        typer.Option(
            help="With `--position`: of the order that the run began with; by default the newest.",
            show_default=False,
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="With `--position`: a dataset's weight in the mixture; once for each path, in "
            "their order. By default all are 1.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a dataset holds: totals, lengths, what was dropped, examples.

    With `--position`, show the sequences of one step of training instead.

    Example: `t5vae shards inspect data/tweets --examples 10`

    Example: `t5vae shards inspect data/tweets --position 51200 --batch 512 --seed 0`
    """
    from json import dumps, loads

    import numpy as np

    from shards.format.index import open_index

    if position is not None:
        weights = weight or [1.0] * len(paths)
        rows = _replay(paths, weights, position, batch, seed, order_version)
        if json:
            document = {"position": position, "seed": seed, "rows": rows}
            typer.echo(dumps(document, ensure_ascii=False))
        else:
            _print_rows(rows, mixture=len(paths) > 1)
        return
    if len(paths) > 1:
        raise UserError(
            f"{len(paths)} datasets and no --position: give the position whose batch of their "
            "mixture to show, or inspect one dataset at a time"
        )
    index = open_index(paths[0])
    texts = {
        split: index.texts(split, np.arange(min(examples, totals.sequences)))
        for split, totals in index.splits.items()
    }
    if json:
        content = loads(index.as_json())
        content["share_within"] = {length: index.share_within(length) for length in LENGTHS}
        content["examples"] = texts
        typer.echo(dumps(content, ensure_ascii=False))
        return
    _print_totals(index)
    _print_lengths(index)
    for split, lines in texts.items():
        typer.echo(f"\n{split}:")
        for line in lines:
            typer.echo(f"  {_one_line(line)}")


def _replay(
    paths: list[str],
    weights: list[float],
    position: int,
    batch: int,
    seed: int,
    order_version: int | None,
) -> list[dict[str, Any]]:
    """The rows of the training stream from a position on.

    Raises:
        UserError: the weights are not one for each path, the datasets make no mixture, or there is
            no such order.
    """
    from shards.read.dataset import open_dataset
    from shards.read.orders import NEWEST
    from shards.read.stream import ShardStream

    if len(weights) != len(paths):
        raise UserError(
            f"{len(paths)} datasets, but the number of --weight is {len(weights)}: give it once "
            "for each, in their order, or not at all"
        )
    dataset = open_dataset(
        [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    )
    with ShardStream(
        dataset,
        seed=seed,
        global_batch_size=batch,
        consumed=position,
        on_corrupt="skip",
        order_version=order_version or NEWEST,
    ) as stream:
        found = next(stream)
    columns = zip(
        found.sequence.tolist(),
        found.lengths.tolist(),
        found.source.tolist(),
        found.weights.tolist(),
        dataset.tokenizer().batch_decode(found.ids, skip_special_tokens=True),
        strict=True,
    )
    return [
        {
            "sequence": sequence,
            "tokens": tokens,
            "source": paths[source],
            "quarantined": weight == 0,
            "text": text,
        }
        for sequence, tokens, source, weight, text in columns
    ]


def _print_rows(rows: list[dict[str, Any]], mixture: bool) -> None:
    names = ["sequence", "tokens", "quarantined", *(["source"] if mixture else []), "text"]
    table = [names]
    for row in rows:
        said = {
            "quarantined": "yes" if row["quarantined"] else "no",
            "text": _one_line(row["text"]),
        }
        table.append([str((row | said)[name]) for name in names])
    widths = [max(map(len, column)) for column in list(zip(*table, strict=True))[:-1]]
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        typer.echo("  ".join([*padded, cells[-1]]))


def _one_line(text: str) -> str:
    """A text, as Python would write it where it has control characters or line separators."""
    breaks = any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)
    return repr(text) if breaks else text


def _print_totals(index: "Index") -> None:
    from rich.console import Console
    from rich.table import Table

    kept = sum(split.sequences for split in index.splits.values())
    unique = sum(index.unique_lengths)
    tokens = sum(split.tokens for split in index.splits.values())
    table = Table(title=str(index.path), show_header=False, title_justify="left")
    for name, split in index.splits.items():
        table.add_row(name, f"{split.sequences:,} sequences")
    overflow = str(index.recipe["overflow"])
    of = f"{kept:,} sequences" if overflow == "split" else f"{kept / unique:.1%}"
    table.add_row("kept", f"{of} of {unique:,} texts")
    fate = {"drop": "dropped", "truncate": "truncated", "split": "split into pieces"}[overflow]
    overlong = f"{index.overlong:,} texts ({index.overlong / unique:.1%}), {fate}"
    table.add_row(f"over {index.max_length:,} tokens", overlong)
    for reason, count in index.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    if altered := index.altered:
        lost = " ".join(map(_one_line, altered.characters)) or "none"
        share = f"{altered.altered / altered.encoded:.1%} of {altered.encoded:,} texts"
        table.add_row("not given back whole", f"{share}; characters lost: {lost}")
    table.add_row("tokens", f"{tokens:,} ({tokens / kept:.1f} a sequence)")
    table.add_row("vocabulary", f"{index.vocab_size:,} pieces")
    table.add_row("shards", f"{sum(s.bytes for s in index.shards):,} bytes, {len(index.shards)}")
    Console(markup=False, emoji=False).print(table)


def _print_lengths(index: "Index") -> None:
    from rich.console import Console
    from rich.table import Table

    histogram = index.splits["train"].length_histogram
    most = max(histogram)
    table = Table("tokens", "sequences", "", title="Lengths in train", title_justify="left")
    step = -(-index.max_length // 20)
    for low in range(1, index.max_length + 1, step):
        count = sum(histogram[low : low + step])
        label = f"{low}" if step == 1 else f"{low} to {min(low + step - 1, index.max_length)}"
        table.add_row(label, f"{count:,}", "█" * round(40 * count / (most * step)))
    Console(markup=False, emoji=False).print(table)
    shares = ", ".join(f"{n}: {index.share_within(n):.1%}" for n in LENGTHS)
    typer.echo(f"Share of texts within a max_length of {shares}")
