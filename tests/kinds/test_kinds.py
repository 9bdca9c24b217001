"""Kinds from outside the package: each is a class and a line in its table, and nothing else.

A researcher's own file has a format of corpora, a bottleneck, a term, an optimiser, a prior and a
backend that starts jobs; its run is built, submitted, trained for three steps and sampled from.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from t5vae.common.kinds import BOTTLENECKS, OPTIMISERS, PRIORS, TERMS, find
from t5vae.metrics.reading import read_metrics
from tests.launching import environment

MINE = Path(__file__).with_name("toy_kinds.py")


@pytest.mark.parametrize("table", [BOTTLENECKS, OPTIMISERS, PRIORS, TERMS])
def test_every_line_of_a_table_is_found(table):
    assert all(isinstance(find(table, name), type) for name in table)


@pytest.mark.distributed
def test_kinds_from_outside_are_built_with_submitted_trained_and_sampled_from(tmp_path):
    (tmp_path / "pairs.pair").write_text("".join(f"{i}|x = {i % 9} + {i}\n" for i in range(200)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import toy_kinds; toy_kinds.main()"],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(MINE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_metrics(tmp_path / "runs/toy")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        sequences_a_token = line["nats_per_token"] / line["nats_per_sequence"]
        total = line["reconstruction"] + 30 * line["mmd"] + line["spread"] * sequences_a_token
        assert line["loss"] == pytest.approx(total)
        assert line["spread"] > 0
    assert done.stdout.splitlines()[-1] == "3 texts"
