"""What a run finds out about its space; the ranks are threads of this process."""

import math
import random
import signal
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from t5vae.evaluation import GivenTraining, evaluate
from t5vae.evaluation.geometry import FIGURES
from t5vae.latent import LatentSpace
from t5vae.latent.codec import Codec
from t5vae.metrics.reading import read_metrics
from t5vae.training import midrun
from t5vae.training.build import build_model, model_config
from t5vae.training.midrun import STEPS, GivenUpError, MidRunEvaluation
from tests.launching import lines_written, run_of, steps_saved


@pytest.fixture
def model(make_config):
    """A model with random weights, in training mode, with dropout."""
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = {"t5": {**t5, "dropout_rate": 0.3}, "latent_size": 8, "token_size": 4}
    config = make_config(model=model, eval={"every": 1, "sequences": 30, "decoded": 20})
    dataset = config.data.open()
    settings = model_config(config.model, config.objective, dataset)
    built = build_model(settings, config.model, seed=0, half=False, device=torch.device("cpu"))
    return SimpleNamespace(settings=config.eval, dataset=dataset, engine=built.train())


@pytest.fixture
def look(model, together, monkeypatch):
    """What so many ranks find."""

    def find(world: int, told=lambda rank: False, **changes):
        ranks = together(world)
        monkeypatch.setattr(midrun, "dist", ranks)
        engine = SimpleNamespace(
            module=model.engine,
            eval=model.engine.eval,
            train=model.engine.train,
            zero_optimization_stage=lambda: 0,
        )
        settings = model.settings.model_copy(update=changes)
        evaluation = MidRunEvaluation(
            engine, model.dataset, settings, lambda: told(ranks.get_rank())
        )
        evaluation.space.batch_size = 8
        return [done.result() for done in ranks.run(lambda rank: evaluation.look())]

    return find


def test_it_measures_what_evaluate_measures(model, look):
    (found,) = look(1)
    space = LatentSpace(model.engine, model.dataset.tokenizer())
    ids_NT, lengths_N = model.dataset.read("valid", model.dataset.first("valid", 30))
    ids = [row[:n].tolist() for row, n in zip(ids_NT, lengths_N, strict=True)]
    report = evaluate(space, valid_ids=ids, training=GivenTraining(ids, ["x"]), samples=20)
    for name in ("nats_per_token", "mmd", "epps_pulley_axes", "participation_ratio"):
        assert found.figures[f"eval/{name}"] == pytest.approx(report[name], rel=1e-5), name
    assert found.held_out == found.figures["eval/nats_per_token"]
    assert found.figures["eval/active_dimensions"] == report["active_dimensions"]
    assert "eval/valid" not in found.figures


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_and_find_what_one_finds(look, world):
    (alone,) = look(1)
    for found in look(world):
        assert found.tables == alone.tables
        assert found.figures.keys() == alone.figures.keys()
        for name, value in found.figures.items():
            if name != "eval/seconds":
                assert value == pytest.approx(alone.figures[name], rel=1e-4, abs=1e-6), name


def test_with_a_checker_it_says_what_is_valid(look):
    (found,) = look(1, check="regex:.*")
    for name in ("valid", "interpolation_validity"):
        assert found.figures[f"eval/{name}"] == 1
    assert "valid 1.000" in str(found)


def test_the_texts_are_those_of_the_figures(model, look):
    (found,) = look(1)
    pairs = found.tables["reconstructions"]
    held_out = model.dataset.texts("valid", model.dataset.first("valid", 20))
    assert [pair["text"] for pair in pairs] == held_out
    exact = sum(pair["text"] == pair["reconstruction"] for pair in pairs) / len(pairs)
    assert found.figures["eval/exact_match"] == exact
    assert len(found.tables["samples"]) == 20
    steps = found.tables["interpolations"]
    assert [row["path"] for row in steps] == [0] * STEPS + [1] * STEPS
    assert [steps[0]["share"], steps[STEPS - 1]["share"]] == [0, 1]
    # A path begins at a held-out sequence's own code.
    assert steps[0]["text"] == pairs[0]["reconstruction"]


@pytest.mark.parametrize(
    ("world", "rows", "value"),
    [
        (1, {0}, math.nan),
        (2, {1}, math.inf),
        (3, {2, 25}, -math.inf),
        (3, {29}, math.nan),
        (2, set(range(30)), math.nan),
    ],
)
def test_codes_that_are_not_finite_cost_figures_and_no_run(
    look, model, monkeypatch, value, world, rows
):
    encode = Codec.encode_ids
    ids_NT, lengths_N = model.dataset.read("valid", model.dataset.first("valid", 30))
    poisoned = [ids_NT[row][: lengths_N[row]].tolist() for row in rows]

    def encode_some(space, ids):
        z_ND = encode(space, ids)
        z_ND[[row for row, each in enumerate(ids) if list(each) in poisoned], 3] = value
        return z_ND

    (whole,) = look(1)
    monkeypatch.setattr(Codec, "encode_ids", encode_some)
    for found in look(world):
        figures = {name.removeprefix("eval/"): of for name, of in found.figures.items()}
        assert found.figures.keys() == whole.figures.keys()
        for name in ("nats_per_token", "shuffled_gap", *FIGURES):
            assert not math.isfinite(figures[name]), name
        assert found.held_out is None
        assert found.tables["samples"] == whole.tables["samples"]
        texts = [
            [pair["reconstruction"] for pair in each.tables["reconstructions"]]
            for each in (found, whole)
        ]
        assert len(texts[0]) == 20
        same = [row for row in range(20) if row not in rows]
        assert [texts[0][row] for row in same] == [texts[1][row] for row in same]
    assert all(module.training for module in model.engine.modules())


@pytest.mark.parametrize(
    ("world", "error", "told"),
    [
        (1, ZeroDivisionError("by\nzero"), "ZeroDivisionError: by"),
        (1, SystemExit(3), "SystemExit: 3"),
        (2, RecursionError(), "RecursionError: RecursionError"),
    ],
)
def test_a_text_that_a_checker_fails_on_is_not_valid(look, monkeypatch, error, told, world):
    def is_odd(text):
        return zlib.crc32(text.encode()) % 2

    def check(text):
        if is_odd(text):
            raise error
        return True

    monkeypatch.setattr(midrun, "checker", lambda name: check)
    for found in look(world, check="json"):
        texts = [
            row["text"] for name in ("samples", "interpolations") for row in found.tables[name]
        ]
        odd = list(map(is_odd, texts))
        assert 0 < sum(odd) < len(odd)
        assert found.figures["eval/valid"] == 1 - sum(odd[:20]) / 20
        assert found.figures["eval/interpolation_validity"] == 1 - sum(odd[20:]) / 16
        assert str(found).endswith(f", eval.check failed on {sum(odd)} ({told})")


def drawn(before=lambda: None):
    """What the generators give after something."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before()
    return random.random(), np.random.random(), torch.rand(1).item()


def test_generators_and_the_models_mode_are_left_alone(look, model):
    assert drawn(lambda: look(1, check="regex:.*")) == drawn()
    assert all(module.training for module in model.engine.modules())


@pytest.mark.parametrize("world", [1, 2])
def test_all_ranks_give_up_at_the_batch_before_which_one_is_told_to_stop(look, model, world):
    asked = [0] * world

    def told(rank, after=10**9):
        asked[rank] += 1
        return rank == world - 1 and asked[rank] > after

    look(world, told)
    (batches,) = set(asked)
    assert batches > 3 * 3  # of some calls more than one
    for after in range(batches):
        asked[:] = [0] * world

        def give_up(after=after):
            with pytest.raises(GivenUpError):
                look(world, lambda rank: told(rank, after))

        assert drawn(give_up) == drawn()
        assert asked == [after + 1] * world
        assert all(module.training for module in model.engine.modules())
    asked[:] = [0] * world
    look(world, lambda rank: told(rank, batches))


@pytest.mark.distributed
def test_a_run_that_is_told_to_stop_while_it_evaluates_saves_and_goes_on_as_ever(
    start, write_config
):
    """The evaluation after step 3 would take minutes."""
    settings = write_config(6, eval={"every": 3, "decoded": 4}, checkpoint={"every": 0})
    long = write_config(6, eval={"every": 3, "decoded": 300_000}, checkpoint={"every": 0})
    whole = start(2, settings)
    told = start(2, long)
    told.wait_until(lambda: lines_written(run_of(long)) == 2)
    time.sleep(1)
    told.send(signal.SIGTERM, 1)
    assert told.end() == [0, 0], told.output()
    assert steps_saved(run_of(long)) == [3]
    last = read_metrics(run_of(long))[-1]
    assert last["step"] == 3
    assert not [name for name in last if name.startswith("eval/")]
    again = start(2, long, "eval.decoded=4")
    assert again.end() == whole.end() == [0, 0], again.output()
    losses = [
        [line["loss"] for line in read_metrics(run_of(config))] for config in (settings, long)
    ]
    assert losses[0] == losses[1]
    assert "eval/nats_per_token" in read_metrics(run_of(long))[-1]
