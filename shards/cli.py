"""`t5vae shards`: build, verify and inspect datasets."""

import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from shards.index import Index

LENGTHS = (8, 12, 16, 20, 24, 32, 48, 64, 128, 256, 512)

app = typer.Typer(
    no_args_is_help=True,
    help="Datasets: text in, shuffled and packed WebDataset shards out.",
    rich_markup_mode="markdown",
)
Folder = Annotated[str, typer.Argument(help="The dataset's folder or URL.", show_default=False)]


@app.command()
def build(
    out: Annotated[str, typer.Option(help="The dataset's folder, to be made.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="A Hugging Face name or a folder; `byte` (one token a byte); or `train:N` to "
            "train one of N pieces on the corpus."
        ),
    ],
    max_length: Annotated[
        int, typer.Option(help="The most tokens of a sequence, its end token counted.")
    ],
    source: Annotated[
        str | None,
        typer.Argument(
            help="A file (also .gz, .zst), a folder, a quoted glob, a URL, or `-` for standard "
            "input. With `--format python` it may be left out: Python's standard library.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["text", "jsonl", "csv", "parquet", "python", "webdataset"],
        typer.Option(
            help="`text` has one sequence a line, `python` one-line statements, `webdataset` one "
            "sequence a record of tar files."
        ),
    ] = "text",
    column: Annotated[
        str | None, typer.Option(help="The field, or WebDataset member, that holds the text.")
    ] = None,
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
) -> None:
    """Build a dataset from text. Same input and options: the same bytes.

    A build that was halted goes on when the same command is given again.

    Example: `t5vae shards build tweets.txt --out data/tweets --tokenizer train:8192
    --max-length 32`
    """
    from shards.builder import build as build_dataset

    index = build_dataset(
        source,
        out,
        tokenizer=tokenizer,
        max_length=max_length,
        format=format,
        column=column,
        valid_fraction=valid_fraction,
        overflow=overflow,
        dedupe=dedupe,
        seed=seed,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    _print_totals(index)


@app.command()
def verify(path: Folder) -> None:
    """Check every byte of a dataset, in a folder or at a URL; exit with 1 if it is damaged.

    Example: `t5vae shards verify s3://bucket/tweets`
    """
    from shards.verifier import verify as verify_dataset

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
    path: Folder,
    examples: Annotated[int, typer.Option(help="How many sequences to show of each split.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what a dataset holds: totals, lengths, what was dropped, examples.

    Example: `t5vae shards inspect data/tweets --examples 10`
    """
    from json import dumps

    import numpy as np

    from shards.index import open_index

    index = open_index(path)
    texts = {
        split: index.texts(split, np.arange(min(examples, totals.sequences)))
        for split, totals in index.splits.items()
    }
    if json:
        content = index.model_dump(mode="json")
        content["share_within"] = {length: index.share_within(length) for length in LENGTHS}
        content["examples"] = texts
        typer.echo(dumps(content, ensure_ascii=False))
        return
    _print_totals(index)
    _print_lengths(index)
    for split, lines in texts.items():
        typer.echo(f"\n{split}:")
        for line in lines:
            typer.echo(f"  {line}")


def _print_totals(index: "Index") -> None:
    from rich.console import Console
    from rich.table import Table

    kept = sum(split.sequences for split in index.splits.values())
    unique = sum(index.unique_lengths)
    tokens = sum(split.tokens for split in index.splits.values())
    table = Table(title=str(index.path), show_header=False, title_justify="left")
    for name, split in index.splits.items():
        table.add_row(name, f"{split.sequences:,} sequences")
    overflow = index.recipe["overflow"]
    of = f"{kept:,} sequences" if overflow == "split" else f"{kept / unique:.1%}"
    table.add_row("kept", f"{of} of {unique:,} texts")
    fate = {"drop": "dropped", "truncate": "truncated", "split": "split into pieces"}[overflow]
    overlong = f"{index.overlong:,} texts ({index.overlong / unique:.1%}), {fate}"
    table.add_row(f"over {index.max_length:,} tokens", overlong)
    for reason, count in index.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    table.add_row("tokens", f"{tokens:,} ({tokens / kept:.1f} a sequence)")
    table.add_row("vocabulary", f"{index.vocab_size:,} pieces")
    table.add_row("shards", f"{sum(s.bytes for s in index.shards):,} bytes, {len(index.shards)}")
    Console().print(table)


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
    Console().print(table)
    shares = ", ".join(f"{n}: {index.share_within(n):.1%}" for n in LENGTHS)
    typer.echo(f"Share of texts within a max_length of {shares}")
