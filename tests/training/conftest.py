"""Small runs, for tests of training."""

from tests.small_runs import (  # noqa: F401
    damaged_dataset,
    dataset,
    make_config,
    make_engine,
    other_dataset,
    python_lines,
    save,
    together,
)
