"""`t5vae-launch`, or `python -m launcher`: submit, script, status, logs, cancel, resume."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher import jobs
from launcher.backend import ranks_per_node
from launcher.backends import BACKENDS
from launcher.sbatch import job_script
from launcher.submission import check, sweep
from launcher.submission import submit as submit_jobs
from launcher.table import table
from t5vae.cluster.errors import judge
from t5vae.common.errors import StorageError, UserError, check_arguments, printable
from t5vae.common.files import reading
from t5vae.common.paths import expand
from t5vae.config import Config, Launcher, load_config, refuse_choices

app = typer.Typer(
    no_args_is_help=True,
    help="Training runs as jobs: on a SLURM cluster, or on this machine without one.",
    rich_markup_mode="markdown",
)

ConfigFile = Annotated[
    str,
    typer.Argument(help="The run's configuration: a YAML file, or a name of `t5vae config ls`."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="`section.key=value` ...: changes to the configuration.", metavar="K=V"),
]
if TYPE_CHECKING:
    Cluster = str
else:
    Cluster = Literal[tuple(BACKENDS)]
On = Annotated[
    Cluster, typer.Option(help="`local` runs all ranks on this machine, in the background.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all, print the sbatch script, queue nothing.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Queue behind a job that holds the run's folder.")
]
RunOrJob = Annotated[
    str,
    typer.Argument(
        help="A run's folder (its newest job), a sweep's, or the id of a job in runs/.",
        callback=expand,
    ),
]
Text = str | None


@app.command()
def submit(
    context: typer.Context,
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of each, one rank on each; 0: one rank, on CPU.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs of a rank.")] = None,
    time: Annotated[
        Text, typer.Option(help="Minutes, or D-HH or H:MM:SS; the job then goes on in a new turn.")
    ] = None,
    partition: Annotated[Text, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[Text, typer.Option(help="SLURM's account.")] = None,
    qos: Annotated[Text, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[Text, typer.Option(help="Features that nodes must have.")] = None,
    exclude: Annotated[Text, typer.Option(help="Hosts to leave out.")] = None,
    gres: Annotated[Text, typer.Option(help="Generic resources of a node.")] = None,
    mem: Annotated[Text, typer.Option(help="Memory of a node: 64G.")] = None,
    mail_user: Annotated[Text, typer.Option(help="Address to write to.")] = None,
    mail_type: Annotated[Text, typer.Option(help="When to: END, FAIL, REQUEUE ...")] = None,
    array_parallelism: Annotated[
        int | None, typer.Option(help="Runs of a sweep that train at once.")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="A line of shell before training; may be repeated.")
    ] = None,
    srun_args: Annotated[
        list[str] | None, typer.Option("--srun-arg", help="An option of srun; may be repeated.")
    ] = None,
    exclude_unhealthy: Annotated[
        bool | None,
        typer.Option("--exclude-unhealthy", help="Go on without nodes that fail the first check."),
    ] = None,
    sweep_over: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="`section.key=1,2,3`: a run each; may be repeated."),
    ] = None,
    cluster: On = "slurm",
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Check a configuration and queue its training.

    The options stand in place of the configuration's `launcher:` section.

    Example: `t5vae-launch submit configs/large.yaml --nodes 8 --gpus-per-node 8 --time 24:00:00
    --partition gpu`
    """
    given = {key: context.params.get(key) for key in Launcher.model_fields}
    flags = {f"launcher.{key}": value for key, value in given.items() if value is not None}
    if sweep_over:
        configs = sweep(config, overrides or [], sweep_over, flags)
        _submit(configs, cluster, configs[0].run_dir.parent / "jobs", dry_run, force)
    else:
        one = load_config(config, overrides or [], flags)
        _submit([one], cluster, one.run_dir / "jobs", dry_run, force)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.", callback=expand)],
    overrides: Overrides = None,
    cluster: On = "slurm",
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Submit a run again, from its folder's config.yaml; it goes on from its newest checkpoint.

    Example: `t5vae-launch resume runs/large train.steps=200000 launcher.nodes=4`
    """
    here = {"run.output_dir": str(run), "checkpoint.resume": "auto"}
    config = load_config(run / "config.yaml", overrides or [], here, of_run=True)
    _submit([config], cluster, config.run_dir / "jobs", dry_run, force)


def _submit(configs: list[Config], cluster: str, folder: Path, dry_run: bool, force: bool) -> None:
    if dry_run:
        for config in configs:
            check(config)
        typer.echo(BACKENDS[cluster].script(configs, folder))
        return
    queued = submit_jobs(configs, cluster, folder, force=force)
    place = configs[0].launcher
    for job in queued:
        typer.echo(f"job {job.id} on {cluster}: {place.nodes} x {ranks_per_node(configs[0])} ranks")
        typer.echo(f"log:    {job.log()}")
    typer.echo(f"follow: {_me()} logs -f {folder.parent}")


@app.command()
def script(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print a job script for plain `sbatch`, which asks for what the `launcher:` section says.

    Example: `t5vae-launch script large launcher.nodes=8 > train.sh && sbatch train.sh`
    """
    loaded = load_config(config, overrides or [])
    refuse_choices(loaded, "launcher")
    typer.echo(job_script(loaded, [config, *(overrides or [])]), nl=False)


@app.command()
def status(
    run_or_job: Annotated[
        str | None,
        typer.Argument(
            help="A run's or a sweep's folder or a job's id; without, all of runs/.",
            callback=expand,
        ),
    ] = None,
) -> None:
    """List jobs, the newest last: state, and how far their runs are.

    Example: `t5vae-launch status`
    """
    found = jobs.find(run_or_job)
    typer.echo(table(found, jobs.states(found)))


@app.command()
def logs(
    run_or_job: RunOrJob,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    rank: Annotated[int, typer.Option(help="Of which rank.")] = 0,
) -> None:
    """Print what a job's rank printed.

    Example: `t5vae-launch logs -f runs/large`
    """
    found = jobs.newest_of_each_run(jobs.find(run_or_job))
    paths = [job.log(rank) for job in found]
    for path in paths:
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(path.parent):
            raise UserError(f"{path} is a link to another folder's file: look at that itself")
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", *map(str, paths)])
    states = jobs.states(found)
    missing = {job.id: path for job, path in zip(found, paths, strict=True) if not path.exists()}
    for job, path in missing.items():
        raise UserError(f"{path} does not exist: job {job} is {states[job].word}")
    for path in paths:
        if len(paths) > 1:
            typer.echo(f"==> {path} <==")
        with reading(str(path)):
            typer.echo(path.read_text(errors="replace"), nl=False)


@app.command()
def cancel(run_or_job: RunOrJob) -> None:
    """End a job, or all of a sweep, for good. Training saves first if time allows.

    Example: `t5vae-launch cancel runs/large`
    """
    for job in jobs.cancel(jobs.newest_of_each_run(jobs.find(run_or_job))):
        typer.echo(f"job {job.id} is told to stop; go on later with: {_me()} resume {job.run}")


def _me() -> str:
    """This program, as it was called."""
    name = Path(sys.argv[0]).name
    return "python -m launcher" if name == "__main__.py" else name


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, storage that does not
    answer one and 1."""
    try:
        check_arguments(sys.argv)
        app()
    except (UserError, StorageError, OSError) as error:
        verdict = judge(error)
        if verdict.fault:
            raise
        print(f"error: {printable(verdict.text)}", file=sys.stderr)
        sys.exit(verdict.code)
