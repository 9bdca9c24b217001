"""The README's first command, twice: the second time all is found done."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = "train.steps=60 eval.sequences=200 eval.samples=200 eval.interpolations=10"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_make_train_does_nothing_twice(tmp_path):
    make = ["make", "-C", ROOT, "train", f"RUN={tmp_path / 'run'}", f"SET={SMALL}"]
    for already in (0, 1):
        done = subprocess.run(make, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        for what in ("trained", "exported", "evaluated"):
            assert done.stdout.count(f"already {what}") == already
    assert "already built" in done.stdout
