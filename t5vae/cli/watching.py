"""Commands that look at runs from outside: runs, plot, track."""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from t5vae.cli.app import Json, Run, app, console, print_json
from t5vae.common.errors import UserError, printable
from t5vae.common.paths import expand


@app.command()
def runs(
    folder: Annotated[
        str, typer.Argument(help="Runs at any depth below it, or one run.", callback=expand)
    ] = "runs",
    json: Json = False,
) -> None:
    """List runs: how far each is, how fast, and whether it goes on; from metrics.jsonl alone.

    Example: `t5vae runs runs/sweep`
    """
    from dataclasses import asdict

    from t5vae.metrics.listing import list_runs, table

    rows = list_runs(folder)
    if json:
        print_json({"runs": [asdict(row) for row in rows]})
        return
    console(1000).print(table(rows))  # whole paths
    for row in rows:
        if row.problem:
            typer.echo(printable(row.problem), err=True)


@app.command()
def plot(
    runs: Annotated[
        list[str],
        typer.Argument(help="Run folders, or copies of their metrics.jsonl.", callback=expand),
    ],
    key: Annotated[
        list[str] | None,
        typer.Option(help="What is drawn, such as loss or eval/valid; repeatable."),
    ] = None,
    x: Annotated[
        Literal["step", "consumed", "hours"],
        typer.Option(help="Over steps, training sequences, or hours since the run's first line."),
    ] = "step",
    out: Annotated[
        Path | None,
        typer.Option(help="A picture, .png, .svg or .pdf; default the terminal.", callback=expand),
    ] = None,
) -> None:
    """Draw runs' curves, a panel a key, held-out ones over those of training.

    Example: `t5vae plot runs/quickstart runs/wide --key loss --key mmd --out curves.png`
    """
    from t5vae.metrics import panels

    if out is not None:
        from t5vae.metrics import picture

        picture.check_out(out)
        picture.write_picture(panels.plan(runs, key, x), out)
        typer.echo(f"curves: {out}")
        return
    from t5vae.metrics import terminal

    width = shutil.get_terminal_size((100, 24)).columns
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    typer.echo(terminal.draw(panels.plan(runs, key, x), width, colored))


@app.command()
def track(
    run: Run,
    wandb: Annotated[bool, typer.Option(help="To Weights & Biases.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="To TensorBoard's event files.")] = False,
) -> None:
    """Send a run's metrics and texts to a tracker afterwards.

    Example: `t5vae track runs/quickstart --wandb`
    """
    from t5vae.metrics.trackers import track as send

    if not (wandb or tensorboard):
        raise UserError("where to? give --wandb, --tensorboard, or both")
    lines = send(
        Path(run), lambda text: typer.echo(text, err=True), wandb=wandb, tensorboard=tensorboard
    )
    typer.echo(f"sent {lines:,} lines of {Path(run) / 'metrics.jsonl'}")
