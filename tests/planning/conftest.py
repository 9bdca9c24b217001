"""Small runs, to be planned."""

from tests.small_runs import (  # noqa: F401
    dataset,
    make_config,
    python_lines,
)
