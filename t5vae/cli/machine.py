"""A command that looks at the machine: doctor."""

from dataclasses import asdict

import typer

from t5vae.cli.app import Json, app, print_json


@app.command()
def doctor(json: Json = False) -> None:
    """Say what of this machine matters to training, in a page for an issue; exit 1 if it cannot.

    Example: `t5vae doctor`
    """
    from t5vae.planning.doctor import examine

    found = examine()
    if json:
        print_json(asdict(found))
    else:
        for name, text in found.rows.items():
            typer.echo(f"{name:9} {text}")
        for problem in found.problems:
            typer.echo(f"problem   {problem}")
        typer.echo(f"training {'cannot' if found.problems else 'can'} start here")
    if found.problems:
        raise typer.Exit(1)
