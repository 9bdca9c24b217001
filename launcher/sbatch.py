"""A job script for plain `sbatch`: slurm/train.sh, with the options of a configuration."""

import shlex
import sys

from launcher.slurm import TEMPLATE, options
from t5vae.config import Config

FILLED_IN = "options=(--kill-on-bad-exit=1)\ncommand=(python -u -P -m t5vae train)\nwarning=120\n"
SBATCH_OPTIONS = (
    *("job_name", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "time"),
    *("partition", "account", "qos", "constraint", "exclude", "gres", "mem"),
    *("mail_user", "mail_type"),
)


def job_script(config: Config, arguments: list[str]) -> str:
    """The script that trains a configuration, with the environment of this very Python.

    Args:
        config: its `launcher` section says what the job asks for.
        arguments: of `t5vae train`: where the configuration is, and its overrides.

    Raises:
        UserError: see `launcher.slurm.options`.
    """
    place, settings = config.launcher, options([config], [])
    asked = {key: settings[key] for key in SBATCH_OPTIONS if key in settings}
    asked |= settings["additional_parameters"]
    asked |= {"open-mode": "append", "signal": f"USR2@{place.signal_delay}"}
    header = [
        "#!/bin/bash",
        "# By `t5vae-launch script`. Queue it with `sbatch THIS_FILE [key=value ...]`; options of",
        "# sbatch, before the file, win over the lines below.",
        *(_directive(key, value) for key, value in asked.items()),
    ]
    own = [
        f"T5VAE_ENV=${{T5VAE_ENV:-{shlex.quote(sys.prefix)}}}",
        *place.setup,
        f"options=({shlex.join(['--kill-on-bad-exit=1', *place.srun_args])})",
        f"command=({place.python or 'python'} -u -P -m t5vae train {shlex.join(arguments)})",
        f"warning={place.signal_delay}",
    ]
    head, body = TEMPLATE.read_text().split(FILLED_IN)
    refusal = head.partition("\n\n")[2]
    return "\n".join([*header, "", refusal + own[0], *own[1:], body])


def _directive(key: str, value: object) -> str:
    option = f"#SBATCH --{key.replace('_', '-')}"
    text = " ".join(str(value).split())  # a line of its own would be run
    return option if value is True else f"{option}={shlex.quote(text)}"
