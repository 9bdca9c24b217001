"""`t5vae-launch`, or `python -m launcher`: submit, status, logs, cancel, resume."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from launcher.jobs import Cluster, find, ranks_per_node
from launcher.jobs import submit as submit_job
from shards import UserError
from t5vae.config import load_config

app = typer.Typer(
    no_args_is_help=True,
    help="Training runs as jobs: on a SLURM cluster, or on this machine without one.",
    rich_markup_mode="markdown",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="`section.key=value` ...: changes to the configuration.", metavar="K=V"),
]
On = Annotated[
    Cluster, typer.Option(help="`local` runs all ranks on this machine, in the background.")
]
RunOrJob = Annotated[
    str, typer.Argument(help="A run's folder (its newest job), or the id of a job in runs/.")
]


@app.command()
def submit(
    config: Annotated[str, typer.Argument(help="The run's configuration, a YAML file.")],
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of each, one rank on each; 0: one rank, on CPU.")
    ] = None,
    time: Annotated[
        int | None, typer.Option(help="Minutes, after which SLURM queues the job again.")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account.")] = None,
    cluster: On = "slurm",
) -> None:
    """Check a configuration and queue its training.

    The options stand in place of the configuration's `launcher:` section.

    Example: `t5vae-launch submit configs/large.yaml --nodes 8 --gpus-per-node 8 --time 1440
    --partition gpu`
    """
    chosen = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "time": time,
        "partition": partition,
        "account": account,
    }
    flags = [
        f"launcher.{key}={json.dumps(value)}"  # JSON is YAML, with strings safely quoted
        for key, value in chosen.items()
        if value is not None
    ]
    loaded = load_config(config, [*(overrides or []), *flags])
    job = submit_job(loaded, cluster)
    typer.echo(
        f"job {job.id} on {cluster}: {loaded.launcher.nodes} x {ranks_per_node(loaded)} ranks\n"
        f"log:    {job.log()}\n"
        f"follow: {_me()} logs -f {job.run}"
    )


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    overrides: Overrides = None,
    cluster: On = "slurm",
) -> None:
    """Submit a run again, from its folder's config.yaml; it goes on from its newest checkpoint.

    Example: `t5vae-launch resume runs/large train.steps=200000 launcher.nodes=4`
    """
    here = [f"run.output_dir={json.dumps(str(run))}", "checkpoint.resume=auto"]
    submit(str(run / "config.yaml"), [*(overrides or []), *here], cluster=cluster)


@app.command()
def status(
    run_or_job: Annotated[
        str | None, typer.Argument(help="A run's folder or a job's id; without, all of runs/.")
    ] = None,
) -> None:
    """List jobs, the newest last: state, and how far their runs are.

    Example: `t5vae-launch status`
    """
    row = "{:>10}  {:<12} {:>15} {:>9} {:>10}  {}".format
    typer.echo(row("job", "state", "step", "loss", "tokens/s", "run"))
    for job in find(run_or_job):
        typer.echo(row(job.id, job.state(), *_progress(job.run), job.run))


@app.command()
def logs(
    run_or_job: RunOrJob,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    rank: Annotated[int, typer.Option(help="Of which rank.")] = 0,
) -> None:
    """Print what a job's rank printed.

    Example: `t5vae-launch logs -f runs/large`
    """
    job = find(run_or_job)[-1]
    path = job.log(rank)
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", str(path)])
    if not path.exists():
        raise UserError(f"{path} does not exist: job {job.id} is {job.state()}")
    typer.echo(path.read_text(errors="replace"), nl=False)


@app.command()
def cancel(run_or_job: RunOrJob) -> None:
    """End a job for good. Training saves first if time allows, and can be resumed.

    Example: `t5vae-launch cancel runs/large`
    """
    job = find(run_or_job)[-1]
    job.cancel()
    typer.echo(f"job {job.id} is told to stop; go on later with: {_me()} resume {job.run}")


def _progress(run: Path) -> tuple[str, str, str]:
    """Step of steps, loss and tokens a second of the last logged step; dashes before it."""
    metrics, config = run / "metrics.jsonl", run / "config.yaml"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    if not lines or not config.exists():
        return "-", "-", "-"
    last = json.loads(lines[-1])
    steps = yaml.safe_load(config.read_text())["train"]["steps"]
    return (
        f"{last['step']:,}/{steps:,}",
        f"{last['loss']:.4f}",
        f"{last['tokens_per_second']:,.0f}",
    )


def _me() -> str:
    """This program, as it was called."""
    name = Path(sys.argv[0]).name
    return "python -m launcher" if name == "__main__.py" else name


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
