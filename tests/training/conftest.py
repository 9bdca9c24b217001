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
from tests.training.interrupted import (  # noqa: F401
    copy_of,
    golden,
    golden_run,
    start,
    start_two,
    write_config,
)
from tests.training.many_runs import short_dataset  # noqa: F401
