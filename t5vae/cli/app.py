"""What the commands share: the application, arguments, tables, and how mistakes end."""

import io
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shards.cli import app as shards_app
from t5vae.cluster.errors import judge
from t5vae.common.errors import StorageError, UserError, check_arguments, printable
from t5vae.common.paths import expand
from t5vae.common.versions import versions

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Learn smooth latent spaces of sequences, and use them.\n\n"
    "build shards -> train -> export -> eval; then reconstruct, interpolate, sample, optimise.",
)
config_app = typer.Typer(
    no_args_is_help=True, help="Run configurations: those that come with t5vae, and yours."
)
app.add_typer(shards_app, name="shards")
app.add_typer(config_app, name="config")


def _one_form(context: typer.Context, wanted: bool) -> bool:
    """What --json and --jsonl say, of which a command gets one."""
    if wanted and (context.params.get("json") or context.params.get("jsonl")):
        raise UserError("--json and --jsonl: give one of them")
    return wanted


LAYOUT = "\n\t"  # control characters that a terminal may have

Run = Annotated[
    str, typer.Argument(help="A run folder, for example runs/quickstart.", callback=expand)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", callback=_one_form)]
Jsonl = Annotated[
    bool,
    typer.Option(
        "--jsonl",
        help="Print a JSON object a line, its text first: --file takes them with --column text.",
        callback=_one_form,
    ),
]
ConfigFile = Annotated[
    str, typer.Argument(help="A YAML file, or a name of `t5vae config ls`, such as quickstart.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings in place of the file's: section.key=value ...")
]


def _print_versions(wanted: bool) -> None:
    if wanted:
        typer.echo("\n".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_versions, is_eager=True, help="Print versions, and exit."
        ),
    ] = False,
) -> None:
    """What all commands have."""


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False, indent=1))


def tell(text: str) -> None:
    """Print a text, which may be a stranger's; a terminal gets nothing that it obeys."""
    typer.echo(printable(text, LAYOUT) if sys.stdout.isatty() else text)


def console(width: int = 120) -> "Console":
    """For tables; of that width where they go into a file or a pipe."""
    from rich.console import Console
    from rich.text import Text

    class Printable(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text, LAYOUT), **how)

    found = Printable(highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = width
    return found


def quiet_transformers() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> None:
    """Run a command; what goes wrong is one line (--debug shows where) and an exit code.

    2: a user's mistake. 1: storage that does not answer.
    """
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    if sys.stdin is None:  # closed
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # halves of pairs, as JSON writes them
    try:
        check_arguments(sys.argv)
        app(obj={"debug": debug})
    except (UserError, StorageError, OSError) as error:
        verdict = judge(error)
        if verdict.fault:
            raise
        if debug:
            traceback.print_exc()
        else:
            print(f"error: {printable(verdict.text)}", file=sys.stderr)
        sys.exit(verdict.code)
