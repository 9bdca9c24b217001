"""What libraries say goes to a file, not between the lines for people."""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from t5vae.common.storage import patiently


def log_file_of(run: Path, rank: int) -> Path:
    """A rank's file in a run's folder."""
    return run / "logs" / f"rank-{rank:05d}.log"


@contextlib.contextmanager
def quiet_start(log_file: Path) -> Iterator[None]:
    """Send what DeepSpeed, torch and gloo say while they start to a file instead of the terminal.

    File descriptors 1 and 2 are redirected: some of it is printed by C++. An error still surfaces,
    since it is raised, not printed.
    """
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with patiently(lambda: open(log_file, "a"), str(log_file)) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def log_libraries_to(log_file: Path) -> None:
    """Send what libraries log from now on to a file, at every level they chose."""
    logging.raiseExceptions = False  # what cannot be written is not worth a traceback each time
    handler = patiently(lambda: logging.FileHandler(log_file), str(log_file))
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("DeepSpeed", "py.warnings", "shards", "transformers", "torch.distributed"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
