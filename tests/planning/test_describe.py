from pathlib import Path

import pytest

from shards import open_index
from t5vae.common.errors import UserError
from t5vae.config import load_config
from t5vae.planning.describe import describe, open_if_there

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def index(dataset):
    return open_index(dataset)


# Parameters of the T5 inside, tied embeddings of 32,128 pieces: t5-base 222.9 M; a 24-layer T5 of
# d_ff 16,384 with 32 heads of 128 (t5-3b) 2,851.6 M.
@pytest.mark.parametrize(
    ("name", "parameters"), [("legacy", 222.9e6), ("python_lines", 222.9e6), ("large", 2851.6e6)]
)
def test_a_preset_has_the_size_of_the_t5_it_names(name, parameters):
    facts = describe(load_config(CONFIGS / f"{name}.yaml"), None, 64)
    assert parameters < facts["parameters"] < 1.05 * parameters


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_built_on_the_meta_device_at_its_own_world_size(path, index):
    config = load_config(path)
    world_size = config.launcher.nodes * max(1, config.launcher.gpus_per_node)
    sized = config.model.vocab_size and config.model.sequence_length
    facts = describe(config, None if sized else index, world_size)
    assert facts["micro_batch_size"] * facts["accumulation"] * world_size == (
        config.data.global_batch_size
    )
    assert facts["parameters"] > 500_000
    assert facts["state_bytes_per_rank"] > 0


def test_what_depends_on_the_data_is_told_where_there_is_some(make_config, index):
    config = make_config(train={"steps": 100})
    facts = describe(config, index, 2)
    sequences = index.sequences("train")
    assert facts["train_sequences"] == sequences
    assert facts["steps_per_epoch"] == pytest.approx(sequences / 16, abs=0.01)
    assert facts["epochs"] == pytest.approx(1600 / sequences, abs=0.01)
    assert facts["micro_batch_size"] == 8


def test_shards_that_are_missing_are_needed_only_for_what_is_not_set(make_config, tmp_path):
    data = {"shards": str(tmp_path / "none"), "global_batch_size": 16}
    sized = make_config(data=data, model={"vocab_size": 300, "sequence_length": 24})
    assert open_if_there(sized) is None
    assert "epochs" not in describe(sized, None, 2)
    with pytest.raises(UserError) as caught:
        open_if_there(make_config(data=data))
    assert len(str(caught.value).splitlines()) == 1
    assert "t5vae shards build" in str(caught.value)
