"""Commands that look at a configuration: config show, config schema, plan."""

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
    json: Json = False,
) -> None:
    """Say what a run will need: memory, communication, reads. Default: as its launcher section.

    Example: `t5vae plan configs/large.yaml --nodes 8 --gpus-per-node 8 --gpu-memory 80`
    """
    from rich.console import Console

    from t5vae.config import load_config

    loaded = load_config(config, overrides or [])
    from t5vae.planning.plan import plan as make_plan
    from t5vae.planning.plan import shown

    quiet_transformers()
    launcher = loaded.launcher
    found = make_plan(
        loaded,
        nodes=launcher.nodes if nodes is None else nodes,
        gpus_per_node=launcher.gpus_per_node if gpus_per_node is None else gpus_per_node,
        gpu_memory=gpu_memory,
    )
    if json:
        print_json(found.as_json())
    else:
        Console(soft_wrap=True, highlight=False).print(shown(found))
