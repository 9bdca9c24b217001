"""One process of a training run: signals, arguments, errors; the heavy imports come last."""

import os
import signal
import sys
import traceback

from shards.errors import DISK_FULL, UserError
from t5vae.config import Config, load_config
from t5vae.training.preemption import StopRequest

DEFAULT_CONFIG = "configs/quickstart.yaml"
USAGE = """Train a T5-VAE: deepspeed train.py [CONFIG] [section.key=value ...] [--debug]

CONFIG defaults to configs/quickstart.yaml; python, torchrun and srun start train.py too.
Example: deepspeed train.py configs/quickstart.yaml train.steps=100 run.output_dir=runs/short
`t5vae config schema` lists the keys, `t5vae config show CONFIG` what follows from them."""


def main(arguments: list[str]) -> int:
    """`train.py [CONFIG] [dotted.key=value ...] [--debug]`; returns the exit code.

    0: done, or told to stop and saved. 1: a rank was lost, or a fault of the program. 2: something
    for the user to mend, in one line from local rank 0; with --debug the traceback is shown. 130: a
    second Ctrl-C.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    debug = "--debug" in arguments
    # The deepspeed launcher appends --local_rank=N; the environment says the same.
    given = [a for a in arguments if a != "--debug" and not a.startswith("--local_rank")]
    path = given.pop(0) if given and "=" not in given[0] else DEFAULT_CONFIG
    try:
        train(load_config(path, given))
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        if debug:
            traceback.print_exc()
        elif os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        # A launcher that sees another rank end first must not change this one's exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return 2
    except LostRankError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class LostRankError(Exception):
    """Another process of the run ended, or does not answer."""


def train(config: Config) -> None:
    """Train in this process, as the rank that its environment names.

    Raises:
        UserError: see `t5vae.training.loop.run`.
        LostRankError: where a collective failed for want of a rank.
    """
    stop = StopRequest()
    stop.install()
    from t5vae.training.distributed import find_ranks, leave_process_group, lost_ranks
    from t5vae.training.loop import run

    ranks = find_ranks(dict(os.environ))
    try:
        run(config, ranks, stop)
    except UserError:
        leave_process_group()  # gloo's threads abort a process that ends without it
        raise
    except RuntimeError as error:
        lost = lost_ranks(ranks) if ranks.world_size > 1 else []
        if not lost:
            raise
        names = ", ".join(map(str, lost))
        raise LostRankError(
            f"rank {names} of {ranks.world_size} is lost: it ended, or did not answer in time; the "
            "same command goes on from the newest checkpoint"
        ) from error
