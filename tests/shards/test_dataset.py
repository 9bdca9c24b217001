import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards
from shards import open_dataset
from shards.read.dataset import CYCLE, Mixing
from t5vae.common.errors import UserError


@pytest.fixture(scope="module")
def second(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    (folder / "lines.txt").write_text("\n".join(f"call({i})" for i in range(50)))
    options = {"tokenizer": dataset / "tokenizer", "max_length": 12, "valid_fraction": 0.3}
    shards.build(folder / "lines.txt", folder / "data", **options)
    return folder / "data"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 10**9))
def test_a_mixture_is_exact_in_each_cycle_and_even_within(quotas, position):
    cycle = sum(quotas)
    taken = Mixing(quotas).taken(np.arange(position, position + cycle + 1))
    assert (taken[-1] - taken[0]).tolist() == quotas
    assert (np.diff(taken, axis=0).sum(1) == 1).all()
    expected = np.outer(np.arange(position, position + cycle + 1), quotas) / cycle
    assert np.abs(taken - expected).max() <= len(quotas)


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [((1, 1), (1, 1)), ((0.25, 0.75), (1, 3)), ((3, 0.5), (6, 1)), ((1, 1e-7), (CYCLE, 1))],
)
def test_weights_become_small_integers(dataset, second, weights, quotas):
    entries = [
        {"path": path, "weight": weight}
        for path, weight in zip((dataset, second), weights, strict=True)
    ]
    mixed = open_dataset(entries)
    assert np.allclose(np.divide(*mixed.quotas), np.divide(*quotas))


def test_one_folder_is_as_it_is_alone(dataset):
    index, alone = shards.open_index(dataset), open_dataset(dataset)
    assert (alone.sha256, alone.path) == (index.sha256, str(dataset))
    numbers = alone.first("valid", 20)
    assert numbers.tolist() == list(range(20))
    assert [a.tolist() for a in alone.read("valid", numbers)] == [
        a.tolist() for a in index.read("valid", numbers)
    ]


def test_held_out_sequences_come_from_every_source(dataset, second):
    mixed = open_dataset([dataset, second])
    parts = [shards.open_index(path) for path in (dataset, second)]
    numbers = mixed.first("valid", 20)
    texts = mixed.texts("valid", numbers)
    ten = np.arange(10)
    assert texts == [*parts[0].texts("valid", ten), *parts[1].texts("valid", ten)]
    few = parts[1].sequences("valid")
    assert len(mixed.first("valid", 100)) == 50 + few
    assert mixed.sequences("train") == sum(part.sequences("train") for part in parts)
    assert mixed.max_length == parts[0].max_length


def test_another_mixture_is_another_dataset(dataset, second):
    names = {
        open_dataset(entries).sha256
        for entries in ([dataset], [dataset, second], [second, dataset],
                        [dataset, {"path": second, "weight": 2}])
    }  # fmt: skip
    assert len(names) == 4


def test_bad_mixtures_are_one_line(dataset, second, tmp_path, corpus):
    shards.build(corpus, tmp_path / "bytes", tokenizer="byte", max_length=60)
    for entries, message in [
        ([], "no datasets"),
        ([dataset, second, dataset], "twice"),
        ([dataset, tmp_path / "bytes"], "different tokenizers"),
        ([{"path": dataset, "weight": 0}, second], "above 0"),
        ([dataset, tmp_path], "no dataset"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_dataset(entries)
        assert "\n" not in str(error.value)
