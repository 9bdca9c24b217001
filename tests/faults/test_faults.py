"""Every place where a rank touches storage or a socket once ranks have met, made to fail.

Two ranks go on from half of a run, with a library between them and the system that makes calls fail
(faults.c); the table is places.py. Cases run a few at a time, since most of their time is waiting.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from t5vae.checkpoint.manifest import verify
from t5vae.checkpoint.retention import list_checkpoints
from t5vae.cluster.scheduler import host_name
from t5vae.common.cpus import cpus
from tests.faults.conftest import HALF, TIMEOUT, Trial, going_on
from tests.faults.places import ALL_CASES, HANG, PLACES, SHORT, Case, some_of_each
from tests.launching import exact_metrics

pytestmark = pytest.mark.distributed

OFTEN = some_of_each()  # by `make test`; a third of those that end is started again
AT_ONCE = 4
WITHIN = 15  # seconds on free cores until all have ended, once one has failed or did not answer
GUARD = 90  # seconds until a rank that never ends is given up


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        codes: exit codes of the ranks; None of one that had to be killed.
        seconds: from the first call that failed until all had ended.
        load: of each core then, other cases included.
        checkpoints: what is wrong with each that was there then, by name; None where it is whole.
        again: the next start of a run that ended too early, where it was started.
    """

    trial: Trial
    codes: list[int | None]
    seconds: float
    load: float
    checkpoints: dict[str, str | None]
    again: Trial | None
    metrics: list[str]


@pytest.fixture(scope="module")
def outcomes(request, golden, try_out, tmp_path_factory) -> Iterator[dict[str, Future[Outcome]]]:
    """What becomes of each case that is asked for, by its name; all of them start here."""

    def try_case(case: Case) -> Outcome:
        run = tmp_path_factory.mktemp("case") / "run"
        shutil.copytree(golden.half, run)
        trial = try_out(golden.config, *going_on(run), faults=[case.asked()])
        codes = trial.end(GUARD)
        failed = trial.failed()
        seconds = trial.ended() - failed if failed else 0.0
        load = os.getloadavg()[0] / cpus()
        checkpoints = {path.name: verify(path) for path in list_checkpoints(run / "checkpoints")}
        again = None
        if codes != [0, 0] and (case not in OFTEN or case in OFTEN[::3]):
            again = try_out(golden.config, *going_on(run))
            again.end(GUARD)
        return Outcome(trial, codes, seconds, load, checkpoints, again, exact_metrics(run))

    asked = [item.callspec.params["case"] for item in request.session.items if _is_case(item)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield {str(case): threads.submit(try_case, case) for case in asked}
        threads.shutdown(cancel_futures=True)


def _is_case(item: pytest.Item) -> bool:
    return item.path == Path(__file__) and "case" in getattr(item, "fixturenames", ())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if case in OFTEN else pytest.mark.soak)
        for case in ALL_CASES
    ],
)
def test_a_fault_ends_all_ranks_alike_or_none(outcomes, golden, case):
    outcome = outcomes[str(case)].result()
    output, told = outcome.trial.output(), outcome.trial.errors()
    assert outcome.trial.failed(), f"no such call was made\n{output}"
    if case.end.code is None:
        assert set(outcome.codes) <= {0, 1}, output
    else:
        assert outcome.codes == [case.end.code] * 2, output
    assert "Traceback" not in output
    bad = max(outcome.codes) > 0
    assert bad <= len(told) <= case.end.lines * bad, output
    assert set(outcome.checkpoints.values()) == {None}
    assert max(outcome.checkpoints) >= f"step-{HALF:08d}"
    if told and case.rank and not case.place.path.startswith("socket:"):
        assert f"rank {case.rank} " in told[0]
        assert host_name() in told[0]
    if told:
        assert case.end.says.format(rank=case.rank, host=host_name()) in told[0]
        limit = WITHIN + (TIMEOUT if case.fault == HANG else 0)
        assert outcome.seconds < limit * max(1, outcome.load)
    if outcome.again:
        assert outcome.again.end() == [0, 0], outcome.again.output()
    if case.end == SHORT:
        assert SHORT.says in output
        assert outcome.metrics == exact_metrics(golden.run)[: len(outcome.metrics)]
    elif outcome.again or outcome.codes == [0, 0]:
        assert outcome.metrics == exact_metrics(golden.run)


def test_the_table_holds_every_call_that_a_run_makes(golden):
    made = {
        # The thread that reads ahead does so in whatever phase the rank is.
        (rank, "step" if "/train-" in call.path else call.phase, call.operation, call.path)
        for trial in golden.trials
        for rank in (0, 1)
        for call in trial.calls(rank)
        if call.phase != "before" and _is_watched(f"{call.path}/")
    }
    assert {call for call in made if not any(place.holds(*call) for place in PLACES)} == set()
    idle = [case for case in ALL_CASES if not any(case.is_met_by(*call) for call in made)]
    assert {str(case) for case in idle} == set()


def _is_watched(path: str) -> bool:
    """Whether it is of the run or its dataset; the program's own files and /proc are not."""
    return any(part in path for part in ("/run/", "/dataset/", "socket:"))
