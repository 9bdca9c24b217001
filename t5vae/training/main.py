"""One process of a training run: signals, arguments, errors; the heavy imports come last."""

import os
import signal
import sys
import traceback

from shards.errors import UserError
from t5vae.config import Config, load_config
from t5vae.training.preemption import StopRequest

DEFAULT_CONFIG = "configs/quickstart.yaml"


def main(arguments: list[str]) -> int:
    """`train.py [CONFIG] [dotted.key=value ...] [--debug]`; returns the exit code.

    A user's mistake is one line from local rank 0 and 2; with --debug the traceback is shown.
    """
    debug = "--debug" in arguments
    # The deepspeed launcher appends --local_rank=N; the environment says the same.
    given = [a for a in arguments if a != "--debug" and not a.startswith("--local_rank")]
    path = given.pop(0) if given and "=" not in given[0] else DEFAULT_CONFIG
    try:
        train(load_config(path, given))
    except UserError as error:
        if debug:
            traceback.print_exc()
        elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        # A launcher that sees another rank end first must not change this one's exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 2
    return 0


def train(config: Config) -> None:
    """Train in this process, as the rank that its environment names.

    Raises:
        UserError: see `t5vae.training.loop.run`.
    """
    stop = StopRequest()
    stop.install()
    from t5vae.training.distributed import find_ranks
    from t5vae.training.loop import run

    run(config, find_ranks(dict(os.environ)), stop)
