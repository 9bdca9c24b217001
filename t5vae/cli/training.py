"""Commands that train: train in one process or as several ranks; quickstart, the whole way."""

import os
import shlex
import signal
import subprocess
import sys
from typing import Annotated

import typer

from t5vae.cli.app import ConfigFile, Overrides, app
from t5vae.common.errors import UserError

PYTHON_T5VAE = (sys.executable, "-u", "-P", "-m", "t5vae")
ON_CPU = 2  # ranks of the quickstart


@app.command()
def train(
    context: typer.Context,
    config: ConfigFile = "quickstart",
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="So many on this machine, one an accelerator, by DeepSpeed's launcher; default "
            "this process alone.",
            min=1,
        ),
    ] = None,
) -> None:
    """Train, in this process or as several ranks.

    Example: `t5vae train quickstart --ranks 2 train.steps=100 run.output_dir=runs/short`
    """
    debug = ["--debug"] if context.obj and context.obj["debug"] else []
    arguments = [config, *(overrides or []), *debug]
    if ranks is not None:
        _become_launcher(ranks, arguments)
    from t5vae.training.main import main as train_main

    raise typer.Exit(train_main(arguments))


def _become_launcher(ranks: int, arguments: list[str]) -> None:
    """Put DeepSpeed's launcher in this process's place, which keeps its number and its signals."""
    from t5vae.config import load_config

    # What ranks would refuse is told once, and here.
    data = load_config(arguments[0], [each for each in arguments[1:] if each != "--debug"]).data
    data.open()
    data.split(ranks)
    from t5vae.cluster.process_group import free_port

    accelerators = _accelerators()
    if accelerators and ranks > accelerators:
        raise UserError(
            f"--ranks {ranks}: this machine has {accelerators} accelerators; DS_ACCELERATOR=cpu "
            "trains on its CPU"
        )
    # Safe: what lies in the working folder, such as one called shards, hides no package.
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    if not accelerators:
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    how = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    program = ["--no_local_rank", "--no_python", *PYTHON_T5VAE, "train", *arguments]
    os.execve(sys.executable, [*launcher, *how, *program], environment)


def _accelerators() -> int:
    """How many there are to train on."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return 0
    return torch.accelerator.device_count()


@app.command()
def quickstart(
    overrides: Overrides = None,
    config: Annotated[
        str, typer.Option(help="A YAML file, or a name of `t5vae config ls`.")
    ] = "quickstart",
) -> None:
    """Do all there is with lines of Python: build shards, train, export, evaluate, and look.

    It trains for seven minutes, on all accelerators or two CPU cores, and goes on from what exists.

    Example: `t5vae quickstart train.minutes=20`
    """
    from t5vae.config import load_config, names_function

    settings = ["train.minutes=7", *(overrides or [])]
    loaded = load_config(config, settings)
    shards, run = loaded.data.shards, str(loaded.run_dir)
    if not isinstance(shards, str):
        raise UserError("quickstart builds one folder of shards: give data.shards a path")
    how = ["--format", "python", "--out", shards, "--tokenizer", "train:4096", "--max-length", "16"]
    # Those of a run's folder are refused; these are its user's own.
    named = {"check": loaded.eval.check, "measure": loaded.eval.measure}
    functions = [f"--{key}={name}" for key, name in named.items() if names_function(name)]
    for command in (
        ["shards", "build", *how],
        ["train", config, *settings, "--ranks", str(_accelerators() or ON_CPU)],
        ["export", "--finished", run],
        ["eval", run, *functions],
        ["interpolate", run, "x = a - 1", "x = a + 10 * 2", "--steps", "11"],
        ["sample", run, "-n", "10"],
    ):
        typer.echo(shlex.join(["t5vae", *command]))
        if code := _run(command):
            raise typer.Exit(code)
    typer.echo(f"""
shards       {shards}
run          {run}             (config.yaml, metrics.jsonl, logs/)
checkpoints  {run}/checkpoints
model        {run}/export      (AutoModel.from_pretrained after "import t5vae")
evaluation   {run}/eval.html   (eval.json)""")


def _run(command: list[str]) -> int:
    """The exit code of a t5vae command, which is told to stop when this process is."""
    child = subprocess.Popen([*PYTHON_T5VAE, *command])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to both
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code if code >= 0 else 128 - code
