"""One process of a training run: signals, arguments, errors; the heavy imports come last."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from t5vae.cluster.errors import FailedTogetherError, asks_again, judge
from t5vae.cluster.ranks import ends_together, find_ranks
from t5vae.cluster.scheduler import is_first_of_host, queue_again
from t5vae.cluster.stopping import StopRequest, signals_come_too_late
from t5vae.common.errors import StorageError, UserError, check_arguments, printable
from t5vae.common.storage import limit_patience
from t5vae.config import Config, load_config, refuse_choices

DEFAULT_CONFIG = "quickstart"
PATIENCE = 60  # seconds in which a launcher ends the other ranks, once one has told what is wrong
USAGE = """Train a T5-VAE: deepspeed train.py [CONFIG] [section.key=value ...] [--debug]

CONFIG is a YAML file, or a name that `t5vae config ls` lists, by default quickstart.
python, torchrun and srun start train.py too.
Example: deepspeed train.py quickstart train.steps=100 run.output_dir=runs/short
`t5vae config schema` lists the keys, `t5vae config show CONFIG` what follows from them."""


def main(arguments: list[str]) -> int:
    """`train.py [CONFIG] [dotted.key=value ...] [--debug]`; returns the exit code.

    See `exit_code_of`; with --debug the traceback of a user's mistake is shown.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    debug = "--debug" in arguments
    given = [each for each in _without_local_rank(arguments) if each != "--debug"]
    path = given.pop(0) if given and "=" not in given[0] else DEFAULT_CONFIG

    def work() -> None:
        check_arguments(arguments)
        train(load_config(path, given))

    return exit_code_of(work, debug=debug)


def _without_local_rank(arguments: list[str]) -> Iterator[str]:
    """Without what launchers add: --local_rank=N or --local-rank N. The environment says it too."""
    left = iter(arguments)
    for each in left:
        name, _, number = each.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            yield each
        elif not number:
            next(left, None)


def exit_code_of(work: Callable[[], None], *, debug: bool = False) -> int:
    """Do some work of a rank; what goes wrong is told in one line, and by an exit code.

    Once ranks have met, rank 0 tells it for all of them; before that local rank 0, or others where
    that says nothing.

    Args:
        work: as `train`.
        debug: show a traceback too.

    Returns:
        0: done, or told to stop and saved. 1: a rank was lost, storage failed for minutes, or a
        fault of the program. 2: something for the user to mend. 75: the job's script is to queue
        it again. 130: a second Ctrl-C.
    """
    try:
        work()
    except FailedTogetherError as error:
        if debug:
            traceback.print_exc()
        return error.code
    except (UserError, StorageError, OSError) as error:
        verdict = judge(error)
        if verdict.fault:
            raise
        if debug:
            traceback.print_exc()
        if is_first_of_host(os.environ) or not _is_told_by_another():
            print(f"error: {printable(verdict.text)}", file=sys.stderr)
        if verdict.requeue and asks_again(error):
            queue_again()
        return verdict.code
    finally:
        signals_come_too_late()
    return 0


def _is_told_by_another() -> bool:
    """Wait for local rank 0 to tell what is wrong; whether it has, as far as can be known.

    A rank that ends at once makes a launcher end the others, local rank 0 before it has spoken.
    """
    if not ends_together(os.environ):
        return True
    stop = StopRequest()
    stop.install()
    end = time.monotonic() + PATIENCE
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.05)
    return stop.requested


def train(config: Config) -> None:
    """Train in this process, as the rank that its environment names.

    Raises:
        UserError: before the ranks have met, or in a process alone: see `t5vae.training.loop.run`.
        StorageError: the same.
        FailedTogetherError: on every rank, whatever went wrong on any.
    """
    refuse_choices(config, "data", "deepspeed", "eval")
    stop = StopRequest()
    stop.install()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store warns of every end
    from t5vae.cluster.process_group import leave_process_group, require_address
    from t5vae.cluster.together import Together
    from t5vae.training.loop import run

    ranks, timeout = find_ranks(dict(os.environ)), config.train.timeout
    require_address(ranks)
    limit_patience(timeout / 2)  # so that the other ranks outwait it
    try:
        with Together(ranks, config.run_dir, timeout, stop.lets_requeue) as together:
            run(config, together, stop)
    except (UserError, StorageError) as error:
        leave_process_group()  # gloo's threads abort a process that ends without it
        if isinstance(error, StorageError):
            error.requeue = stop.lets_requeue()
        raise
