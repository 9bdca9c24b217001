"""Commands that look after a run: checkpoints, export, eval, compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from t5vae.cli.app import (
    Json,
    Run,
    app,
    console,
    print_json,
    quiet_transformers,
)
from t5vae.cli.given import Space
from t5vae.common.errors import UserError, printable
from t5vae.common.paths import expand


@app.command()
def checkpoints(
    run: Run,
    verify: Annotated[bool, typer.Option(help="Compare every file's hash, not its size.")] = False,
    remove: Annotated[
        list[str] | None, typer.Option(help="A step to delete, or a folder's name; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """List a run's checkpoints, verify them, remove some; with --verify exit with 1 on damage.

    Example: `t5vae checkpoints runs/quickstart --verify`
    """
    from t5vae.checkpoint import retention
    from t5vae.common.links import refuse_links

    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is not a run folder: it has no checkpoints/")
    if remove:
        refuse_links(Path(run), "checkpoints")
    for name in remove or []:
        typer.echo(f"removed {retention.remove(folder, name)}", err=True)
    found = retention.describe(folder, hashes=verify)
    if json:
        print_json({"checkpoints": found})
    else:
        _print_checkpoints(found, verify)
    if verify and any(entry["problem"] not in (None, "unfinished") for entry in found):
        raise typer.Exit(1)


def _print_checkpoints(found: list[dict[str, Any]], verified: bool) -> None:
    from datetime import datetime

    from rich.table import Table

    table = Table("checkpoint", "saved", "MB", "ranks", "ZeRO", "precision", "held-out", "state")
    for entry in found:
        row = [entry["name"], "", f"{entry['bytes'] / 1e6:,.1f}", "", "", "", "", entry["problem"]]
        if not entry["problem"]:
            row[1] = datetime.fromtimestamp(entry["saved_at"]).strftime("%Y-%m-%d %H:%M")
            row[3:6] = [str(entry[key]) for key in ("world_size", "zero_stage", "precision")]
            row[6] = "" if entry["held_out"] is None else f"{entry['held_out']:.3f}"
            row[7] = "whole" if verified else "sizes right"
        table.add_row(*row)
    console().print(table)


@app.command()
def export(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; default the newest.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
    finished: Annotated[
        bool, typer.Option("--finished", help="Refuse a run whose steps are not all done.")
    ] = False,
) -> None:
    """Turn a run's checkpoint into a transformers model: RUN/export.

    Example: `t5vae export runs/quickstart --dtype bf16`
    """
    from t5vae.checkpoint.export import export as export_run

    quiet_transformers()
    folder, checkpoint, known = export_run(run, step=step, dtype=dtype, finished=finished)
    typer.echo(f"{'already exported' if known else 'exported'}: {checkpoint} as {folder}")


@app.command(name="eval")
def evaluate(
    run: Space,
    sequences: Annotated[int | None, typer.Option(help="Held-out sequences.", min=4)] = None,
    samples: Annotated[int | None, typer.Option(help="Draws from each prior.", min=1)] = None,
    interpolations: Annotated[int | None, typer.Option(help="Paths.", min=1)] = None,
    check: Annotated[
        str | None, typer.Option(help="What is valid: python, json, smiles, regex:..., pkg.func.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(help="What is probed: length, calls, names, logp, qed, pkg.func.")
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            help="Evaluate on these; an export without its run needs them.", callback=expand
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure a space on held-out data, beside its controls; write eval.json and eval.html.

    Example: `t5vae eval runs/quickstart --samples 10000`
    """
    from t5vae.checkpoint.card import write_card
    from t5vae.evaluation import evaluate_run, table

    quiet_transformers()
    report, home, known = evaluate_run(
        run,
        shards=shards,
        sequences=sequences,
        samples=samples,
        interpolations=interpolations,
        check=check,
        measure=measure,
    )
    if (home / "export" / "SOURCE").is_file():
        write_card(home, home / "export")
    if json:
        print_json(report)
        return
    console().print(table(report))
    for sentence in report["alarms"].values():
        typer.secho(printable(f"alarm: {sentence}"), fg="red")
    typer.echo(f"{'already evaluated' if known else 'report'}: {home / 'eval.html'}")


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Evaluated run folders, or exports.", callback=expand)
    ],
    json: Json = False,
) -> None:
    """Put what `t5vae eval` found of several runs side by side.

    Example: `t5vae compare runs/quickstart runs/wide`
    """
    from t5vae.evaluation import comparison, differences, read_report

    reports = [read_report(run) for run in runs]
    if json:
        print_json(dict(zip(runs, reports, strict=True)))
        return
    console(60 + 20 * len(runs)).print(comparison(runs, reports))
    if differ := differences(reports):
        typer.echo(f"not evaluated alike, they differ in: {', '.join(differ)}", err=True)
    for run, report in zip(runs, reports, strict=True):
        for sentence in report["alarms"].values():
            typer.secho(printable(f"alarm: {run}: {sentence}"), fg="red")
