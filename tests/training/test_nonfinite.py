"""Steps whose loss or gradient is not finite, on one rank of two."""

import re
from itertools import product

import pytest

from t5vae.checkpoint import retention
from t5vae.checkpoint.manifest import verify
from tests.training.many_runs import BATCH, STAGES, Folder, settings_of

pytestmark = pytest.mark.distributed

POISON_STEPS, POISON_STOP = 8, 7
POISONED = {
    f"zero {stage}, {optimizer}, {precision}, accumulation {micro_batches}": {
        **settings_of(stage, optimizer, precision),
        "data.micro_batch_size": BATCH // (2 * micro_batches),
        "train.steps": POISON_STEPS,
    }
    for stage, optimizer, precision in product(STAGES, ("adamw", "muon"), ("fp32", "bf16"))
    for micro_batches in [1 + ((optimizer == "adamw") == (precision == "fp32"))]
}
BAD_RANK = {2: 1, 3: 0, 5: 1, 6: 0}  # by step
ASYNCHRONOUS = {"checkpoint.asynchronous": True, "checkpoint.every": 1}
OVER = {
    "zero 0, adamw, fp32": settings_of(0, "adamw", "fp32"),
    "zero 1, muon, bf16": settings_of(1, "muon", "bf16", **ASYNCHRONOUS),
    "zero 3, adamw, bf16": settings_of(3, "adamw", "bf16", **{"data.micro_batch_size": 9}),
}
OVER_EVERY, LIMIT = 3, 3


@pytest.fixture(scope="module")
def poisoned(short_dataset, tmp_path_factory) -> Folder:
    """Runs with steps that are not finite, and gone on with; others with no other step."""
    folder = Folder(tmp_path_factory.mktemp("poisoned"))
    first, second = [], []
    for name, settings in POISONED.items():
        last = 1 if "accumulation 2" in name else 0
        kinds = {2: ("nan", 0), 3: ("inf", last), 5: ("latent", last), 6: ("gradient", last)}
        poison = {step: (kind, BAD_RANK[step], micro) for step, (kind, micro) in kinds.items()}
        options = {"stop_at": POISON_STOP, "poison": poison}
        first.append(folder.run(f"{name}.first", name, settings, **options))
        if not last:
            second.append(folder.run(f"{name}.second", name, settings))
    for name, own in OVER.items():
        settings = {
            "train.steps": POISON_STEPS,
            "train.max_bad_steps": LIMIT,
            "checkpoint.every": OVER_EVERY,
            **own,
        }
        poison = {step: ("nan", 1, 0) for step in range(4, POISON_STEPS + 1)}
        first.append(folder.run(f"{name}.first", name, settings, poison=poison))
        second.append(folder.run(f"{name}.second", name, settings))
    folder.start(short_dataset, [(2, first), (2, second)])
    return folder


@pytest.mark.parametrize("name", POISONED)
def test_a_step_that_is_not_finite_on_one_rank_changes_no_rank(poisoned, name):
    for rank in poisoned.seen(f"{name}.first"):
        assert rank["error"] is None
        for step in range(1, POISON_STOP):
            for what in ("weights", "moments"):
                if step == 6 and what == "moments" and "zero 3, muon" in name:
                    continue  # DeepSpeed moves the momentum of other matrices than the poisoned
                before, after = rank[what][str(step)], rank[what][str(step + 1)]
                assert (before == after) == (step in BAD_RANK), (step, what)


@pytest.mark.parametrize("name", POISONED)
def test_steps_that_are_not_finite_are_counted_and_the_count_goes_on(poisoned, name):
    lines = poisoned.metrics(name)
    steps = POISON_STOP if "accumulation 2" in name else POISON_STEPS
    assert [line["consumed"] for line in lines] == [BATCH * n for n in range(1, steps + 1)]
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 4][:steps]
    assert [line["nonfinite"] for line in lines] == [0, 1, 2, 2, 3, 3, 3, 3][:steps]
    lost = [line["step"] for line in lines if line["loss"] is None]
    assert lost == [2, 3, 5]  # at step 6 the gradient alone is not finite


@pytest.mark.parametrize("name", POISONED)
def test_steps_that_are_not_finite_are_told_with_rank_and_position(poisoned, name):
    output = poisoned.seen(f"{name}.first")[0]["output"]
    told = [line for line in output.splitlines() if "skipped" in line]
    whose = {step: f"the loss of rank {rank}" for step, rank in BAD_RANK.items()}
    whose[6] = "the gradient"
    assert told == [
        f"step {step}: {what} is not finite: skipped (the batch from position {BATCH * (step - 1)})"
        for step, what in whose.items()
    ]


@pytest.mark.parametrize("name", OVER)
def test_too_many_bad_steps_end_the_run_on_all_ranks_with_the_command_that_shows_the_batch(
    poisoned, short_dataset, name
):
    errors = [rank["error"] for rank in poisoned.seen(f"{name}.first")]
    assert errors[0] == errors[1]
    assert "3 steps in a row went wrong; step 6: the loss of rank 1 is not finite" in errors[0]
    position = BATCH * 5
    replay = f"t5vae shards inspect {short_dataset} --position={position} --batch={BATCH} --seed=0"
    assert replay in errors[0]


@pytest.mark.parametrize("name", OVER)
def test_a_run_ended_by_bad_steps_saves_none_of_the_last_and_goes_on_from_what_is_there(
    poisoned, name
):
    second = poisoned.seen(f"{name}.second")[0]
    assert second["error"] is None
    assert "damaged" not in second["output"]
    newest = (
        {4, 5} if "checkpoint.asynchronous" in OVER[name] else {3}
    )  # asynchronous: the last may not be committed
    assert int(re.search(r"resuming from .+/step-(\d+)", second["output"])[1]) in newest
    lines = poisoned.metrics(name)
    assert [line["step"] for line in lines] == list(range(1, POISON_STEPS + 1))
    assert all(line["loss"] is not None for line in lines[-3:])
    for saved in retention.list_checkpoints(poisoned.path / name / "checkpoints"):
        assert verify(saved) is None
