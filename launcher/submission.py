"""Submission: configurations are checked, made ready in their run folders, and queued."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from launcher.backend import ranks_per_node
from launcher.backends import BACKENDS
from launcher.jobs import Job, holder, queue
from launcher.task import Training
from t5vae.common.errors import UserError
from t5vae.common.links import refuse_links
from t5vae.config import Config, load_config, read_values, refuse_choices

BASE_FILES = ["*.json", "*.model", "*.txt"]


def sweep(
    path: str | Path, overrides: list[str], axes: list[str], settings: dict[str, Any]
) -> list[Config]:
    """The configurations of a sweep: every combination of the values of its axes.

    Each has a run folder of its own in the folder that the configuration names.

    Args:
        path: of the configuration.
        overrides: for all of them.
        axes: `dotted.key=value,value,...`, each.
        settings: as `load_config` takes them, for all of them.

    Raises:
        UserError: as `load_config`; or for an axis without values.
    """
    choices = []
    for axis in axes:
        key, _, text = axis.partition("=")
        try:
            values = read_values(text, key)
        except (ValueError, RecursionError, yaml.YAMLError):
            values = []
        if not values or key.startswith(("launcher.", "run.name", "run.output_dir")):
            raise UserError(f"{axis!r} is not a sweep; write section.key=value,value,...")
        choices.append([(key, value) for value in values])
    base = load_config(path, overrides, settings)
    found = []
    for combination in itertools.product(*choices):
        parts = (f"{key.rpartition('.')[2]}={value}" for key, value in combination)
        label = re.sub("[/$]", "_", ",".join(parts))
        own = {
            **dict(combination),
            "run.name": f"{base.run.name}-{label}",
            "run.output_dir": str(base.run_dir / label),
        }
        found.append(load_config(path, overrides, {**settings, **own}))
    if len({config.run_dir for config in found}) < len(found):
        raise UserError("two runs of the sweep would share a folder: name each value once")
    return found


def submit(configs: list[Config], cluster: str, folder: Path, *, force: bool = False) -> list[Job]:
    """Check configurations and queue their training; several become a job array.

    Args:
        configs: of runs that differ in nothing that the launcher section says.
        cluster: a name in `BACKENDS`.
        folder: of the backend's files and the logs.
        force: queue a run that a live job holds too, to start once that has ended.

    Raises:
        UserError: what training would refuse, before anything is queued; a run folder that a live
            job holds; what the backend refuses; or a folder that cannot be written.
    """
    BACKENDS[cluster].require()
    for config in configs:
        check(config)
    after = _wait_for(configs, cluster, force)
    new = [config.run_dir for config in configs if not config.run_dir.exists()]
    try:
        tasks = [Training(make_ready(config), cluster) for config in configs]
        return queue(tasks, cluster, folder, after)
    except (UserError, OSError) as error:
        for run in new:
            shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write the run's folder: {error}") from None
        raise


def check(config: Config) -> None:
    """Refuse what training would refuse, as far as that can be told without a compute node.

    Raises:
        UserError: for shards that are missing, a batch that cannot be dealt to the ranks, or what
            is not a run's to choose.
    """
    refuse_choices(config, "data", "deepspeed", "eval", "launcher")
    config.data.open()
    config.data.split(config.launcher.nodes * ranks_per_node(config))


def _wait_for(configs: list[Config], cluster: str, force: bool) -> list[str]:
    """Ids of the backend's jobs that hold the runs' folders."""
    holders = [job for config in configs if (job := holder(config.run_dir))]
    if holders and not force:
        job = holders[0]
        raise UserError(
            f"{job.run} is held by job {job.id}: cancel it, choose another run.output_dir, or "
            "queue this to start after it with --force"
        )
    return [job.id for job in holders if job.cluster == cluster]


def make_ready(config: Config) -> Config:
    """Put into the run's folder what a compute node without internet cannot fetch.

    That is a base named on Hugging Face, its weights and tokenizer; and the whole configuration,
    where training has not written it yet. The shards hold their own tokenizer.

    Raises:
        UserError: if the base cannot be had.
    """
    base = config.model.base
    config.run_dir.mkdir(parents=True, exist_ok=True)
    refuse_links(config.run_dir)
    if base is not None and not Path(base).exists():
        here = config.run_dir / "base"
        if not here.exists():
            shutil.copytree(_download(base), here)
        model = config.model.model_copy(update={"base": str(here)})
        config = config.model_copy(update={"model": model})
    if not (config.run_dir / "checkpoints").exists():
        config.write()
    return config


def _download(base: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(base, allow_patterns=[*BASE_FILES, "*.safetensors"])
        if not any(Path(path).glob("*.safetensors")):
            path = snapshot_download(base, allow_patterns=[*BASE_FILES, "*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot download model.base {base!r}: give a folder with a pretrained T5, or a "
            f"Hugging Face name ({reason})"
        ) from None
    return path
