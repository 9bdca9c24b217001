"""The `t5vae` command. Heavy imports wait until a command needs them."""

import json as json_module
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shards.cli import app as shards_app
from shards.errors import DISK_FULL, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Learn smooth latent spaces of sequences, and use them.\n\n"
    "build shards -> train -> export -> eval, sample, reconstruct, interpolate.",
)
_debug = False
config_app = typer.Typer(no_args_is_help=True, help="Look at run configurations.")
app.add_typer(shards_app, name="shards")
app.add_typer(config_app, name="config")

Run = Annotated[str, typer.Argument(help="A run folder, for example runs/quickstart.")]
Space = Annotated[str, typer.Argument(help="A run folder, or an exported model's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ConfigFile = Annotated[
    str, typer.Argument(help="A YAML file, for example configs/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings in place of the file's: section.key=value ...")
]


@app.command()
def train(config: ConfigFile = "configs/quickstart.yaml", overrides: Overrides = None) -> None:
    """Train in this one process. For several: `deepspeed train.py CONFIG`.

    Example: `t5vae train configs/quickstart.yaml train.steps=100 run.output_dir=runs/short`
    """
    from t5vae.training.main import main as train_main

    debug = ["--debug"] if _debug else []
    raise typer.Exit(train_main([config, *(overrides or []), *debug]))


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
    from t5vae.training import checkpoint

    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is not a run folder: it has no checkpoints/")
    for name in remove or []:
        typer.echo(f"removed {checkpoint.remove(folder, name)}", err=True)
    found = checkpoint.describe(folder, hashes=verify)
    if json:
        _print_json({"checkpoints": found})
    else:
        _print_checkpoints(found, verify)
    if verify and any(entry["problem"] not in (None, "unfinished") for entry in found):
        raise typer.Exit(1)


def _print_checkpoints(found: list[dict[str, Any]], verified: bool) -> None:
    from datetime import datetime

    from rich.console import Console
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
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)


@app.command()
def track(
    run: Run,
    wandb: Annotated[bool, typer.Option(help="To Weights & Biases.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="To TensorBoard's event files.")] = False,
) -> None:
    """Send a run's metrics and texts to a tracker afterwards.

    Example: `t5vae track runs/quickstart --wandb`
    """
    from t5vae.training.trackers import track as send

    if not (wandb or tensorboard):
        raise UserError("where to? give --wandb, --tensorboard, or both")
    lines = send(
        Path(run), lambda text: typer.echo(text, err=True), wandb=wandb, tensorboard=tensorboard
    )
    typer.echo(f"sent {lines:,} lines of {Path(run) / 'metrics.jsonl'}")


@app.command()
def runs(
    folder: Annotated[str, typer.Argument(help="Runs at any depth below it, or one run.")] = "runs",
    json: Json = False,
) -> None:
    """List runs: how far each is, how fast, and whether it goes on; from metrics.jsonl alone.

    Example: `t5vae runs runs/sweep`
    """
    from dataclasses import asdict

    from rich.console import Console

    from t5vae.curves.listing import list_runs, table

    rows = list_runs(folder)
    if json:
        _print_json({"runs": [asdict(row) for row in rows]})
        return
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # whole paths
    console.print(table(rows))
    for row in rows:
        if row.problem:
            typer.echo(row.problem, err=True)


@app.command()
def plot(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, or copies of their metrics.jsonl.")
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
        Path | None, typer.Option(help="A picture, .png, .svg or .pdf; default the terminal.")
    ] = None,
) -> None:
    """Draw runs' curves, a panel a key, held-out ones over those of training.

    Example: `t5vae plot runs/quickstart runs/wide --key loss --key mmd --out curves.png`
    """
    from t5vae.curves import panels

    if out is not None:
        from t5vae.curves import picture

        picture.check_out(out)
        picture.write_picture(panels.plan(runs, key, x), out)
        typer.echo(f"curves: {out}")
        return
    from t5vae.curves import terminal

    width = shutil.get_terminal_size((100, 24)).columns
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    typer.echo(terminal.draw(panels.plan(runs, key, x), width, colored))


@app.command()
def export(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; default the newest.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Turn a run's checkpoint into a transformers model: RUN/export.

    Example: `t5vae export runs/quickstart --dtype bf16`
    """
    from t5vae.training.export import export as export_run

    _quiet_transformers()
    folder, checkpoint, known = export_run(run, step=step, dtype=dtype)
    typer.echo(f"{'already exported' if known else 'exported'}: {checkpoint} as {folder}")


@app.command(name="eval")
def evaluate(
    run: Run,
    sequences: Annotated[int | None, typer.Option(help="Held-out sequences.", min=2)] = None,
    samples: Annotated[int | None, typer.Option(help="Draws from the prior.", min=1)] = None,
    interpolations: Annotated[int | None, typer.Option(help="Paths.", min=1)] = None,
    check: Annotated[
        str | None, typer.Option(help="What is valid: python, json, smiles, regex:..., pkg.func.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure a run on held-out data, beside its controls; write RUN/eval.json and the model card.

    Example: `t5vae eval runs/quickstart --samples 10000`
    """
    from rich.console import Console

    from t5vae.evaluation import evaluate_run, table
    from t5vae.training.card import write_card

    _quiet_transformers()
    report, known = evaluate_run(
        run, sequences=sequences, samples=samples, interpolations=interpolations, check=check
    )
    write_card(Path(run), Path(run) / "export")
    if json:
        _print_json(report)
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table(report))
    typer.echo(f"{'already evaluated' if known else 'report'}: {Path(run) / 'eval.json'}")


@app.command()
def sample(
    run: Space,
    n: Annotated[int, typer.Option("-n", help="How many.", min=1)] = 10,
    check: Annotated[
        str | None, typer.Option(help="Keep only valid ones, by this checker.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    json: Json = False,
) -> None:
    """Decode random points of the latent space.

    Example: `t5vae sample runs/quickstart -n 20 --check python`
    """
    drawn = _load(run).sample(n, check=check, seed=seed)
    if json:
        _print_json({"texts": drawn.texts, "drawn": drawn.drawn, "check": check, "seed": seed})
        return
    for text in drawn.texts:
        typer.echo(text)
    if check:
        typer.echo(f"{n} of {drawn.drawn} drawn passed {check}", err=True)


@app.command()
def reconstruct(
    run: Space,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; none, or -, reads a line each from stdin.")
    ] = None,
    json: Json = False,
) -> None:
    """Encode texts and decode them again.

    Example: `t5vae reconstruct runs/quickstart "x = a + 1" "return self._name"`
    """
    given = _texts(texts)
    decoded = _load(run).reconstruct(given)
    pairs = [
        {"text": text, "reconstruction": back, "exact": text == back}
        for text, back in zip(given, decoded, strict=True)
    ]
    if json:
        _print_json({"texts": pairs})
        return
    for pair in pairs:
        typer.echo(f"{'=' if pair['exact'] else '~'} {pair['text']}")
        if not pair["exact"]:
            typer.echo(f"  {pair['reconstruction']}")


@app.command()
def interpolate(
    run: Space,
    a: Annotated[str, typer.Argument(help="The text to start from.")],
    b: Annotated[str, typer.Argument(help="The text to end at.")],
    steps: Annotated[int, typer.Option(help="Texts on the way, both ends included.", min=2)] = 11,
    method: Annotated[str, typer.Option(help="linear or slerp.")] = "linear",
    json: Json = False,
) -> None:
    """Walk from one text to another through the latent space.

    Example: `t5vae interpolate runs/quickstart "x = a - 1" "x = a + 10 * 2"`
    """
    texts = _load(run).interpolate(a, b, steps=steps, method=method)
    if json:
        _print_json({"a": a, "b": b, "method": method, "texts": texts})
        return
    for number, text in enumerate(texts):
        typer.echo(f"{number / (steps - 1):4.2f}  {text}")


@config_app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None,
        typer.Option(help="Ranks; default nodes x gpus_per_node of its launcher section.", min=1),
    ] = None,
    json: Json = False,
) -> None:
    """Print a configuration resolved, and what follows from it.

    Example: `t5vae config show configs/quickstart.yaml --world-size 2 train.steps=100`
    """
    import yaml

    from t5vae.config import load_config

    loaded = load_config(config, overrides or [])
    from t5vae.training.setup import describe_config

    launcher = loaded.launcher
    world_size = world_size or launcher.nodes * max(1, launcher.gpus_per_node)
    derived = describe_config(loaded, world_size)
    if json:
        _print_json({"config": loaded.model_dump(mode="json"), "derived": derived})
        return
    typer.echo(loaded.dump())
    typer.echo(yaml.safe_dump({"derived": derived}, sort_keys=False).rstrip())


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Hosts.", min=1)] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="Ranks of a host; 0 for one on its CPU.", min=0)
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of one device: which micro batch fits?")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run will need: memory, communication, reads. Default: as its launcher section.

    Example: `t5vae plan configs/large.yaml --nodes 8 --gpus-per-node 8 --gpu-memory 80`
    """
    from rich.console import Console

    from t5vae.config import load_config

    loaded = load_config(config, overrides or [])
    from t5vae.training.plan import plan as make_plan
    from t5vae.training.plan import shown

    _quiet_transformers()
    launcher = loaded.launcher
    found = make_plan(
        loaded,
        nodes=launcher.nodes if nodes is None else nodes,
        gpus_per_node=launcher.gpus_per_node if gpus_per_node is None else gpus_per_node,
        gpu_memory=gpu_memory,
    )
    if json:
        _print_json(found.as_json())
    else:
        Console(soft_wrap=True, highlight=False).print(shown(found))


@config_app.command()
def schema(json: Json = False) -> None:
    """List every key with its type, default and meaning.

    Example: `t5vae config schema`
    """
    from t5vae.config import Config
    from t5vae.config.reference import describe_keys

    if json:
        _print_json(Config.model_json_schema())
        return
    for key in describe_keys():
        typer.echo(f"{key.name} ({key.kind}) = {key.default}\n    {key.meaning}")


def _load(run: str) -> Any:
    from t5vae.latent import LatentSpace

    _quiet_transformers()
    return LatentSpace.load(run)


def _quiet_transformers() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _texts(texts: list[str] | None) -> list[str]:
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


def _print_json(document: Any) -> None:
    typer.echo(json_module.dumps(document, ensure_ascii=False, indent=1))


def main() -> None:
    """Run a command; a user's mistake is one line and exit code 2 (--debug shows where)."""
    global _debug
    _debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        if _debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
