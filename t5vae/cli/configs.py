"""Commands for configurations: config ls, show, copy, schema; plan."""

from pathlib import Path
from typing import Annotated

import typer

from t5vae.cli.app import (
    ConfigFile,
    Json,
    Overrides,
    app,
    config_app,
    print_json,
    quiet_transformers,
)
from t5vae.common.errors import UserError
from t5vae.common.files import write_whole
from t5vae.common.paths import expand


@config_app.command()
def ls(json: Json = False) -> None:
    """List the configurations that come with t5vae; their names do wherever a file is asked for.

    Example: `t5vae config ls`
    """
    from t5vae.config import presets

    # A preset begins with a sentence or two on what it is for.
    about = {name: _comment(path) for name, path in presets().items()}
    if json:
        print_json({"configs": about})
        return
    width = max(map(len, about))
    for name, text in about.items():
        typer.echo(f"{name:{width}}  {text}")


def _comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))


@config_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="One that `t5vae config ls` lists.")],
    to: Annotated[
        Path | None,
        typer.Argument(help="A file, or a folder; default NAME.yaml here.", callback=expand),
    ] = None,
) -> None:
    """Copy a configuration that comes with t5vae, to make it yours.

    Example: `t5vae config copy quickstart mine.yaml`
    """
    from t5vae.config import presets

    if name not in presets():
        raise UserError(f"there is no configuration {name}: choose {', '.join(presets())}")
    file = to or Path(f"{name}.yaml")
    file = file / f"{name}.yaml" if file.is_dir() else file
    if file.exists():
        raise UserError(f"{file} exists: give another name")
    try:
        write_whole(file, presets()[name].read_text())
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
    typer.echo(f"copied: {file}")


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

    Example: `t5vae config show quickstart --world-size 2 train.steps=100`
    """
    import yaml

    from t5vae.config import load_config

    loaded = load_config(config, overrides or [])
    from t5vae.planning.describe import describe, open_if_there

    launcher = loaded.launcher
    world_size = world_size or launcher.nodes * max(1, launcher.gpus_per_node)
    derived = describe(loaded, open_if_there(loaded), world_size)
    if json:
        print_json({"config": loaded.model_dump(mode="json"), "derived": derived})
        return
    typer.echo(loaded.dump())
    typer.echo(yaml.safe_dump({"derived": derived}, sort_keys=False).rstrip())


@config_app.command()
def schema(json: Json = False) -> None:
    """List every key with its type, default and meaning.

    Example: `t5vae config schema`
    """
    from t5vae.config import Config
    from t5vae.config.reference import describe_keys

    if json:
        print_json(Config.model_json_schema())
        return
    for key in describe_keys():
        typer.echo(f"{key.name} ({key.kind}) = {key.default}\n    {key.meaning}")


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
    device: Annotated[
        str, typer.Option(help="The accelerators, for their peak and links: h100, a100, ...")
    ] = "h100",
    tflops: Annotated[
        float | None,
        typer.Option(help="10^12 operations a second of a rank's device; default the device's."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of these that is reached while a rank computes.")
    ] = 0.4,
    network: Annotated[float, typer.Option(help="Gbit/s of a node, all adapters together.")] = 400,
    store: Annotated[
        float, typer.Option(help="GB/s that all nodes together have from the shards' store.")
    ] = 10,
    disk: Annotated[
        float, typer.Option(help="GB/s of the run folder's file system, all nodes together.")
    ] = 10,
    price: Annotated[
        float | None, typer.Option(help="Dollars an hour of one device: what will it cost?")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run will need: memory, communication, reads, time, dollars.

    Nodes and devices are its launcher section's unless they are given.

    Example: `t5vae plan large --nodes 64 --gpus-per-node 8 --gpu-memory 80 --price 2.5`
    """
    from rich.console import Console

    from t5vae.config import load_config

    loaded = load_config(config, overrides or [])
    from t5vae.planning.machine import Machine
    from t5vae.planning.plan import plan as make_plan
    from t5vae.planning.shown import shown

    quiet_transformers()
    launcher = loaded.launcher
    found = make_plan(
        loaded,
        nodes=launcher.nodes if nodes is None else nodes,
        gpus_per_node=launcher.gpus_per_node if gpus_per_node is None else gpus_per_node,
        gpu_memory=gpu_memory,
        machine=Machine(device, tflops, utilisation, network, store, disk, price),
    )
    if json:
        print_json(found.as_json())
    else:
        Console(soft_wrap=True, highlight=False).print(shown(found))
